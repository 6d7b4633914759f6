// One optimizer step over many tensors in one launch: decode, rule, encode, in one pass through memory.
//
// build.py defines, in front of this text: RULE (functor: a rule with its options chosen), CODECS (codec functors of its states, in order), PARAM and
// GRAD (number formats), BLOCK (elements that share a scale), THREADS, TENSORS and ROWS
// (most tensors, and different rows of scalars, a launch), LOOKUPS (whether a codec reads the dynamic map's tables)
// and AHEAD (whether the next block is asked into the second-level cache).
//
// A warp takes a unit of eight neighbouring blocks at a time, every warp of a persistent grid in turn, and what is left
// over block by block. The scales of a unit lie in one 32-byte sector, which is read and written whole: eight warps that
// each write four bytes of it cost a tenth of the bandwidth. Eight neighbouring elements a lane, 16-byte loads; the other
// warps of the multiprocessor compute while one waits. Blocks that are not aligned take `by_element`, the same functors
// one element at a time.

constexpr int STATES = RULE::STATES, KEPT = STATES > 0 ? STATES : 1;
constexpr uint32_t UNIT = 8;
typedef RULE::Scalars Scalars;

struct __align__(16) Tensor {  // static: rebuilt only where a pointer changed
    uint32_t first, whole;     // first unit in the joint list; blocks before `whole` lie at BLOCK times their number
    uint32_t per, aligned;     // blocks a row, 0 where all but the last are whole; whether 16-byte accesses are allowed
    char* p;
    int64_t row;               // elements a row of the block layout
    Slot states[KEPT];
    int64_t n;
    uint32_t blocks, unused;
};
struct Args {
    const Tensor* tensors;  // one more than there are: the last only ends the list
    const float* values;    // tables of the dynamic map: 256 signed, 256 unsigned values, then the buckets
    uint32_t units, count;
    float scalars[ROWS][16];
    unsigned char which[TENSORS];  // row of scalars a tensor
    const char* g[TENSORS];        // 1: skip
};

struct Span {  // one block of a tensor: number, first element, length
    uint32_t block, length;
    int64_t offset;
    HD Span(const Tensor& t, uint32_t b) : block(b) {
        if (t.per == 0) {  // rows are whole blocks: the tensor is one row
            offset = (int64_t)block * BLOCK;
            length = (uint32_t)min((int64_t)BLOCK, t.n - offset);
        } else {
            uint32_t r = block / t.per, c = (block - r * t.per) * BLOCK;
            offset = r * t.row + c;
            length = (uint32_t)min((int64_t)BLOCK, t.row - c);
        }
    }
};

// Two passes over a block of any length and alignment: the first finds the magnitudes, the second repeats the step
// with the same bits and stores it.
__device__ __noinline__ void by_element(const Args& a, uint32_t k, uint32_t b, const char* values, const uint32_t* buckets) {
    const Tensor& t = a.tensors[k];
    const Scalars s = *(const Scalars*)a.scalars[ROWS == 1 ? 0 : a.which[k]];
    const Span at(t, b);
    uint32_t lane = threadIdx.x & 31, magnitude[KEPT] = {};
    Tables tables = {values, buckets, lane * 4};
    Measure m[KEPT] = {};
    Ieee ieee;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t i = lane; i < at.length; i += 32) {
            int64_t e = at.offset + i;
            float x[KEPT] = {}, p = PARAM::one(t.p, e), g = mul(GRAD::one(a.g[k], e), s.gs);
            States::one(t.states, e, at.block, x, tables);
            RULE::update(ieee, p, g, x, s);
            if (pass == 0) {
                States::grow(magnitude, x);
            } else {
                PARAM::one(t.p, e, p);
                States::write(t.states, e, x, m, tables);
            }
        }
        __syncwarp();
        States::settle(t.states, at.block, magnitude, m, pass == 1 && lane == 0);
    }
    __syncwarp();
}

// The lines of a block that this warp takes next, asked into the second-level cache while it computes: lane by lane,
// first p's, then g's, then the codes'. One instruction a block; what a lane asks for changes only with the tensor.
struct Ahead {
    const char* at;
    uint32_t stride;
    HD static bool claim(const char* base, uint32_t lines, uint32_t& lane, Ahead& ahead) {
        if (lane < lines) {
            ahead.at = base + lane * 128, ahead.stride = lines * 128;
            return true;
        }
        lane -= lines;
        return false;
    }
    HD Ahead(const Tensor& t, const char* g, uint32_t lane) : at(0), stride(0) {
        if (!claim(t.p, 2 * PARAM::BYTES, lane, *this) && !claim(g, 2 * GRAD::BYTES, lane, *this))
            States::claim(t.states, lane, *this);
    }
    HD void ask(uint32_t block, uint32_t whole) const {
        if (stride && block < whole) asm volatile("prefetch.global.L2 [%0];" ::"l"(at + (int64_t)block * stride));
    }
};

// Block `block`, number `j` of its unit: lane j holds its scales. Returns whether they are new in memory instead.
HD bool step_block(const Args& a, uint32_t k, const Tensor& t, const char* from, uint32_t block, uint32_t j, float (&scales)[KEPT],
                   const Scalars& s, const Tables& tables) {
    uint32_t lane = tables.lane4 >> 2, i = block * 32 + lane;
    bool inside = true;
    if (BLOCK != 256 || block >= t.whole || ((uint64_t)from & 15)) {
        const Span at(t, block);
        if (BLOCK != 256 || !t.aligned || ((uint64_t)from & 15) || (((uint32_t)at.offset | at.length) & 7)) {
            by_element(a, k, block, tables.values, tables.buckets);
            return true;
        }
        inside = lane * 8 < at.length;  // lanes beyond a short block repeat its last elements and store nothing
        i = (uint32_t)(at.offset >> 3) + (inside ? lane : at.length / 8 - 1);
    }
    PARAM::Raw p;
    GRAD::Raw g;
    States states;
    GRAD::load(from, i, g), PARAM::load(t.p, i, p), states.load(t.states, i);
    float x[KEPT][8], w[8], d[8];
    GRAD::get(g, d), PARAM::get(p, w), states.get(x, scales, j, tables);
    if (s.gs != 1.0f) {
#pragma unroll
        for (int e = 0; e < 8; e++) d[e] = mul(d[e], s.gs);
    }
    Core core;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        float y[KEPT];
#pragma unroll
        for (int n = 0; n < STATES; n++) y[n] = x[n][e];
        RULE::update(core, w[e], d[e], y, s);
#pragma unroll
        for (int n = 0; n < STATES; n++) x[n][e] = y[n];
    }
    if (__any_sync(0xFFFFFFFFu, core.doubtful())) {
        by_element(a, k, block, tables.values, tables.buckets);
        return true;
    }
    if (inside) PARAM::put(t.p, i, w);
    Measure m[KEPT];
    States::measure(x, m);
    States::put(t.states, i, inside, x, m, lane == j, scales, tables);
    return false;
}

// A warp's next piece of work: `count` blocks of tensor k. Pieces before `full` are units, an equal number for each warp;
// the rest are single blocks.
struct Piece {
    uint32_t k, block, count;
    HD void seek(const Args& a, uint32_t x, uint32_t full) {
        uint32_t u = x < full ? x : full + (x - full) / UNIT, within = x < full ? 0 : (x - full) % UNIT;
        while (u >= a.tensors[k + 1].first) k++;
        const Tensor& t = a.tensors[k];
        block = (u - t.first) * UNIT + within;
        count = a.g[k] == (const char*)1 || block >= t.blocks ? 0 : x < full ? min(UNIT, t.blocks - block) : 1;
    }
};

HD void step_piece(const Args& a, const Piece& piece, uint32_t jump, const Tables& tables) {
    const Tensor& t = a.tensors[piece.k];
    const char* from = a.g[piece.k];
    const Scalars& s = *(const Scalars*)a.scalars[ROWS == 1 ? 0 : a.which[piece.k]];
    const uint32_t lane = tables.lane4 >> 2, whole = t.whole;
    const Ahead ahead(t, from, lane);
    float scales[KEPT] = {};
    States::open(t.states, piece.block + lane, lane < piece.count, scales);
#pragma unroll 1
    for (uint32_t j = 0; j < piece.count; j++) {
        uint32_t block = piece.block + j;
        if (AHEAD) ahead.ask(block + (j + 1 == piece.count ? jump : 1), whole);
        if (step_block(a, piece.k, t, from, block, j, scales, s, tables)) States::open(t.states, block, lane == j, scales);
    }
    States::close(t.states, piece.block + lane, lane < piece.count, scales);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) refopt_step(const __grid_constant__ Args a) {
    extern __shared__ char shared[];
    Tables tables = {shared, (const uint32_t*)(shared + 65536), (threadIdx.x & 31) * 4};
    if (LOOKUPS) {
        for (int i = threadIdx.x; i < 16384; i += THREADS) ((float*)shared)[i] = a.values[(i >> 6) + (i & 32) * 8];
        for (int i = threadIdx.x; i < 2 * BUCKETS; i += THREADS) ((uint32_t*)(shared + 65536))[i] = ((const uint32_t*)a.values)[512 + i];
        __syncthreads();
    }
    const uint32_t warps = gridDim.x * (THREADS / 32);
    const uint32_t full = a.units / warps * warps, pieces = full + (a.units - full) * UNIT;
    Piece piece = {0, 0, 0};
    for (uint32_t x = blockIdx.x * (THREADS / 32) + threadIdx.x / 32; x < pieces; x += warps) {
        piece.seek(a, x, full);
        if (piece.count) step_piece(a, piece, (warps - 1) * UNIT + 1, tables);
    }
}
