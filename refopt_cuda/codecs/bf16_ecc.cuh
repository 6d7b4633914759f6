// bfloat16 weights and their error in parts of half a unit in the last place: see refopt/codecs/bf16_ecc.py. The half unit
// h is a power of two, 2^-134 at the least; its reciprocal is taken in two steps, because 2^134 is no float32.
template <int BITS> struct bf16_ecc {
    static constexpr int REST = BITS;
    static constexpr bool RANDOM = false;
    static constexpr float LEVELS = BITS == 8 ? 127.0f : 32767.0f;
    HD static uint32_t exponent(uint32_t word) {  // the field of a normal number: 1 for a subnormal, 254 for infinity
        uint32_t e = word >> 7 & 255u;
        return e == 0 ? 1 : e == 255u ? 254u : e;
    }
    HD static float open(uint32_t word, uint32_t rest) {
        int32_t q = BITS == 8 ? (int32_t)(int8_t)rest : (int32_t)(int16_t)rest;
        float part = mul(sub(real(0x4B400000u + (uint32_t)q), 12582912.0f), 1.0f / LEVELS);  // 1.5 * 2^23 + q
        float h = mul(real(exponent(word) << 23), 0.00390625f);                            // 2^-8
        return add(real(word << 16), mul(part, h));
    }
    HD static void close(float x, uint32_t, uint32_t& word, uint32_t& rest) {
        word = bf16::encode(x);
        rest = 0;
        if ((word & 0x7F80u) == 0x7F80u) return;
        float e = sub(x, real(word << 16));
        float part = mul(mul(e, real((255u - exponent(word)) << 23)), 128.0f);  // e / h
        rest = bits(add(mul(part, LEVELS), 12582912.0f)) & (BITS == 8 ? 255u : 0xFFFFu);
    }
};
