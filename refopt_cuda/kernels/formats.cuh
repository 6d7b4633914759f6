// How a block of 256 elements travels between memory and a warp's registers, eight neighbouring elements a lane: number
// formats of weights and gradients, the dynamic map's tables, and the states of a rule behind their codecs.

// ---- global memory: 16, 8 or 4 bytes, read once and written once; volatile, so that all loads of a block stay in front ----

static HD uint4 take16(const void* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}
static HD uint2 take8(const void* at) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
    return v;
}
static HD float take4(const void* at) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(at));
    return v;
}
static HD void give16(void* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
static HD void give8(void* at, uint2 v) { asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(v.x), "r"(v.y) : "memory"); }
static HD void give4(void* at, float v) { asm volatile("st.global.f32 [%0], %1;" ::"l"(at), "f"(v) : "memory"); }

// ---- number formats of weights and gradients: eight elements a lane, or one ----

struct float32 {
    static constexpr uint32_t BYTES = 4;
    struct Raw { uint4 a, b; };
    static HD void load(const char* at, uint32_t t, Raw& r) {
        const char* q = at + (uint64_t)t * 32;
        r.a = take16(q), r.b = take16(q + 16);
    }
    static HD void get(const Raw& r, float (&x)[8]) {
        x[0] = real(r.a.x), x[1] = real(r.a.y), x[2] = real(r.a.z), x[3] = real(r.a.w);
        x[4] = real(r.b.x), x[5] = real(r.b.y), x[6] = real(r.b.z), x[7] = real(r.b.w);
    }
    static HD void put(char* at, uint32_t t, const float (&x)[8]) {
        char* q = at + (uint64_t)t * 32;
        give16(q, bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]));
        give16(q + 16, bits(x[4]), bits(x[5]), bits(x[6]), bits(x[7]));
    }
    static HD float one(const char* at, int64_t i) {  // byte by byte where a view starts at an odd address
        if (((uint64_t)at & 3) == 0) return ((const float*)at)[i];
        const uint8_t* b = (const uint8_t*)at + 4 * i;
        return real(b[0] | b[1] << 8 | b[2] << 16 | (uint32_t)b[3] << 24);
    }
    static HD void one(char* at, int64_t i, float x) { ((float*)at)[i] = x; }
};

template <class Half> struct half_words {  // 16-bit formats differ only in how a word is widened and two are narrowed
    static constexpr uint32_t BYTES = 2;
    struct Raw { uint4 w; };
    static HD void load(const char* at, uint32_t t, Raw& r) { r.w = take16(at + (uint64_t)t * 16); }
    static HD void get(const Raw& r, float (&x)[8]) {
        Half::widen(r.w.x, x[0], x[1]), Half::widen(r.w.y, x[2], x[3]);
        Half::widen(r.w.z, x[4], x[5]), Half::widen(r.w.w, x[6], x[7]);
    }
    static HD void put(char* at, uint32_t t, const float (&x)[8]) {
        give16(at + (uint64_t)t * 16, Half::narrow(x[0], x[1]), Half::narrow(x[2], x[3]), Half::narrow(x[4], x[5]),
               Half::narrow(x[6], x[7]));
    }
    static HD float one(const char* at, int64_t i) {
        const uint8_t* b = (const uint8_t*)at + 2 * i;
        float x, unused;
        Half::widen(b[0] | (uint32_t)b[1] << 8, x, unused);
        return x;
    }
    static HD void one(char* at, int64_t i, float x) { ((uint16_t*)at)[i] = (uint16_t)Half::narrow(x, 0.0f); }
};

struct bfloat16_words {
    static HD void widen(uint32_t w, float& lo, float& hi) { lo = real(w << 16), hi = real(w & 0xFFFF0000u); }
    static HD uint32_t narrow(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
        uint32_t w;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
        return w;
#else
        return bf16::encode(lo) | (uint32_t)bf16::encode(hi) << 16;
#endif
    }
};
struct float16_words {
    static HD void widen(uint32_t w, float& lo, float& hi) {
        asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(lo), "=f"(hi) : "r"(w));
    }
    static HD uint32_t narrow(float lo, float hi) {
        uint32_t w;
        asm("{.reg .b16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}" : "=r"(w) : "f"(lo), "f"(hi));
        return w;
    }
};
typedef half_words<bfloat16_words> bfloat16;
typedef half_words<float16_words> float16;

// ---- tables of the dynamic map, in shared memory: values 32 times over, so that no two lanes meet in a bank ----

constexpr int BUCKETS = 2945;  // of the encode table: top 16 bits of 2^-23 .. 1
struct Tables {
    const char* values;       // 256 rows of 256 bytes: 32 copies of the signed value, 32 of the unsigned
    const uint32_t* buckets;  // signed, then unsigned
    uint32_t lane4;
    template <bool SIGNED> HD float value(uint32_t word, int k) const {
        uint32_t at = byte_perm(word, lane4, 0x5504u | k << 4);  // code in byte 1, 4 * lane in byte 0
        return *(const float*)(values + at + (SIGNED ? 0 : 128));
    }
    template <bool SIGNED> HD uint32_t bucket(uint32_t i) const { return buckets[i + (SIGNED ? 0 : BUCKETS)]; }
};

// ---- the largest magnitude of a block, NaN above all ----

HD float larger_magnitude(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(magnitude(a)), "f"(magnitude(b)));
    return r;
#else
    return real(max(bits(a) & 0x7FFFFFFFu, bits(b) & 0x7FFFFFFFu));
#endif
}
HD uint32_t warp_max(uint32_t w) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xFFFFFFFFu, w);
#else
    for (int d = 16; d; d >>= 1) w = max(w, __shfl_xor_sync(0xFFFFFFFFu, w, d));
    return w;
#endif
}

HD uint32_t block_magnitude(const float (&x)[8]) {
    float a = larger_magnitude(x[0], x[1]), b = larger_magnitude(x[2], x[3]);
    float c = larger_magnitude(x[4], x[5]), d = larger_magnitude(x[6], x[7]);
    return warp_max(bits(larger_magnitude(larger_magnitude(a, b), larger_magnitude(c, d))));
}

// What a block's magnitude makes of it: the stored scale, the factor that brings it to [-1, 1], whether it has codes.
struct Measure {
    float scale, inv;
    bool live;
    template <class C> static HD Measure of(uint32_t magnitude) {
        float a = real(magnitude);
        if (magnitude - 0x0D800000u < 0x71000000u) return {C::scale(a), Core::rcp_core(a), true};  // 2^-100 .. 2^126
        if (!(a < real(0x7F800000u))) return {real(0x7FC00000u), 0.0f, false};
        if (a < 7.8886091e-31f) return {0.0f, 0.0f, false};  // 2^-100
        return {C::scale(a), divide(1.0f, a), true};
    }
};

// ---- the states of a rule, each behind its codec ----

struct __align__(16) Slot {  // where one state of one tensor lies
    char* codes;
    float* scales;
};

template <class C, bool SCALED = C::SCALED> struct Stored;

template <class C> struct Stored<C, true> {  // 8-bit codes, a scale a block; lane j of a unit holds the scale of block j
    uint2 word;
    static HD void open(const Slot& at, uint32_t block, bool mine, float& scale) {
        if (mine) scale = take4(at.scales + block);
    }
    static HD void close(const Slot& at, uint32_t block, bool mine, float scale) {
        if (mine) give4(at.scales + block, scale);
    }
    HD void load(const char* codes, uint32_t t) { word = take8(codes + (uint64_t)t * 8); }
    HD void get(float (&x)[8], float scales, uint32_t j, const Tables& t) const {
        float scale = __shfl_sync(0xFFFFFFFFu, scales, j);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = C::decode(i < 4 ? word.x : word.y, i & 3, scale, t);
    }
    static HD void measure(const float (&x)[8], Measure& m) { m = Measure::of<C>(block_magnitude(x)); }
    static HD void put(char* codes, uint32_t t, bool inside, const float (&x)[8], const Measure& m, bool mine, float& scale,
                       const Tables& tables) {
        uint2 w = make_uint2(C::ZERO, C::ZERO);
        if (m.live) w = make_uint2(C::encode4(x, m.inv, tables), C::encode4(x + 4, m.inv, tables));
        if (inside) give8(codes + (uint64_t)t * 8, w);
        if (mine) scale = m.scale;
    }
    static HD float one(const Slot& at, int64_t i, uint32_t block, const Tables& t) {
        return C::decode(((const uint8_t*)at.codes)[i], 0, at.scales[block], t);
    }
    static HD void one(const Slot& at, int64_t i, float x, const Measure& m, const Tables& t) {
        float y[4] = {x, 0.0f, 0.0f, 0.0f};
        ((uint8_t*)at.codes)[i] = (uint8_t)(m.live ? C::encode4(y, m.inv, t) : C::ZERO);
    }
};

template <class C> struct number_of { typedef float32 type; };
template <> struct number_of<bf16> { typedef bfloat16 type; };

template <class C> struct Stored<C, false> {  // a number each, no scale
    typedef typename number_of<C>::type Number;
    typename Number::Raw raw;
    static HD void open(const Slot&, uint32_t, bool, float&) {}
    static HD void close(const Slot&, uint32_t, bool, float) {}
    HD void load(const char* codes, uint32_t t) { Number::load(codes, t, raw); }
    HD void get(float (&x)[8], float, uint32_t, const Tables&) const { Number::get(raw, x); }
    static HD void measure(const float (&)[8], Measure&) {}
    static HD void put(char* codes, uint32_t t, bool inside, const float (&x)[8], const Measure&, bool, float&, const Tables&) {
        if (inside) Number::put(codes, t, x);
    }
    static HD float one(const Slot& at, int64_t i, uint32_t, const Tables&) { return Number::one((const char*)at.codes, i); }
    static HD void one(const Slot& at, int64_t i, float x, const Measure&, const Tables&) { Number::one(at.codes, i, x); }
};

// ---- all states of a rule, one after the other ----

template <class... C> struct Load;
template <> struct Load<> {
    template <class A> static HD bool claim(const Slot*, uint32_t, A&) { return false; }
    static HD void open(const Slot*, uint32_t, bool, float*) {}
    static HD void close(const Slot*, uint32_t, bool, const float*) {}
    HD void load(const Slot*, uint32_t) {}
    HD void get(float (*)[8], const float*, uint32_t, const Tables&) const {}
    static HD void measure(const float (*)[8], Measure*) {}
    static HD void put(const Slot*, uint32_t, bool, const float (*)[8], const Measure*, bool, float*, const Tables&) {}
    static HD void one(const Slot*, int64_t, uint32_t, float*, const Tables&) {}
    static HD void grow(uint32_t*, const float*) {}
    static HD void settle(const Slot*, uint32_t, uint32_t*, Measure*, bool) {}
    static HD void write(const Slot*, int64_t, const float*, const Measure*, const Tables&) {}
};
template <class C, class... Rest> struct Load<C, Rest...> {
    Stored<C> head;
    Load<Rest...> rest;
    typedef Load<Rest...> Next;
    template <class A> static HD bool claim(const Slot* at, uint32_t lane, A& ahead) {
        return A::claim(at->codes, 2 * (C::BITS / 8), lane, ahead) || Next::claim(at + 1, lane, ahead);
    }
    static HD void open(const Slot* at, uint32_t block, bool mine, float* scale) {
        Stored<C>::open(*at, block, mine, *scale), Next::open(at + 1, block, mine, scale + 1);
    }
    static HD void close(const Slot* at, uint32_t block, bool mine, const float* scale) {
        Stored<C>::close(*at, block, mine, *scale), Next::close(at + 1, block, mine, scale + 1);
    }
    HD void load(const Slot* at, uint32_t t) { head.load(at->codes, t), rest.load(at + 1, t); }
    HD void get(float (*x)[8], const float* scale, uint32_t j, const Tables& t) const {
        head.get(*x, *scale, j, t), rest.get(x + 1, scale + 1, j, t);
    }
    static HD void measure(const float (*x)[8], Measure* m) { Stored<C>::measure(*x, *m), Next::measure(x + 1, m + 1); }
    static HD void put(const Slot* at, uint32_t t, bool inside, const float (*x)[8], const Measure* m, bool mine, float* scale,
                       const Tables& tables) {
        Stored<C>::put(at->codes, t, inside, *x, *m, mine, *scale, tables);
        Next::put(at + 1, t, inside, x + 1, m + 1, mine, scale + 1, tables);
    }
    // one element at a time
    static HD void one(const Slot* at, int64_t i, uint32_t block, float* x, const Tables& tables) {
        *x = Stored<C>::one(*at, i, block, tables), Next::one(at + 1, i, block, x + 1, tables);
    }
    static HD void grow(uint32_t* a, const float* x) { *a = max(*a, bits(*x) & 0x7FFFFFFFu), Next::grow(a + 1, x + 1); }
    static HD void settle(const Slot* at, uint32_t block, uint32_t* a, Measure* m, bool store) {
        if constexpr (C::SCALED) {
            *m = Measure::of<C>(warp_max(*a));
            if (store) at->scales[block] = m->scale;
        }
        Next::settle(at + 1, block, a + 1, m + 1, store);
    }
    static HD void write(const Slot* at, int64_t i, const float* x, const Measure* m, const Tables& tables) {
        Stored<C>::one(*at, i, *x, *m, tables), Next::write(at + 1, i, x + 1, m + 1, tables);
    }
};
typedef Load<CODECS> States;
