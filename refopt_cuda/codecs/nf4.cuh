// 4-bit NormalFloat: see refopt/codecs/nf4.py. The two signs have different midpoints, each in its half of the buckets.
struct nf4 {
    static constexpr int BITS = 4;
    static constexpr bool SCALED = true;
    static constexpr uint32_t ZERO = 0x77777777u;
    static constexpr int ROWS = 16, WORDS = nibbles::WORDS;
    static constexpr int SCALE_BITS = 32;
    static constexpr bool FACTOR_OF_SCALE = false;
    HD static float scale(float amax) { return amax; }
    template <class T> HD static float decode(uint32_t word, int k, float scale, const T& t) {
        return mul(t.value(nibbles::split(word, k), k >> 1), scale);
    }
    template <class A, class T> HD static uint32_t encode(A&, const float* x, float inv, const T& t) {
        return nibbles::nearest(x, inv, t);
    }
};
