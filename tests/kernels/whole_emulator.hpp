// A CUDA grid on the host: every thread of a block is a fiber, blocks run one after another. Enough of CUDA for
// kernels/whole.cu, whose text follows this one.
#include <algorithm>
#include <functional>
#include <csetjmp>
#include <memory>
#include <ucontext.h>
#include <vector>

using std::min;
struct Index { unsigned x; };
static thread_local Index threadIdx, blockIdx, gridDim, blockDim;

struct Grid {  // the block that runs, and its fibers
    static constexpr int THREADS = 256, STACK = 1 << 16;
    struct Barrier { int arrived = 0; unsigned generation = 0; };
    ucontext_t fibers[THREADS];
    jmp_buf back, marks[THREADS];
    std::unique_ptr<char[]> stacks{new char[(size_t)THREADS * STACK]};
    bool begun[THREADS], done[THREADS];
    Barrier block, warps[THREADS / 32];
    uint64_t slots[THREADS];
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
        blockIdx.x = number, gridDim.x = blocks, blockDim.x = THREADS;
        for (int k = 0; k < THREADS; k++) {
            begun[k] = done[k] = false;
            getcontext(&fibers[k]);
            fibers[k].uc_stack.ss_sp = stacks.get() + (size_t)k * STACK, fibers[k].uc_stack.ss_size = STACK;
            fibers[k].uc_link = nullptr;
            makecontext(&fibers[k], begin, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (int k = 0; k < THREADS; k++) {
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
template <class T> T __shfl_down_sync(uint32_t, T x, int by) {
    const unsigned lane = threadIdx.x & 31;
    return exchanged(x, lane + by < 32 ? lane + by : lane);
}
template <class T> T __shfl_sync(uint32_t, T x, int from) { return exchanged(x, (unsigned)from); }
static void __syncthreads() { Grid::it().wait(Grid::it().block, Grid::THREADS); }

#define __shared__ static
#define __align__(n) alignas(n)
#define ENTRY(kind, pass, blocks)                                               \
    extern "C" void kind##pass(const Args* a, unsigned grid) {                  \
        Grid::it().body = [a] { PASS(kind, pass, (*a)) };                       \
        for (unsigned x = 0; x < grid; x++) Grid::it().run(x, grid);            \
    }

// Number formats: as kernels/formats.cuh has them, without instructions of a GPU.
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
