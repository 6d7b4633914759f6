// Dynamic 8-bit: see refopt/codecs/dynamic8.py. Decoding reads the table; encoding finds the nearest entry with one
// load: bucket k = top 16 bits of |y| holds at most one midpoint, so with
//   E[k] = (code at the bucket's start << 16) + 0xFFFF - (midpoint & 0xFFFF) - (k << 16)
// the sum bits(|y|) + E[k] carries into byte 2 exactly when |y| > midpoint. Below 2^-23 every code is the zero's.
template <bool SIGNED> struct dynamic8 {
    static constexpr int BITS = 8;
    static constexpr bool SCALED = true;
    static constexpr uint32_t ZERO = SIGNED ? 0x7F7F7F7Fu : 0u;
    static constexpr int ROWS = 256, WORDS = 2945, SCALE_BITS = 32;
    static constexpr bool FACTOR_OF_SCALE = false;
    static constexpr uint32_t FIRST = 0x3400;  // the bucket of 2^-23
    HD static float scale(float amax) { return amax; }
    template <class T> HD static float decode(uint32_t word, int k, float scale, const T& t) { return mul(t.value(word, k), scale); }
    template <class T> HD static uint32_t count(float y, const T& t) {
        uint32_t w = bits(larger(SIGNED ? magnitude(y) : y, 1.1920929e-7f));
        return w + t.word((w >> 16) - FIRST);
    }
    template <class A, class T> HD static uint32_t encode(A&, const float* x, float inv, const T& t) {
        uint32_t q[4];
        for (int k = 0; k < 4; k++) q[k] = count(mul(x[k], inv), t);
        uint32_t c = byte_perm(byte_perm(q[0], q[1], 0x0062), byte_perm(q[2], q[3], 0x0062), 0x5410);
        if (!SIGNED) return c;
        uint32_t lo = byte_perm(bits(x[0]), bits(x[1]), 0x00FB), hi = byte_perm(bits(x[2]), bits(x[3]), 0x00FB);
        uint32_t negative = byte_perm(lo, hi, 0x5410), n = c & negative;
        n -= n >> 7 & 0x01010101u;  // 127 - 128 would leave the byte: the lowest code is 0
        return 0x7F7F7F7Fu + (c & ~negative) - n;
    }
};
