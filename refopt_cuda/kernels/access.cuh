// Loads and stores of global memory, which an emulator may replace: 16, 8, 4 or 2 bytes, read once and written once;
// volatile, so that all loads of a block stay in front.

static HD uint4 take16(const void* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}
static HD uint2 take8(const void* at) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
    return v;
}
static HD uint32_t take4(const void* at) {
    uint32_t v;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}
#ifndef GIVE
#define GIVE "st.global"
#endif
static HD void give16(void* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile(GIVE ".v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
static HD void give8(void* at, uint2 v) { asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(v.x), "r"(v.y) : "memory"); }
static HD void give4(void* at, uint32_t v) { asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory"); }
static HD uint16_t take2(const void* at) {
    uint16_t v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(at));
    return v;
}
static HD float take_float(const void* at) {  // of those that many lanes read
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(at));
    return v;
}
static HD void give2(void* at, uint16_t v) { asm volatile("st.global.u16 [%0], %1;" ::"l"(at), "h"(v) : "memory"); }
static HD void ask(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }  // into the second-level cache
