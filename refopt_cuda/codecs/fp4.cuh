// A 4-bit float for weights: see refopt/codecs/fp4.py. The search gives the rank of the magnitude, 8 more with a sign;
// the codes of ranks 2, 3, 6, 7 are 6, 7, 2, 3. A zero has no sign: adding +0 takes it off.
struct fp4 {
    static constexpr int BITS = 4;
    static constexpr bool SCALED = true;
    static constexpr uint32_t ZERO = 0;
    static constexpr int ROWS = 16, WORDS = nibbles::WORDS;
    static constexpr int SCALE_BITS = 32;
    static constexpr bool FACTOR_OF_SCALE = false;
    HD static float scale(float amax) { return amax; }
    template <class T> HD static float decode(uint32_t word, int k, float scale, const T& t) {
        return mul(t.value(nibbles::split(word, k), k >> 1), scale);
    }
    template <class A, class T> HD static uint32_t encode(A&, const float* x, float inv, const T& t) {
        uint32_t q[8];
        for (int k = 0; k < 8; k++) q[k] = nibbles::find(add(mul(x[k], inv), 0.0f), t);
        uint32_t ranks = nibbles::join(nibbles::bytes(q, 0x0073), nibbles::bytes(q + 1, 0x0073));
        return ranks ^ ranks << 1 & 0x44444444u;
    }
};
