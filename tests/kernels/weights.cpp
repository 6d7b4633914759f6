// The formats of weights and the counted random bits as a shared library: loops over arrays around refopt_cuda's .cuh files.
#include "kernels/arith.cuh"
#undef HD
#define HD inline
#include "kernels/random.cuh"
#include "codecs/bf16.cuh"
#include "codecs/bf16_ecc.cuh"
#include "codecs/bf16_kahan.cuh"
#include "codecs/bf16_rem16.cuh"
#include "codecs/bf16_sr.cuh"

// Garbage above a rest's own bits must not matter.
template <class F> uint32_t dirty(uint32_t rest) { return F::REST == 0 ? 0xA5A5A5A5u : rest | 0xA5A50000u << (F::REST == 8 ? 0 : 0); }

template <class F> void open(int64_t n, const uint16_t* word, const uint16_t* rest, float* x) {
    for (int64_t i = 0; i < n; i++) x[i] = F::open(word[i], dirty<F>(rest[i]));
}
template <class F> void close(int64_t n, const float* x, const uint16_t* r, uint16_t* word, uint16_t* rest) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t w = word[i], b = dirty<F>(rest[i]);
        F::close(x[i], r[i], w, b);
        word[i] = (uint16_t)w, rest[i] = (uint16_t)(F::REST == 8 ? b & 255 : b);
    }
}

#define WEIGHT(NAME, ...) \
    void NAME##_open(int64_t n, const uint16_t* word, const uint16_t* rest, float* x) { open<__VA_ARGS__>(n, word, rest, x); } \
    void NAME##_close(int64_t n, const float* x, const uint16_t* r, uint16_t* word, uint16_t* rest) { close<__VA_ARGS__>(n, x, r, word, rest); }

extern "C" {
WEIGHT(bf16_sr, bf16_sr)
WEIGHT(bf16_kahan, bf16_kahan)
WEIGHT(bf16_rem16, bf16_rem16)
WEIGHT(bf16_ecc_8, bf16_ecc<8>)
WEIGHT(bf16_ecc_16, bf16_ecc<16>)
void random_bits(int64_t n, uint64_t word, uint32_t tensor, int64_t first, uint16_t* one, uint16_t* eight) {  // n and first: multiples of 8
    uint64_t k = key(word, tensor);
    for (int64_t i = 0; i < n; i += 8) {
        uint32_t r[8];
        r16x8(k, first + i, r);
        for (int j = 0; j < 8; j++) eight[i + j] = (uint16_t)r[j], one[i + j] = (uint16_t)r16(k, first + i + j);
    }
}
}
