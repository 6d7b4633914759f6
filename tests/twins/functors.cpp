// One optimizer step over the functors of one combination, on the host. functors.py puts the functors in front, with
// RULE, KEPT (a list of State<...>) and, for a format of weights, WEIGHT.
#include <tuple>

struct Kept {  // a state's arrays: blocks k take elements bounds[k] .. bounds[k + 1] and begin at byte starts[k] of the codes
    uint8_t* codes;
    void* scales;
    const int64_t *bounds, *starts;
    int64_t blocks;
    const float* values;
    const uint32_t* words;
    float value(uint32_t word, int k) const { return values[word >> 8 * k & 255]; }
    uint32_t word(uint32_t i) const { return words[i]; }
};

template <class C> struct State {
    static void load(const Kept& s, int64_t n, float* x) {
        if constexpr (C::SCALED) {
            for (int64_t k = 0; k < s.blocks; k++) load_block(s, k, s.bounds[k + 1] - s.bounds[k], x + s.bounds[k]);
        } else {
            for (int64_t i = 0; i < n; i++) x[i] = C::decode(((const typename C::Code*)s.codes)[i]);
        }
    }
    static void store(const Kept& s, int64_t n, const float* x) {
        if constexpr (C::SCALED) {
            for (int64_t k = 0; k < s.blocks; k++) store_block(s, k, s.bounds[k + 1] - s.bounds[k], x + s.bounds[k]);
        } else {
            for (int64_t i = 0; i < n; i++) ((typename C::Code*)s.codes)[i] = C::encode(x[i]);
        }
    }

private:
    static int64_t bytes(const Kept& s, int64_t k, int64_t at) { return std::min<int64_t>(4, s.starts[k + 1] - s.starts[k] - at); }
    static void load_block(const Kept& s, int64_t k, int64_t n, float* x) {
        constexpr int PER = 32 / C::BITS;
        float scale;
        if constexpr (C::SCALE_BITS == 16) scale = C::widen_scale(((uint16_t*)s.scales)[k]);
        else scale = ((float*)s.scales)[k];
        for (int64_t i = 0; i < n; i++) {
            uint32_t word = 0;
            std::memcpy(&word, s.codes + s.starts[k] + i / PER * 4, bytes(s, k, i / PER * 4));
            x[i] = C::decode(word, (int)(i % PER), scale, s);
        }
    }
    static void store_block(const Kept& s, int64_t k, int64_t n, const float* x) {
        constexpr int PER = 32 / C::BITS;
        Ieee ieee;
        uint32_t largest = 0;
        for (int64_t i = 0; i < n; i++) largest = std::max(largest, bits(x[i]) & 0x7FFFFFFFu);
        bool finite = largest < 0x7F800000u;
        float scale = !finite ? real(0x7FC00000u) : largest < bits(0x1p-100f) ? 0.0f : C::scale(real(largest));
        bool coded = finite && scale != 0.0f;
        float inv = coded ? divide(1.0f, C::FACTOR_OF_SCALE ? scale : real(largest)) : 0.0f;
        for (int64_t i = 0; i < n; i += PER) {
            float some[PER] = {};
            std::copy(x + i, x + std::min(n, i + PER), some);
            uint32_t word = coded ? C::encode(ieee, some, inv, s) : C::ZERO;
            std::memcpy(s.codes + s.starts[k] + i / PER * 4, &word, bytes(s, k, i / PER * 4));
        }
        if constexpr (C::SCALE_BITS == 16) ((uint16_t*)s.scales)[k] = C::narrow_scale(scale);
        else ((float*)s.scales)[k] = scale;
    }
};

template <class... S> void load(std::tuple<S...>, const Kept* s, int64_t n, float* x) {
    int k = 0;
    ((S::load(s[k], n, x + k * n), k++), ...);
}
template <class... S> void store(std::tuple<S...>, const Kept* s, int64_t n, const float* x) {
    int k = 0;
    ((S::store(s[k], n, x + k * n), k++), ...);
}

// p and g are float32; x has room for a plane of n floats a state
extern "C" void step(int64_t n, float* p, const float* g, const Kept* kept, float* x, const float* row) {
    constexpr int COUNT = RULE::STATES > 0 ? RULE::STATES : 1;
    RULE::Scalars s;
    std::memcpy(&s, row, sizeof s);
    Ieee ieee;
    load(KEPT(), kept, n, x);
    for (int64_t i = 0; i < n; i++) {
        float mine[COUNT] = {};
        for (int k = 0; k < RULE::STATES; k++) mine[k] = x[k * n + i];
        RULE::update(ieee, p[i], mul(g[i], s.gs), mine, s);
        for (int k = 0; k < RULE::STATES; k++) x[k * n + i] = mine[k];
    }
    store(KEPT(), kept, n, x);
}

#ifdef WEIGHT
template <class T> void open_all(int64_t n, const uint16_t* words, const T* rest, float* x) {
    for (int64_t i = 0; i < n; i++) x[i] = WEIGHT::open(words[i], WEIGHT::REST ? rest[i] : 0);
}
template <class T> void close_all(int64_t n, const float* x, uint16_t* words, T* rest, uint64_t step_word, uint32_t tensor) {
    uint64_t drawn = key(step_word, tensor);
    for (int64_t i = 0; i < n; i++) {
        uint32_t word = words[i], beside = WEIGHT::REST ? rest[i] : 0;
        WEIGHT::close(x[i], WEIGHT::RANDOM ? r16(drawn, i) : 0, word, beside);
        words[i] = (uint16_t)word;
        if (WEIGHT::REST) rest[i] = (T)beside;
    }
}
typedef std::conditional_t<WEIGHT::REST == 8, uint8_t, uint16_t> Rest;
extern "C" void open_weights(int64_t n, const uint16_t* words, const Rest* rest, float* x) { open_all(n, words, rest, x); }
extern "C" void close_weights(int64_t n, const float* x, uint16_t* words, Rest* rest, uint64_t step_word, uint32_t tensor) {
    close_all(n, x, words, rest, step_word, tensor);
}
#endif
