// Companded 8-bit: see refopt/codecs/compand8.py. Decoding reads the table; z 127 = (y r) 254 in the same bits, since 2
// is a power of two, and 1 + |y| lies in [1, 2], where the fast reciprocal is exact. `saturated` brings a product to
// [0, 1], the NaN of a negative number's root to 0.
constexpr int F16 = 0, BF16 = 1;
template <bool SIGNED, int SCALE> struct compand8 {
    static constexpr int BITS = 8;
    static constexpr bool SCALED = true;
    static constexpr uint32_t ZERO = 0;
    static constexpr int ROWS = 256, WORDS = 0;
    static constexpr int SCALE_BITS = 16;
    static constexpr bool FACTOR_OF_SCALE = true;
    HD static float scale(float amax) { return widen_scale(narrow_scale(SIGNED ? amax : ieee_sqrt(amax))); }
    HD static uint16_t narrow_scale(float s) {  // of a number that is not negative
        constexpr uint32_t LARGEST = SCALE == F16 ? 0x7BFF : 0x7F7F;
        uint32_t w = bits(s), near;
        if (w > 0x7F800000u) return SCALE == F16 ? 0x7E00 : 0x7FC0;
        if (SCALE == F16) near = half(s);
        else near = (w + 0x7FFF + (w >> 16 & 1)) >> 16;
        return (uint16_t)(near < LARGEST ? near : LARGEST);
    }
    HD static float widen_scale(uint16_t w) {
        if (SCALE == F16) return whole(w);
        return real((uint32_t)w << 16);
    }
    template <class T> HD static float decode(uint32_t word, int k, float scale, const T& t) {
        float w = mul(t.value(word, k), scale);
        return SIGNED ? w : mul(w, w);
    }
    template <class A, class T> HD static uint32_t encode(A& a, const float* x, float inv, const T&) {
        uint32_t q[4];
        for (int k = 0; k < 4; k++) {
            float z;
            if constexpr (SIGNED) {
                float y = saturated(magnitude(x[k]), inv);
                z = mul(real(bits(mul(y, reciprocal(add(1.0f, y)))) | (bits(x[k]) & 0x80000000u)), 254.0f);
            } else {
                z = mul(saturated(a.sqrt(x[k]), inv), 255.0f);
            }
            q[k] = bits(add(z, 12582912.0f));  // 1.5 2^23
        }
        return byte_perm(byte_perm(q[0], q[1], 0x0040), byte_perm(q[2], q[3], 0x0040), 0x5410);
    }

#ifdef __CUDACC_RTC__
    HD static uint32_t half(float s) { uint16_t w; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(w) : "f"(s)); return w; }
    HD static float whole(uint16_t w) { float s; asm("cvt.f32.f16 %0, %1;" : "=f"(s) : "h"(w)); return s; }
    HD static float saturated(float a, float b) {
        float r;
        asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
        return r;
    }
    HD static float reciprocal(float d) { return Core::rcp_core(d); }
#else
    HD static uint32_t half(float s) {
        uint32_t w = bits(s);
        if (w < 0x38800000u) return bits(add(s, 0.5f)) - 0x3F000000u;  // 2^-14: steps of 2^-24, as those of 1/2
        if (w >= 0x477FF000u) return 0x7C00;                           // 65520
        return (w + 0xFFF + (w >> 13 & 1) - 0x38000000u) >> 13;
    }
    HD static float whole(uint16_t w) {
        uint32_t m = w & 0x7FFF, x = (m << 13) + 0x38000000u;
        if (m < 0x400) x = bits(mul((float)m, 5.9604645e-8f));
        if (m >= 0x7C00) x |= 0x7F800000u;
        return real(x | (w & 0x8000u) << 16);
    }
    HD static float saturated(float a, float b) {
        float r = mul(a, b);
        return r > 1.0f ? 1.0f : r > 0.0f ? r : 0.0f;
    }
    HD static float reciprocal(float d) { return divide(1.0f, d); }
#endif
};
