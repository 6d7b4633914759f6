// Linear 8-bit: see refopt/codecs/int8_linear.py. Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and
// leaves it in the low byte; the way back puts the byte under the exponent of 2^23. Conversions cost four times more.
template <bool SIGNED> struct int8_linear {
    static constexpr int BITS = 8;
    static constexpr bool SCALED = true;
    static constexpr uint32_t ZERO = 0;
    static constexpr int ROWS = 0, WORDS = 0, SCALE_BITS = 32;
    static constexpr bool FACTOR_OF_SCALE = false;
    static constexpr float LEVELS = SIGNED ? 127.0f : 255.0f;
    HD static float scale(float amax) { return divide(amax, LEVELS); }
    template <class T> HD static float decode(uint32_t word, int k, float scale, const T&) {
        uint32_t w = byte_perm(SIGNED ? word ^ 0x80808080u : word, 0x4B000000u, 0x7440u | k);  // 2^23 + code (+ 128)
        return mul(sub(real(w), SIGNED ? 8388736.0f : 8388608.0f), scale);
    }
    template <class A, class T> HD static uint32_t encode(A&, const float* x, float inv, const T&) {
        uint32_t q[4];
        for (int k = 0; k < 4; k++) {
            float y = mul(x[k], inv);
            if (!SIGNED) y = larger(y, 0.0f);
            q[k] = bits(add(mul(y, LEVELS), 12582912.0f));
        }
        return byte_perm(byte_perm(q[0], q[1], 0x0040), byte_perm(q[2], q[3], 0x0040), 0x5410);
    }
};
