// 8-bit floats, a scale for each block: see refopt/codecs/fp8.py. Since Ada a GPU converts two at a time; an e5m2 word
// is the upper byte of a float16. Elsewhere a word's fields move to those of a float32, whose bias a multiplication
// mends, and the way back rounds on the word, or, below the normal range, by adding a number whose steps are those of
// the subnormals. Nothing is clamped: |y| <= 1 + 2^-22 rounds to the largest number at most.
constexpr int E4M3 = 0, E5M2 = 1;
template <int FORMAT> struct fp8 {
    static constexpr int BITS = 8;
    static constexpr bool SCALED = true;
    static constexpr uint32_t ZERO = 0;
    static constexpr int ROWS = 0, WORDS = 0;
    static constexpr int SCALE_BITS = 32;
    static constexpr bool FACTOR_OF_SCALE = false;
    static constexpr float LARGEST = FORMAT == E4M3 ? 448.0f : 57344.0f;
    static constexpr uint32_t MANTISSA = FORMAT == E4M3 ? 3 : 2, BIAS = FORMAT == E4M3 ? 7 : 15;
    static constexpr uint32_t LAST = FORMAT == E4M3 ? 0x7E : 0x7B;
    HD static float scale(float amax) { return divide(amax, LARGEST); }
    template <class T> HD static float decode(uint32_t word, int k, float scale, const T&) {
#if __CUDA_ARCH__ >= 890
        uint32_t two;
        if (FORMAT == E4M3) asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"((uint16_t)(word >> (k & 2) * 8)));
        else two = byte_perm(word, 0, k & 2 ? 0x3424 : 0x1404);
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)(two >> (k & 1) * 16)));
        return mul(x, scale);
#else
        uint32_t w = byte_perm(word, 0, 0x0444u | k << 12), m = (w & 0x7F000000u) >> (MANTISSA + 1);
        uint32_t x = bits(mul(real(m), real((254 - BIAS) << 23)));
        if (m > LAST << (23 - MANTISSA)) x |= 0x7F800000u;  // the infinity of e5m2, and NaN
        return mul(real(x | (w & 0x80000000u)), scale);
#endif
    }
    HD static uint32_t nearest(float x) {
        constexpr uint32_t SHIFT = 23 - MANTISSA, NORMAL = (128 - BIAS) << 23, LADDER = (128 - BIAS + SHIFT) << 23;
        uint32_t w = bits(x), m = w & 0x7FFFFFFFu;
        uint32_t low = bits(add(real(m), real(LADDER))) - LADDER;
        uint32_t high = ((m + ((1u << (SHIFT - 1)) - 1) + (m >> SHIFT & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA);
        return (m < NORMAL ? low : high) | (w >> 24 & 0x80u);
    }
    template <class A, class T> HD static uint32_t encode(A&, const float* x, float inv, const T&) {
        float y[4];
        for (int k = 0; k < 4; k++) y[k] = mul(mul(x[k], inv), LARGEST);
#if __CUDA_ARCH__ >= 890
        uint32_t w;
        if (FORMAT == E4M3)
            asm("{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, %2, %1; cvt.rn.satfinite.e4m3x2.f32 b, %4, %3;"
                "mov.b32 %0, {a, b};}"
                : "=r"(w) : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]));
        else
            asm("{.reg .b16 a, b; cvt.rn.satfinite.e5m2x2.f32 a, %2, %1; cvt.rn.satfinite.e5m2x2.f32 b, %4, %3;"
                "mov.b32 %0, {a, b};}"
                : "=r"(w) : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]));
        return w;
#else
        uint32_t lower = byte_perm(nearest(y[0]), nearest(y[1]), 0x0040);
        uint32_t upper = byte_perm(nearest(y[2]), nearest(y[3]), 0x0040);
        return byte_perm(lower, upper, 0x5410);
#endif
    }
};
