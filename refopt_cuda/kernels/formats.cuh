// How a tile of 256 elements travels between memory and a warp's registers, eight neighbouring elements a lane: number
// formats of gradients, and weights in a number format or as bfloat16 words with a rest beside them.

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

struct nothing {  // no array at all
    static constexpr uint32_t BYTES = 0;
    struct Raw {};
    static HD void load(const char*, uint32_t, Raw&) {}
    static HD void get(const Raw&, float (&x)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = 0.0f;
    }
    static HD void put(char*, uint32_t, const float (&)[8]) {}
    static HD float one(const char*, int64_t) { return 0.0f; }
    static HD void one(char*, int64_t, float) {}
};

// ---- weights: where element i lies, and what is beside it ----

struct Lair {
    char* p;
    char* rest;
};

template <class N> struct Number {  // a number format, nothing beside it
    static constexpr uint32_t BYTES = N::BYTES, REST = 0;
    static constexpr bool RANDOM = false;
    typedef typename N::Raw Raw;
    static HD void load(const Lair& at, uint32_t t, Raw& r) { N::load(at.p, t, r); }
    static HD void get(const Raw& r, float (&x)[8]) { N::get(r, x); }
    static HD void put(const Lair& at, uint32_t t, const float (&x)[8], const Raw&, const uint32_t (&)[8]) { N::put(at.p, t, x); }
    static HD float one(const Lair& at, int64_t i) { return N::one(at.p, i); }
    static HD void one(const Lair& at, int64_t i, float x, uint32_t) { N::one(at.p, i, x); }
};

template <int BITS> struct Rest { uint4 w; };  // eight rests of 16 bits
template <> struct Rest<8> { uint2 w; };
template <> struct Rest<0> {};

template <class F> struct Words {  // bfloat16 words under a functor that opens and closes them
    static constexpr uint32_t BYTES = 2, REST = F::REST / 8;
    static constexpr bool RANDOM = F::RANDOM;
    struct Raw {
        uint4 w;
        Rest<F::REST> rest;
    };
    static HD void load(const Lair& at, uint32_t t, Raw& r) {
        r.w = take16(at.p + (uint64_t)t * 16);
        if constexpr (F::REST == 16) r.rest.w = take16(at.rest + (uint64_t)t * 16);
        if constexpr (F::REST == 8) r.rest.w = take8(at.rest + (uint64_t)t * 8);
    }
    static HD void split(const Raw& r, uint32_t (&w)[8], uint32_t (&rest)[8]) {
        const uint32_t words[4] = {r.w.x, r.w.y, r.w.z, r.w.w};
#pragma unroll
        for (int i = 0; i < 8; i++) w[i] = i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFFu, rest[i] = 0;
        if constexpr (F::REST == 16) {
            const uint32_t pairs[4] = {r.rest.w.x, r.rest.w.y, r.rest.w.z, r.rest.w.w};
#pragma unroll
            for (int i = 0; i < 8; i++) rest[i] = i & 1 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xFFFFu;
        }
        if constexpr (F::REST == 8) {
#pragma unroll
            for (int i = 0; i < 8; i++) rest[i] = (i < 4 ? r.rest.w.x : r.rest.w.y) >> 8 * (i & 3) & 255u;
        }
    }
    static HD void get(const Raw& r, float (&x)[8]) {
        uint32_t w[8], rest[8];
        split(r, w, rest);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = F::open(w[i], rest[i]);
    }
    static HD uint32_t pair(uint32_t a, uint32_t b) { return byte_perm(a, b, 0x5410); }
    static HD uint32_t four(const uint32_t* b) { return byte_perm(byte_perm(b[0], b[1], 0x0040), byte_perm(b[2], b[3], 0x0040), 0x5410); }
    static HD void put(const Lair& at, uint32_t t, const float (&x)[8], const Raw& old, const uint32_t (&random)[8]) {
        uint32_t w[8], rest[8];
        split(old, w, rest);
#pragma unroll
        for (int i = 0; i < 8; i++) F::close(x[i], random[i], w[i], rest[i]);
        give16(at.p + (uint64_t)t * 16, pair(w[0], w[1]), pair(w[2], w[3]), pair(w[4], w[5]), pair(w[6], w[7]));
        if constexpr (F::REST == 16)
            give16(at.rest + (uint64_t)t * 16, pair(rest[0], rest[1]), pair(rest[2], rest[3]), pair(rest[4], rest[5]), pair(rest[6], rest[7]));
        if constexpr (F::REST == 8) give8(at.rest + (uint64_t)t * 8, make_uint2(four(rest), four(rest + 4)));
    }
    static HD uint32_t beside(const Lair& at, int64_t i) {
        if constexpr (F::REST == 16) return ((const uint16_t*)at.rest)[i];
        if constexpr (F::REST == 8) return ((const uint8_t*)at.rest)[i];
        return 0;
    }
    static HD float one(const Lair& at, int64_t i) { return F::open(((const uint16_t*)at.p)[i], beside(at, i)); }
    static HD void one(const Lair& at, int64_t i, float x, uint32_t random) {
        uint32_t w = ((const uint16_t*)at.p)[i], rest = beside(at, i);
        F::close(x, random, w, rest);
        ((uint16_t*)at.p)[i] = (uint16_t)w;
        if constexpr (F::REST == 16) ((uint16_t*)at.rest)[i] = (uint16_t)rest;
        if constexpr (F::REST == 8) ((uint8_t*)at.rest)[i] = (uint8_t)rest;
    }
};
