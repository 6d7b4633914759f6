// The arithmetic that every functor uses: IEEE float32, rounded to nearest even, one rounding an operation.
// On a GPU each is one PTX instruction by name, because the intrinsics obey flags: CuPy compiles everything with
// -ftz=true, which flushes subnormals in __fmul_rn as well. Elsewhere plain C++ (built with -ffp-contract=off), so
// that the same functors run, and are compared with NumPy, without a GPU.
#pragma once

#ifdef __CUDACC_RTC__
#define HD __device__ __forceinline__
typedef unsigned int uint32_t;
typedef unsigned short uint16_t;
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
HD float mul(float a, float b) { float r; asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
HD float add(float a, float b) { float r; asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
HD float sub(float a, float b) { float r; asm("sub.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
HD float divide(float a, float b) { float r; asm("div.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
HD float fused_add(float a, float b, float c) { float r; asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c)); return r; }
HD float fused_sub(float a, float b, float c) {  // c - a b
    float r;
    asm("{.reg .f32 n; neg.f32 n, %1; fma.rn.f32 %0, n, %2, %3;}" : "=f"(r) : "f"(a), "f"(b), "f"(c));
    return r;
}
HD float ieee_sqrt(float x) { float r; asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
HD float larger(float a, float b) { float r; asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
HD float magnitude(float x) { float r; asm("abs.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
HD float smaller(float a, float b) { float r; asm("min.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
HD double widened(float x) { double r; asm("cvt.f64.f32 %0, %1;" : "=d"(r) : "f"(x)); return r; }
HD float rounded(double x) { float r; asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(x)); return r; }
HD double add64(double a, double b) { double r; asm("add.rn.f64 %0, %1, %2;" : "=d"(r) : "d"(a), "d"(b)); return r; }
HD double sub64(double a, double b) { double r; asm("sub.rn.f64 %0, %1, %2;" : "=d"(r) : "d"(a), "d"(b)); return r; }
HD double mul64(double a, double b) { double r; asm("mul.rn.f64 %0, %1, %2;" : "=d"(r) : "d"(a), "d"(b)); return r; }
HD double div64(double a, double b) { double r; asm("div.rn.f64 %0, %1, %2;" : "=d"(r) : "d"(a), "d"(b)); return r; }
HD double sqrt64(double x) { double r; asm("sqrt.rn.f64 %0, %1;" : "=d"(r) : "d"(x)); return r; }
HD double add_square64(double sum, double x) { double r; asm("fma.rn.f64 %0, %1, %1, %2;" : "=d"(r) : "d"(x), "d"(sum)); return r; }
HD uint32_t bits(float x) { return __float_as_uint(x); }
HD float real(uint32_t w) { return __uint_as_float(w); }
HD uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t pick) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(pick));
    return r;
}
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define HD static inline
HD float mul(float a, float b) { return a * b; }
HD float add(float a, float b) { return a + b; }
HD float sub(float a, float b) { return a - b; }
HD float divide(float a, float b) { return a / b; }
HD uint32_t bits(float x) { uint32_t w; std::memcpy(&w, &x, 4); return w; }
HD float real(uint32_t w) { float x; std::memcpy(&x, &w, 4); return x; }
HD uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t pick) {  // PTX prmt: four nibbles, bit 3 replicates the sign
    uint64_t pool = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t nibble = pick >> 4 * i & 15, byte = pool >> 8 * (nibble & 7) & 255;
        r |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return r;
}
HD float ieee_sqrt(float x) { return std::sqrt(x); }
HD float larger(float a, float b) { return a > b ? a : b; }
HD float magnitude(float x) { return std::fabs(x); }
HD float smaller(float a, float b) { return a < b ? a : b; }
HD double widened(float x) { return x; }
HD float rounded(double x) { return (float)x; }
HD double add64(double a, double b) { return a + b; }
HD double sub64(double a, double b) { return a - b; }
HD double mul64(double a, double b) { return a * b; }
HD double div64(double a, double b) { return a / b; }
HD double sqrt64(double x) { return std::sqrt(x); }
HD double add_square64(double sum, double x) { return sum + x * x; }  // the square of a float32 is exact
#endif

HD float sgn(float x) {  // on words: a float comparison would see a subnormal as 0 under a flush-to-zero flag
    uint32_t w = bits(x), twice = w << 1;
    return twice == 0 || twice > 0xFF000000u ? 0.0f : real(w & 0x80000000u | 0x3F800000u);
}
HD bool is_nan(float x) { return x != x; }
HD float maximum(float a, float b) { return is_nan(a) ? a : is_nan(b) ? b : larger(a, b); }
HD float minimum(float a, float b) { return is_nan(a) ? a : is_nan(b) ? b : smaller(a, b); }
HD double maximum64(double a, double b) { return a != a || a > b ? a : b; }  // NaN if either is

// Scalars of a step that are computed where it runs: base^t by binary powering, and flags.
HD double ipow(double base, uint64_t t) {
    double power = 1.0;
    for (; t; t >>= 1) {
        if (t & 1) power = mul64(power, base);
        base = mul64(base, base);
    }
    return power;
}
HD double power64(double base, double exponent) { return pow(base, exponent); }  // as near as the library comes
HD double infinity64() { return div64(1.0, 0.0); }
HD bool given(double x) { return x == x; }  // a hyper-parameter that is left out is NaN
HD float flag(bool on) { return on ? 1.0f : 0.0f; }
HD float nonzero(float x) { return flag(bits(x) << 1); }  // on words: a subnormal is not 0 under any flag

// The dear operations, as the rules call them. `inverse_root` is 1 / (sqrt(x) * scale + eps), three roundings and one.
struct Ieee {
    HD float sqrt(float x) { return ieee_sqrt(x); }
    HD float rcp(float x) { return divide(1.0f, x); }
    HD float inverse_root(float x, float scale, float eps) { return rcp(add(mul(sqrt(x), scale), eps)); }
};

// What the choices of a rule's options are called (refopt_cuda/rules), and where its eps goes: 1 over the root of z.
enum { BEFORE, AFTER, ADDITIVE, COUPLED, DECOUPLED, OUTSIDE, UNCORRECTED, INSIDE, PAPER, OPTAX, CLIP };
template <int EPS_AT, class A> HD float over_root(A& a, float z, float scale, float eps) {
    if (EPS_AT == UNCORRECTED) return a.rcp(mul(add(a.sqrt(z), eps), scale));
    if (EPS_AT == INSIDE) return a.rcp(mul(a.sqrt(add(z, eps)), scale));
    return a.inverse_root(z, scale, eps);
}

#ifdef __CUDACC_RTC__
// The fast cores of the same operations: one approximation and its correction, correctly rounded wherever argument
// and result are normal numbers (tests/kernels/test_cores.py proves it on a device over all inputs that are not
// negative). The range is not tested at each call: `doubtful` says once, for all calls since the object was made,
// whether any argument left it, and the caller computes again with Ieee.
struct Core {
    float high = 0.0f;
    bool odd = false;
    HD static float rcp_core(float x) {  // 2^-126 <= x < 2^126
        float r;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
        return fused_add(r, fused_sub(x, r, 1.0f), r);
    }
    HD static float scaled_root(float x) {  // 2^32 sqrt(x) for x < 2^62: the scale keeps every residual normal
        float r, y = mul(x, 1.8446744e19f);
        asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(add(y, 1.17549435e-38f)));  // + 2^-126: only 0 feels it
        float s = mul(y, r), h = mul(0.5f, r);
        return fused_add(fused_sub(s, s, y), h, s);
    }
    HD float sqrt(float x) {
        high = larger(high, x);
        return mul(scaled_root(x), 2.3283064e-10f);
    }
    HD float rcp(float x) {
        odd |= !(x >= 1.17549435e-38f && x < 8.5070592e37f);  // 2^-126 .. 2^126
        return rcp_core(x);
    }
    HD float inverse_root(float x, float scale, float eps) {  // the sum lies between eps and 2^31 scale + eps
        high = larger(high, x);
        odd |= !(eps >= 7.8886091e-31f && eps < 1.0e9f && scale >= 1.0f && scale < 1.0e9f);
        return rcp_core(add(mul(scaled_root(x), mul(scale, 2.3283064e-10f)), eps));
    }
    HD bool doubtful() const { return odd || !(high < 4.6116860e18f); }  // 2^62
};
#endif
