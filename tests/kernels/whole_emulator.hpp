// Number formats as kernels/formats.cuh has them, without instructions of a GPU, and the entries of kernels/whole.cu, whose
// text follows this one.
#include "grid.hpp"
using std::min;

#define __shared__ static
#define __align__(n) alignas(n)
#define ENTRY(kind, pass, blocks)                                               \
    extern "C" void kind##pass(const Args* a, unsigned grid) {                  \
        Grid::it().body = [a] { PASS(kind, pass, (*a)) };                       \
        for (unsigned x = 0; x < grid; x++) Grid::it().run(x, grid);            \
    }

template <class T> struct Number {
    static constexpr uint32_t BYTES = sizeof(typename T::Word);
    struct Raw { typename T::Word w[8]; };
    static void load(const char* at, uint32_t t, Raw& r) {
        if ((uint64_t)at & 15) std::abort();  // a GPU would refuse it
        std::memcpy(r.w, at + (uint64_t)t * 8 * BYTES, sizeof r.w);
    }
    static void get(const Raw& r, float (&x)[8]) {
        for (int e = 0; e < 8; e++) x[e] = T::widen(r.w[e]);
    }
    static void put(char* at, uint32_t t, const float (&x)[8]) {
        if ((uint64_t)at & 15) std::abort();
        for (int e = 0; e < 8; e++) one(at, (int64_t)t * 8 + e, x[e]);
    }
    static float one(const char* at, int64_t i) {
        typename T::Word w;
        std::memcpy(&w, at + i * BYTES, BYTES);
        return T::widen(w);
    }
    static void one(char* at, int64_t i, float x) { ((typename T::Word*)at)[i] = T::narrow(x); }
};
struct Words32 {
    typedef uint32_t Word;
    static float widen(Word w) { return real(w); }
    static Word narrow(float x) { return bits(x); }
};
struct Brains {
    typedef uint16_t Word;
    static float widen(Word w) { return real((uint32_t)w << 16); }
    static Word narrow(float x) { return bf16::encode(x); }
};
struct Halves {
    typedef uint16_t Word;
    static float widen(Word w) { _Float16 h; std::memcpy(&h, &w, 2); return (float)h; }
    static Word narrow(float x) { _Float16 h = (_Float16)x; Word w; std::memcpy(&w, &h, 2); return w; }
};
typedef Number<Words32> float32;
typedef Number<Brains> bfloat16;
typedef Number<Halves> float16;
