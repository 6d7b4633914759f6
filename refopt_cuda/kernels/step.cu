// One optimizer step over many tensors in one launch: decode, rule, encode, in one pass through memory.
//
// build.py defines, in front of this text: RULE (functor), CODECS (codec functors of its states, in order), PARAM and
// GRAD (number formats), BLOCK (elements that share a scale), THREADS, MIN_BLOCKS, TENSORS and ROWS
// (most tensors, and different rows of scalars, a launch), LOOKUPS (whether a codec reads the dynamic map's tables)
// and AHEAD (whether the next block is asked into the second-level cache).
//
// A warp takes one block of the tensors' joint block list at a time, every warp of a persistent grid in turn: eight
// neighbouring elements a lane, 16-byte loads; the other warps of the multiprocessor compute while it waits. Blocks
// that are not aligned take `by_element`, the same functors one element at a time.

constexpr int STATES = RULE::STATES, KEPT = STATES > 0 ? STATES : 1;
typedef RULE::Scalars Scalars;

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

template <class C> struct is_table { static constexpr bool value = false; };
template <bool S> struct is_table<dynamic8<S>> { static constexpr bool value = true; };

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

template <class C> struct Stored<C, true> {  // 8-bit codes, a scale a block
    uint2 word;
    float scale;
    HD void load(const Slot& at, uint32_t t, uint32_t block) {
        word = take8(at.codes + (uint64_t)t * 8);
        scale = take4(at.scales + block);
    }
    HD void get(float (&x)[8], const Tables& t) const {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = C::decode(i < 4 ? word.x : word.y, i & 3, scale, t);
    }
    static HD void measure(const float (&x)[8], Measure& m) { m = Measure::of<C>(block_magnitude(x)); }
    static HD void put(const Slot& at, uint32_t t, uint32_t block, bool inside, const float (&x)[8], const Measure& m,
                       const Tables& tables) {
        uint2 w = make_uint2(C::ZERO, C::ZERO);
        if (m.live) w = make_uint2(C::encode4(x, m.inv, tables), C::encode4(x + 4, m.inv, tables));
        if (inside) give8(at.codes + (uint64_t)t * 8, w);
        if (tables.lane4 == 0) give4(at.scales + block, m.scale);
    }
    static HD float one(const Slot& at, int64_t i, uint32_t block, const Tables& t) {
        return C::decode(((const uint8_t*)at.codes)[i], 0, at.scales[block], t);
    }
    static HD void one(const Slot& at, int64_t i, float x, const Measure& m, const Tables& t) {
        float y[4] = {x, 0.0f, 0.0f, 0.0f};
        ((uint8_t*)at.codes)[i] = (uint8_t)(m.live ? C::encode4(y, m.inv, t) : C::ZERO);
    }
};

template <class C> struct Stored<C, false> {  // float32, as it is
    float32::Raw raw;
    HD void load(const Slot& at, uint32_t t, uint32_t) { float32::load(at.codes, t, raw); }
    HD void get(float (&x)[8], const Tables&) const { float32::get(raw, x); }
    static HD void measure(const float (&)[8], Measure&) {}
    static HD void put(const Slot& at, uint32_t t, uint32_t, bool inside, const float (&x)[8], const Measure&, const Tables&) {
        if (inside) float32::put(at.codes, t, x);
    }
    static HD float one(const Slot& at, int64_t i, uint32_t, const Tables&) { return ((const float*)at.codes)[i]; }
    static HD void one(const Slot& at, int64_t i, float x, const Measure&, const Tables&) { ((float*)at.codes)[i] = x; }
};

// ---- the launch ----

struct __align__(16) Tensor {  // static: rebuilt only where a pointer changed
    uint32_t first, whole;     // first block in the joint list; blocks before `whole` lie at BLOCK times their number
    uint32_t per, aligned;     // blocks a row, 0 where all but the last are whole; whether 16-byte accesses are allowed
    char* p;
    int64_t row;               // elements a row of the block layout
    Slot states[KEPT];
    int64_t n, unused;
};
struct Args {
    const Tensor* tensors;  // one more than there are: the last only ends the list
    const float* values;    // tables of the dynamic map: 256 signed, 256 unsigned values, then the buckets
    uint32_t blocks, count;
    float scalars[ROWS][16];
    unsigned char which[TENSORS];  // row of scalars a tensor
    const char* g[TENSORS];        // 1: skip
};

struct Cursor {  // walks the joint block list: block b lies in tensor k, which ends before block `end`
    uint32_t b, k, end;
    HD void seek(const Args& a) {
        while (b >= end) k++, end = a.tensors[k + 1].first;
    }
};
struct Span {  // one block of a tensor: number, first element, length
    uint32_t block, length;
    int64_t offset;
    HD Span(const Tensor& t, uint32_t b) : block(b - t.first) {
        if (t.per == 0) {  // rows are whole blocks: the tensor is one row
            offset = (int64_t)block * BLOCK;
            length = (uint32_t)min((int64_t)BLOCK, t.n - offset);
        } else {
            uint32_t r = block / t.per, c = (block - r * t.per) * BLOCK;
            offset = r * t.row + c;
            length = (uint32_t)min((int64_t)BLOCK, t.row - c);
        }
    }
};

template <class... C> struct Load;
template <> struct Load<> {
    template <class A> static HD bool claim(const Slot*, uint32_t, A&) { return false; }
    HD void load(const Slot*, uint32_t, uint32_t) {}
    HD void get(float (*)[8], const Tables&) const {}
    static HD void measure(const float (*)[8], Measure*) {}
    static HD void put(const Slot*, uint32_t, uint32_t, bool, const float (*)[8], const Measure*, const Tables&) {}
    static HD void one(const Slot*, int64_t, uint32_t, float*, const Tables&) {}
    static HD void grow(uint32_t*, const float*) {}
    static HD void close(const Slot*, uint32_t, uint32_t*, Measure*, bool) {}
    static HD void write(const Slot*, int64_t, const float*, const Measure*, const Tables&) {}
};
template <class C, class... Rest> struct Load<C, Rest...> {
    template <class A> static HD bool claim(const Slot* at, uint32_t lane, A& ahead) {
        return A::claim(at->codes, 2 * (C::BITS / 8), lane, ahead) || Load<Rest...>::claim(at + 1, lane, ahead);
    }
    Stored<C> head;
    Load<Rest...> rest;
    typedef Load<Rest...> Next;
    HD void load(const Slot* at, uint32_t t, uint32_t block) { head.load(*at, t, block), rest.load(at + 1, t, block); }
    HD void get(float (*x)[8], const Tables& t) const { head.get(*x, t), rest.get(x + 1, t); }
    static HD void measure(const float (*x)[8], Measure* m) { Stored<C>::measure(*x, *m), Next::measure(x + 1, m + 1); }
    static HD void put(const Slot* at, uint32_t t, uint32_t block, bool inside, const float (*x)[8], const Measure* m,
                       const Tables& tables) {
        Stored<C>::put(*at, t, block, inside, *x, *m, tables), Next::put(at + 1, t, block, inside, x + 1, m + 1, tables);
    }
    // one element at a time
    static HD void one(const Slot* at, int64_t i, uint32_t block, float* x, const Tables& tables) {
        *x = Stored<C>::one(*at, i, block, tables), Next::one(at + 1, i, block, x + 1, tables);
    }
    static HD void grow(uint32_t* a, const float* x) { *a = max(*a, bits(*x) & 0x7FFFFFFFu), Next::grow(a + 1, x + 1); }
    static HD void close(const Slot* at, uint32_t block, uint32_t* a, Measure* m, bool store) {
        if constexpr (C::SCALED) {
            *m = Measure::of<C>(warp_max(*a));
            if (store) at->scales[block] = m->scale;
        }
        Next::close(at + 1, block, a + 1, m + 1, store);
    }
    static HD void write(const Slot* at, int64_t i, const float* x, const Measure* m, const Tables& tables) {
        Stored<C>::one(*at, i, *x, *m, tables), Next::write(at + 1, i, x + 1, m + 1, tables);
    }
};
typedef Load<CODECS> States;

// Two passes over a block of any length and alignment: the first finds the magnitudes, the second repeats the step
// with the same bits and stores it.
__device__ __noinline__ void by_element(const Args& a, uint32_t k, uint32_t b, const char* values, const uint32_t* buckets) {
    const Tensor& t = a.tensors[k];
    const Scalars s = *(const Scalars*)a.scalars[ROWS == 1 ? 0 : a.which[k]];
    const Span at(t, b);
    uint32_t lane = threadIdx.x & 31, magnitude[KEPT] = {};
    Tables tables = {values, buckets, lane * 4};
    Measure m[KEPT] = {};
    Ieee ieee;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t i = lane; i < at.length; i += 32) {
            int64_t e = at.offset + i;
            float x[KEPT] = {}, p = PARAM::one(t.p, e), g = mul(GRAD::one(a.g[k], e), s.gs);
            States::one(t.states, e, at.block, x, tables);
            RULE::update(ieee, p, g, x, s);
            if (pass == 0) {
                States::grow(magnitude, x);
            } else {
                PARAM::one(t.p, e, p);
                States::write(t.states, e, x, m, tables);
            }
        }
        __syncwarp();
        States::close(t.states, at.block, magnitude, m, pass == 1 && lane == 0);
    }
}

// The lines of a block that this warp takes next, asked into the second-level cache while it computes: lane by lane,
// first p's, then g's, then the codes'. One instruction a block; what a lane asks for changes only with the tensor.
struct Ahead {
    const char* at;
    uint32_t stride, k;
    HD static bool claim(const char* base, uint32_t lines, uint32_t& lane, Ahead& ahead) {
        if (lane < lines) {
            ahead.at = base + lane * 128, ahead.stride = lines * 128;
            return true;
        }
        lane -= lines;
        return false;
    }
    HD void aim(const Args& a, uint32_t tensor, uint32_t lane) {
        const Tensor& t = a.tensors[tensor];
        const char* g = a.g[tensor];
        k = tensor, at = 0, stride = 0;
        bool found = g != (const char*)1 && (claim(t.p, 2 * PARAM::BYTES, lane, *this) || claim(g, 2 * GRAD::BYTES, lane, *this));
        if (!found && g != (const char*)1) States::claim(t.states, lane, *this);
        at -= (int64_t)t.first * stride;
    }
    HD void ask(const Args& a, const Cursor& c, uint32_t lane) {
        if (c.k != k) aim(a, c.k, lane);
        if (stride && c.b < a.tensors[k].whole)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(at + (int64_t)c.b * stride));
    }
};

HD void step_block(const Args& a, uint32_t k, uint32_t b, const Scalars& s, const Tables& tables) {
    const Tensor& t = a.tensors[k];
    const uint4 head = *(const uint4*)&t;  // first, whole, per, aligned
    const char* from = a.g[k];
    uint32_t lane = tables.lane4 >> 2, block = b - head.x, i = block * 32 + lane;
    bool inside = true;
    if (BLOCK != 256 || b >= head.y || ((uint64_t)from & 15)) {
        if (from == (const char*)1) return;
        const Span at(t, b);
        if (BLOCK != 256 || !head.w || ((uint64_t)from & 15) || (((uint32_t)at.offset | at.length) & 7))
            return by_element(a, k, b, tables.values, tables.buckets);
        inside = lane * 8 < at.length;  // lanes beyond a short block repeat its last elements and store nothing
        i = (uint32_t)(at.offset >> 3) + (inside ? lane : at.length / 8 - 1);
    }
    PARAM::Raw p;
    GRAD::Raw g;
    States states;
    GRAD::load(from, i, g), PARAM::load(t.p, i, p), states.load(t.states, i, block);
    float x[KEPT][8], w[8], d[8];
    GRAD::get(g, d), PARAM::get(p, w), states.get(x, tables);
    if (s.gs != 1.0f) {
#pragma unroll
        for (int j = 0; j < 8; j++) d[j] = mul(d[j], s.gs);
    }
    Core core;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float y[KEPT];
#pragma unroll
        for (int n = 0; n < STATES; n++) y[n] = x[n][j];
        RULE::update(core, w[j], d[j], y, s);
#pragma unroll
        for (int n = 0; n < STATES; n++) x[n][j] = y[n];
    }
    if (__any_sync(0xFFFFFFFFu, core.doubtful())) return by_element(a, k, b, tables.values, tables.buckets);
    if (inside) PARAM::put(t.p, i, w);
    Measure m[KEPT];
    States::measure(x, m);
    States::put(t.states, i, block, inside, x, m, tables);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) refopt_step(const __grid_constant__ Args a) {
    extern __shared__ char shared[];
    Tables tables = {shared, (const uint32_t*)(shared + 65536), (threadIdx.x & 31) * 4};
    if (LOOKUPS) {
        for (int i = threadIdx.x; i < 16384; i += THREADS) ((float*)shared)[i] = a.values[(i >> 6) + (i & 32) * 8];
        for (int i = threadIdx.x; i < 2 * BUCKETS; i += THREADS) ((uint32_t*)(shared + 65536))[i] = ((const uint32_t*)a.values)[512 + i];
        __syncthreads();
    }
    uint32_t warps = gridDim.x * (THREADS / 32), lane = threadIdx.x & 31;
    Cursor c = {blockIdx.x * (THREADS / 32) + threadIdx.x / 32, 0, a.tensors[1].first};
    Ahead ahead = {0, 0, ~0u};
    while (c.b < a.blocks) {
        c.seek(a);
        uint32_t k = c.k, b = c.b;
        c.b += warps;
        if (AHEAD && c.b < a.blocks) c.seek(a), ahead.ask(a, c, lane);
        step_block(a, k, b, *(const Scalars*)a.scalars[ROWS == 1 ? 0 : a.which[k]], tables);
    }
}
