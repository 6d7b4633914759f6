// bfloat16 weights with a running compensation: see refopt/codecs/bf16_kahan.py.
struct bf16_kahan {
    static constexpr int REST = 16;
    static constexpr bool RANDOM = false;
    HD static uint32_t rounded(float x) { return bf16::encode(x); }
    HD static float value(uint32_t word) { return real(word << 16); }
    HD static float open(uint32_t word, uint32_t) { return value(word); }
    HD static void close(float x, uint32_t, uint32_t& word, uint32_t& rest) {
        float o = value(word), c = value(rest & 0xFFFFu);
        c = value(rounded(add(c, sub(x, o))));
        word = rounded(add(o, c));
        rest = rounded(add(c, value(rounded(sub(o, value(word))))));
    }
};
