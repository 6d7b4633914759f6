// Loads and stores of kernels/access.cuh, and the other instructions that kernels/step.cu and its parts use, on the host.
#include "grid.hpp"
#include <cstdio>
#include <type_traits>

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
static uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
static int __ffs(uint32_t w) { return __builtin_ffs(w); }
static int __clz(uint32_t w) { return w ? __builtin_clz(w) : 32; }

static std::vector<uint64_t> rooms;  // begin and end of all memory that may be read or written, in order
extern "C" void allow(const uint64_t* bounds, int count) { rooms.assign(bounds, bounds + count); }
static void check(const void* at, uint64_t size) {  // as a GPU does, or compute-sanitizer
    const uint64_t from = (uint64_t)at;
    const size_t behind = std::upper_bound(rooms.begin(), rooms.end(), from) - rooms.begin();
    if (from % size || behind % 2 == 0 || from + size > rooms[behind]) std::fprintf(stderr, "%llu bytes at %p\n", (unsigned long long)size, at), std::abort();
}
template <class T> T taken(const void* at) {
    check(at, sizeof(T));
    T v;
    std::memcpy(&v, at, sizeof v);
    return v;
}
template <class T> void given(void* at, T v) {
    check(at, sizeof(T));
    std::memcpy(at, &v, sizeof v);
}
static uint4 take16(const void* at) { return taken<uint4>(at); }
static uint2 take8(const void* at) { return taken<uint2>(at); }
static uint32_t take4(const void* at) { return taken<uint32_t>(at); }
static uint16_t take2(const void* at) { return taken<uint16_t>(at); }
static float take_float(const void* at) { return taken<float>(at); }
static void give16(void* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { given(at, uint4{a, b, c, d}); }
static void give8(void* at, uint2 v) { given(at, v); }
static void give4(void* at, uint32_t v) { given(at, v); }
static void give2(void* at, uint16_t v) { given(at, v); }
static void ask(const void*) {}

struct Core : Ieee {  // the doubts of a GPU's, and the arithmetic of Ieee as long as there are none
    bool doubts = false;
    float sure(bool doubtful, float x) { return doubts |= doubtful, doubts ? -7.0f : x; }
    static float rcp_core(float x) { return divide(1.0f, x); }
    float sqrt(float x) { return sure(!(x < 4.6116860e18f), Ieee::sqrt(x)); }
    float rcp(float x) { return sure(!(x >= 1.17549435e-38f && x < 8.5070592e37f), divide(1.0f, x)); }
    float inverse_root(float x, float scale, float eps) {
        const bool odd = !(eps >= 7.8886091e-31f && eps < 1.0e9f && scale >= 1.0f && scale < 1.0e9f);
        return sure(odd || !(x < 4.6116860e18f), Ieee::inverse_root(x, scale, eps));
    }
    bool doubtful() const { return doubts; }
};

#define __device__
#define __noinline__ __attribute__((noinline))
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n) alignas(n)
