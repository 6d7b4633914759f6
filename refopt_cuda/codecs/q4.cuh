// 4-bit states, a scale for each block: see refopt/codecs/q4.py. The levels k / 16 need no table: a float32 beside 2^19
// has steps of 1/16.
template <bool SIGNED> struct q4 {
    static constexpr int BITS = 4;
    static constexpr bool SCALED = true;
    static constexpr uint32_t ZERO = SIGNED ? 0x77777777u : 0u;
    static constexpr int ROWS = SIGNED ? 16 : 0, WORDS = SIGNED ? nibbles::WORDS : 0;
    static constexpr int SCALE_BITS = 32;
    static constexpr bool FACTOR_OF_SCALE = false;
    HD static float scale(float amax) { return amax; }
    template <class T> HD static float decode(uint32_t word, int k, float scale, const T& t) {
        uint32_t codes = nibbles::split(word, k);
        if constexpr (SIGNED) return mul(t.value(codes, k >> 1), scale);
        uint32_t w = byte_perm(codes, 0x49000000u, 0x7440u | k >> 1);  // 2^19 + code / 16
        return mul(sub(real(w), 524287.9375f), scale);                 // 2^19 - 1/16
    }
    // 1 .. 16 in the low byte, beside 1.5 2^19
    HD static uint32_t sixteenths(float y) { return bits(add(larger(y, 0.0625f), 786432.0f)); }
    template <class A, class T> HD static uint32_t encode(A&, const float* x, float inv, const T& t) {
        if constexpr (SIGNED) {
            return nibbles::nearest(x, inv, t);
        } else {
            uint32_t q[8];
            for (int k = 0; k < 8; k++) q[k] = sixteenths(mul(x[k], inv));
            return nibbles::join(nibbles::bytes(q, 0x0040), nibbles::bytes(q + 1, 0x0040)) - 0x11111111u;
        }
    }
};
