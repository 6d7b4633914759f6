// nf4.cu on the host: a thread of the CPU for each thread of a block, block after block. The loads and stores of
// formats.cuh, which are PTX, are plain here.
#include <barrier>
#include <cstring>
#include <thread>
#include <vector>
#include "kernels/arith.cuh"
#undef HD
#define HD inline
#include "codecs/bf16.cuh"

struct Place { uint32_t x; };
thread_local Place threadIdx, blockIdx;
std::barrier<>* all;
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() all->arrive_and_wait()

inline uint32_t take4(const void* at) {
    uint32_t v;
    std::memcpy(&v, at, 4);
    return v;
}
template <class Word, Word (*NARROW)(float)> struct format {
    static void one(char* at, int64_t i, float x) { ((Word*)at)[i] = NARROW(x); }
    static void put(char* at, uint32_t t, const float (&x)[8]) { for (int e = 0; e < 8; e++) one(at, (int64_t)t * 8 + e, x[e]); }
};
inline float same(float x) { return x; }
typedef format<float, same> float32;
typedef format<uint16_t, bf16::encode> bfloat16;

#include "defines.inc"
#include "kernels/nf4.cu"

extern "C" void decode(uint32_t blocks, const char* codes, const char* scales, const float* scales2, const float* offset,
                       const float* tables, char* out, uint64_t n) {
    for (uint32_t b = 0; b < blocks; b++) {
        std::barrier<> barrier(256);
        all = &barrier;
        std::vector<std::thread> threads;
        for (uint32_t k = 0; k < 256; k++)
            threads.emplace_back([=] {
                threadIdx = {k}, blockIdx = {b};
                nf4_decode(codes, scales, scales2, offset, tables, out, n);
            });
        for (auto& thread : threads) thread.join();
    }
}
