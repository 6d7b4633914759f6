// bfloat16, rounded to nearest even: see refopt/codecs/bf16.py.
struct bf16 {
    static constexpr int BITS = 16;
    static constexpr bool SCALED = false;
    typedef uint16_t Code;
    HD static float decode(Code c) { return real((uint32_t)c << 16); }
    HD static Code encode(float x) {
        uint32_t w = bits(x);
        if (is_nan(x)) return w >> 16 & 0x8000 | 0x7FC0;
        return (w + 0x7FFF + (w >> 16 & 1)) >> 16;
    }
};
