// bfloat16 weights, rounded by chance: see refopt/codecs/bf16_sr.py.
struct bf16_sr {
    static constexpr int REST = 0;
    static constexpr bool RANDOM = true;
    HD static float open(uint32_t word, uint32_t) { return real(word << 16); }
    HD static void close(float x, uint32_t r16, uint32_t& word, uint32_t&) {
        uint32_t w = bits(x);
        word = is_nan(x) ? w >> 16 & 0x8000u | 0x7FC0u : (w + r16) >> 16;
    }
};
