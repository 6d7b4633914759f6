// Loops over arrays around the functors of block codecs. codec_functors.py puts those in front, and below a CODEC for
// each form; the same text is a shared library for the host and, under NVRTC, kernels for a GPU.
#ifdef __CUDACC_RTC__
#define ENTRY extern "C" __global__ void
#define EACH(i, n) (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
#else
#define ENTRY extern "C" void
#define EACH(i, n) (int64_t i = 0; i < n; i++)
#endif

template <class C> struct Tables {  // a wrong index shows: it gives what no table holds
    const float* values;
    const uint32_t* words;
    HD float value(uint32_t word, int k) const {
        uint32_t row = word >> 8 * k & 255;
        return row < C::ROWS ? values[row] : 12345.0f;
    }
    HD uint32_t word(uint32_t i) const { return i < C::WORDS ? words[i] : 0xDEADBEEFu; }
};

template <class C> HD uint32_t encoded(const float* x, float inv, const Tables<C>& t) {
    Ieee ieee;
#ifdef __CUDACC_RTC__
    Core core;
    uint32_t w = C::encode(core, x, inv, t);
    if (!core.doubtful()) return w;
#endif
    return C::encode(ieee, x, inv, t);
}
template <class C> HD uint32_t narrowed(float s) {
    if constexpr (C::SCALE_BITS == 16) return C::narrow_scale(s);
    return 0;
}
template <class C> HD float widened(uint32_t w) {
    if constexpr (C::SCALE_BITS == 16) return C::widen_scale((uint16_t)w);
    return 0.0f;
}

// n counts words of codes; inv and scale are one a word
#define CODEC(NAME, ...) \
    ENTRY NAME##_encode(int64_t n, const float* x, const float* inv, const float* values, const uint32_t* words, uint32_t* codes) { \
        constexpr int PER = 32 / __VA_ARGS__::BITS; \
        Tables<__VA_ARGS__> t = {values, words}; \
        for EACH(i, n) codes[i] = encoded<__VA_ARGS__>(x + PER * i, inv[i], t); \
    } \
    ENTRY NAME##_decode(int64_t n, const uint32_t* codes, const float* scale, const float* values, const uint32_t* words, float* x) { \
        constexpr int PER = 32 / __VA_ARGS__::BITS; \
        Tables<__VA_ARGS__> t = {values, words}; \
        for EACH(i, n) \
            for (int k = 0; k < PER; k++) x[PER * i + k] = __VA_ARGS__::decode(codes[i], k, scale[i], t); \
    } \
    ENTRY NAME##_scale(int64_t n, const float* amax, float* scale) { for EACH(i, n) scale[i] = __VA_ARGS__::scale(amax[i]); } \
    ENTRY NAME##_narrow(int64_t n, const float* s, uint32_t* w) { for EACH(i, n) w[i] = narrowed<__VA_ARGS__>(s[i]); } \
    ENTRY NAME##_widen(int64_t n, const uint32_t* w, float* s) { for EACH(i, n) s[i] = widened<__VA_ARGS__>(w[i]); } \
    ENTRY NAME##_constants(uint32_t* out) { \
        out[0] = __VA_ARGS__::BITS, out[1] = __VA_ARGS__::ZERO, out[2] = __VA_ARGS__::ROWS, out[3] = __VA_ARGS__::WORDS; \
        out[4] = __VA_ARGS__::SCALE_BITS, out[5] = __VA_ARGS__::FACTOR_OF_SCALE, out[6] = __VA_ARGS__::SCALED; \
    }
