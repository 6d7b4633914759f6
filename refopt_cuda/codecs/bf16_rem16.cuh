// bfloat16 weights and the 16 bits that they lack: see refopt/codecs/bf16_rem16.py.
struct bf16_rem16 {
    static constexpr int REST = 16;
    static constexpr bool RANDOM = false;
    HD static float open(uint32_t word, uint32_t rest) {
        return real((word << 16) + (uint32_t)(int32_t)(int16_t)rest);
    }
    HD static void close(float x, uint32_t, uint32_t& word, uint32_t& rest) {
        uint32_t w = is_nan(x) ? 0x7FC00000u : bits(x);
        word = (w + 0x8000u) >> 16;
        rest = w & 0xFFFFu;
    }
};
