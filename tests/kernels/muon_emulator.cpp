// muon.cu on the host: a thread of the CPU for each thread of a block, block after block. The loads and stores of
// formats.cuh, which are PTX, are plain here.
#include <algorithm>
#include <barrier>
#include <thread>
#include <vector>
#include "kernels/arith.cuh"
#undef HD
#define HD inline
#include "codecs/bf16.cuh"
#include "kernels/muon.cuh"

using std::min;

struct Place { uint32_t x, y, z; };
thread_local Place threadIdx, blockIdx;
std::barrier<>* all;
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(n)
#define __syncthreads() all->arrive_and_wait()

template <class Word, float (*WIDEN)(Word), Word (*NARROW)(float)> struct format {
    static constexpr uint32_t BYTES = sizeof(Word);
    struct Raw { Word w[8]; };
    static void load(const char* at, uint32_t t, Raw& r) { std::memcpy(&r, at + (uint64_t)t * sizeof r, sizeof r); }
    static void get(const Raw& r, float (&x)[8]) { for (int e = 0; e < 8; e++) x[e] = WIDEN(r.w[e]); }
    static void put(char* at, uint32_t t, const float (&x)[8]) { for (int e = 0; e < 8; e++) one(at, (int64_t)t * 8 + e, x[e]); }
    static float one(const char* at, int64_t i) {
        Word w;
        std::memcpy(&w, at + i * sizeof w, sizeof w);
        return WIDEN(w);
    }
    static void one(char* at, int64_t i, float x) { ((Word*)at)[i] = NARROW(x); }
};
inline float same(float x) { return x; }
typedef format<float, same, same> float32;
typedef format<uint16_t, bf16::decode, bf16::encode> bfloat16;

#include "defines.inc"
#include "kernels/muon.cu"

template <class Run> void launch(Place grid, Run run) {
    for (uint32_t z = 0; z < grid.z; z++)
        for (uint32_t y = 0; y < grid.y; y++)
            for (uint32_t x = 0; x < grid.x; x++) {
                std::barrier<> barrier(THREADS);
                all = &barrier;
                std::vector<std::thread> block;
                for (uint32_t k = 0; k < THREADS; k++)
                    block.emplace_back([=] {
                        threadIdx = {k, 0, 0}, blockIdx = {x, y, z};
                        run();
                    });
                for (auto& thread : block) thread.join();
            }
}

extern "C" void pass(int which, uint32_t parts, uint32_t count, const Args* a) {
    launch({parts, count, 1}, [=] { which == 0 ? muon_momentum(*a) : which == 1 ? muon_input(*a) : muon_apply(*a); });
}
extern "C" void mirror(uint32_t tiles, uint32_t count, char* stack, uint32_t m, float shift) {
    launch({tiles, tiles, count}, [=] { muon_mirror(stack, m, shift); });
}
