// A CUDA grid on the host: every thread of a block is a fiber, blocks run one after another; and what the threads of a warp
// tell each other. Enough of CUDA for kernels/whole.cu and kernels/step.cu.
#pragma once
#include <algorithm>
#include <functional>
#include <csetjmp>
#include <memory>
#include <ucontext.h>
#include <vector>

struct Index { unsigned x; };
static thread_local Index threadIdx, blockIdx, gridDim, blockDim;

struct Grid {  // the block that runs, and its fibers
    static constexpr int LANES = 256, STACK = 1 << 16;
    struct Barrier { int arrived = 0; unsigned generation = 0; };
    ucontext_t fibers[LANES];
    jmp_buf back, marks[LANES];
    std::unique_ptr<char[]> stacks{new char[(size_t)LANES * STACK]};
    bool begun[LANES], done[LANES];
    Barrier block, warps[LANES / 32];
    uint64_t slots[LANES];
    std::function<void()> body;
    int now = 0;
    static Grid& it() {
        static Grid grid;
        return grid;
    }
    static void begin() {
        Grid& g = it();
        g.body();
        g.done[g.now] = true;
        _longjmp(g.back, 1);
    }
    void yield() {  // jumps between stacks: swapcontext would ask the system for the signal mask each time
        if (!_setjmp(marks[threadIdx.x])) _longjmp(back, 1);
    }
    void enter(int k) {
        if (_setjmp(back)) return;
        now = k, threadIdx.x = k;
        if (begun[k]) _longjmp(marks[k], 1);
        begun[k] = true;
        setcontext(&fibers[k]);
    }
    void wait(Barrier& b, int count) {
        const unsigned mine = b.generation;
        if (++b.arrived == count) b.arrived = 0, b.generation++;
        else
            while (b.generation == mine) yield();
    }
    void run(unsigned number, unsigned blocks) {
        blockIdx.x = number, gridDim.x = blocks, blockDim.x = LANES;
        for (int k = 0; k < LANES; k++) {
            begun[k] = done[k] = false;
            getcontext(&fibers[k]);
            fibers[k].uc_stack.ss_sp = stacks.get() + (size_t)k * STACK, fibers[k].uc_stack.ss_size = STACK;
            fibers[k].uc_link = nullptr;
            makecontext(&fibers[k], begin, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (int k = 0; k < LANES; k++) {
                if (done[k]) continue;
                left = true;
                enter(k);
            }
        }
    }
};

template <class T> T exchanged(T x, unsigned from) {  // what lane `from` of this warp gives
    Grid& g = Grid::it();
    const unsigned me = threadIdx.x, warp = me / 32;
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    g.slots[me] = bits;
    g.wait(g.warps[warp], 32);
    const uint64_t other = g.slots[warp * 32 + from];
    g.wait(g.warps[warp], 32);
    std::memcpy(&x, &other, sizeof x);
    return x;
}
template <class F> uint32_t gathered(F f) {  // f(word so far, word of the next lane) over all lanes of this warp
    Grid& g = Grid::it();
    const unsigned warp = threadIdx.x / 32;
    g.wait(g.warps[warp], 32);
    uint32_t w = (uint32_t)g.slots[warp * 32];
    for (unsigned k = 1; k < 32; k++) w = f(w, (uint32_t)g.slots[warp * 32 + k]);
    g.wait(g.warps[warp], 32);
    return w;
}
static uint32_t __ballot_sync(uint32_t, bool x) {
    Grid::it().slots[threadIdx.x] = (uint64_t)x << (threadIdx.x & 31);
    return gathered([](uint32_t a, uint32_t b) { return a | b; });
}
static bool __any_sync(uint32_t, bool x) { return __ballot_sync(0, x) != 0; }
static void __syncwarp() { Grid::it().wait(Grid::it().warps[threadIdx.x / 32], 32); }
template <class T> T __shfl_down_sync(uint32_t, T x, int by) {
    const unsigned lane = threadIdx.x & 31;
    return exchanged(x, lane + by < 32 ? lane + by : lane);
}
template <class T> T __shfl_up_sync(uint32_t, T x, unsigned by) {
    const unsigned lane = threadIdx.x & 31;
    return exchanged(x, lane >= by ? lane - by : lane);
}
template <class T> T __shfl_xor_sync(uint32_t, T x, unsigned by) { return exchanged(x, (threadIdx.x & 31) ^ by); }
template <class T> T __shfl_sync(uint32_t, T x, int from) { return exchanged(x, (unsigned)from); }
static void __syncthreads() { Grid::it().wait(Grid::it().block, Grid::LANES); }
