// The CUDA functors as a shared library: loops over arrays around refopt_cuda's .cuh files, built by g++ for the host.
#include "kernels/arith.cuh"
#undef HD
#define HD inline  // the codecs' functions say `static` themselves
#include "codecs/bf16.cuh"
#include "codecs/dynamic8.cuh"
#include "codecs/f32.cuh"
#include "codecs/int8_linear.cuh"
#include "rules.inc"  // every rules/*.cuh, and below a RULE for each form; functors.py writes both from the tables

// What a codec looks up: its values, then its encode table.
template <class Codec> struct Tables {
    const uint32_t* words;
    float value(uint32_t word, int k) const {
        uint32_t code = word >> 8 * k & 255;
        return code < Codec::ROWS ? real(words[code]) : real(0xFFBADBADu);
    }
    uint32_t word(uint32_t i) const { return i < Codec::WORDS ? words[Codec::ROWS + i] : 0xDEADBEEFu; }
};

// p and the states (one plane of n each) are updated in place; the gradient is scaled first, as the kernel does.
template <class Rule> void step(int64_t n, float* p, const float* g, float* states, const float* row) {
    typename Rule::Scalars s;
    std::memcpy(&s, row, sizeof s);
    constexpr int KEPT = Rule::STATES > 0 ? Rule::STATES : 1;
    Ieee ieee;
    for (int64_t i = 0; i < n; i++) {
        float x[KEPT] = {};
        for (int k = 0; k < Rule::STATES; k++) x[k] = states[k * n + i];
        Rule::update(ieee, p[i], mul(g[i], s.gs), x, s);
        for (int k = 0; k < Rule::STATES; k++) states[k * n + i] = x[k];
    }
}

// n is a multiple of 4: one word holds four codes.
template <class Codec> void encode(int64_t n, const float* x, float inv, const uint32_t* words, uint32_t* codes) {
    Ieee ieee;
    for (int64_t i = 0; i < n / 4; i++) codes[i] = Codec::encode(ieee, x + 4 * i, inv, Tables<Codec>{words});
}
template <class Codec> void decode(int64_t n, const uint32_t* codes, float scale, const uint32_t* words, float* x) {
    for (int64_t i = 0; i < n; i++) x[i] = Codec::decode(codes[i / 4], (int)(i & 3), scale, Tables<Codec>{words});
}
template <class Codec> void store(int64_t n, const float* x, typename Codec::Code* codes) {
    for (int64_t i = 0; i < n; i++) codes[i] = Codec::encode(x[i]);
}
template <class Codec> void load(int64_t n, const typename Codec::Code* codes, float* x) {
    for (int64_t i = 0; i < n; i++) x[i] = Codec::decode(codes[i]);
}

#define RULE(NAME, ...) \
    void NAME##_step(int64_t n, float* p, const float* g, float* states, const float* row) { step<__VA_ARGS__>(n, p, g, states, row); } \
    int NAME##_scalars() { return sizeof(__VA_ARGS__::Scalars) / sizeof(float); } \
    int NAME##_states() { return __VA_ARGS__::STATES; }
#define BLOCK_CODEC(NAME, ...) \
    void NAME##_encode(int64_t n, const float* x, float inv, const uint32_t* words, uint32_t* codes) { encode<__VA_ARGS__>(n, x, inv, words, codes); } \
    void NAME##_decode(int64_t n, const uint32_t* codes, float scale, const uint32_t* words, float* x) { decode<__VA_ARGS__>(n, codes, scale, words, x); } \
    float NAME##_scale(float absmax) { return __VA_ARGS__::scale(absmax); } \
    uint32_t NAME##_zero() { return __VA_ARGS__::ZERO; }
#define ELEMENT_CODEC(NAME) \
    void NAME##_store(int64_t n, const float* x, NAME::Code* codes) { store<NAME>(n, x, codes); } \
    void NAME##_load(int64_t n, const NAME::Code* codes, float* x) { load<NAME>(n, codes, x); }

extern "C" {
#include "forms.inc"
BLOCK_CODEC(dynamic8_signed, dynamic8<true>)
BLOCK_CODEC(dynamic8_unsigned, dynamic8<false>)
BLOCK_CODEC(int8_linear_signed, int8_linear<true>)
BLOCK_CODEC(int8_linear_unsigned, int8_linear<false>)
ELEMENT_CODEC(f32)
ELEMENT_CODEC(bf16)
void signs(int64_t n, const float* x, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = sgn(x[i]);
}
}
