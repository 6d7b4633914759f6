// What the tiles of step.cu and those of step_ragged.cuh share: the table of tensors and the arguments, what a warp knows
// of its work, the step of eight elements a lane, and that of one element at a time.

constexpr int STATES = RULE::STATES, KEPT = STATES > 0 ? STATES : 1;
constexpr uint32_t UNIT = 8, ALONE = GROUP == 1;
typedef RULE::Scalars Scalars;
typedef Load<CODECS> States;

struct __align__(16) Tensor {  // static: rebuilt only where a pointer changed
    uint32_t first, whole;     // first unit in the joint list; tiles before `whole` lie at TILE times their number
    uint32_t per, aligned;     // tiles a row where each row begins with one, else 0; rows are in eights at addresses of 16 bytes: 1, EASY: 2, RAGGED: 4
    Lair at;
    int64_t row, n;            // elements a row of the block layout, and in all
    uint32_t tiles, number;    // number: the tensor's, for random bits
    uint32_t piece, blank;     // tiles a piece: UNIT / GROUP of them make a unit
    int64_t start, unused;     // of its first element in the tensor that it is a piece of, for random bits
    Slot states[KEPT];
};
struct Args {
    const Tensor* tensors;  // one more than there are: the last only ends the list
    const uint32_t* tables;
    uint32_t units, count;
#if LIVE
    const struct Live* live;
#else
    float scalars[ROWS][16];
    uint64_t random[ROWS];         // the step's word of random bits
#endif
    unsigned char which[TENSORS];  // row of scalars a tensor
    const char* g[TENSORS];        // 1: skip
};

#if LIVE
struct Live { float scalars[16]; uint64_t random, skip; };
__shared__ Live live[ROWS];
HD bool skipped(const Args& a) {  // by the whole block
    for (uint32_t i = threadIdx.x; i < sizeof(live) / 4; i += THREADS) ((uint32_t*)live)[i] = ((const uint32_t*)a.live)[i];
    __syncthreads();
    return live[0].skip;
}
#define SCALARS(a, row) live[row].scalars
#define RANDOM_WORD(a, row) live[row].random
#else
#define SCALARS(a, row) a.scalars[row]
#define RANDOM_WORD(a, row) a.random[row]
#endif

// Where registers are left the tensor's entry is kept in them.
template <bool CODED> struct Viewed { typedef const Tensor& type; };
template <> struct Viewed<false> { typedef const Tensor type; };
typedef Viewed<AHEAD>::type View;

struct Task {  // what a warp knows of its work
    const Args& a;
    uint32_t k, lane;
    const char* g;
    const Scalars& s;
    Shared shared;
    uint64_t key;
    HD static uint32_t row(const Args& a, uint32_t k) { return ROWS == 1 ? 0 : a.which[k]; }
    HD Task(const Args& a, uint32_t k, const Tensor& t, const Shared& shared)
        : a(a), k(k), lane(shared.lane4 >> 2), g(a.g[k]), s(*(const Scalars*)SCALARS(a, row(a, k))), shared(shared),
          key(WEIGHT::RANDOM ? ::key(RANDOM_WORD(a, row(a, k)), t.number) + (t.start >> 2) : 0) {}
};

// Blocks of any length and alignment, in order: a first pass over those that begin finds their magnitudes, a second
// repeats the step with the same bits and stores it. A scale is stored when its block has ended.
__device__ __noinline__ void by_element(const Args& a, uint32_t k, const Span at, const char* shared) {
    const Tensor& t = a.tensors[k];
    const Task task(a, k, t, {shared, (threadIdx.x & 31) * 4});
    const uint32_t step = States::least(t.states, at.length);
    Measure m[KEPT] = {};
    Ieee ieee;
    for (uint32_t o = 0; o < at.length; o += step) {
        uint32_t magnitude[KEPT] = {}, seen = min(States::reach(t.states, o), at.length - o), end = min(o + step, at.length);
        for (uint32_t i = o + task.lane; i < o + seen; i += 32) {
            int64_t e = at.row * t.row + at.within + i;
            float x[KEPT] = {}, p = WEIGHT::one(t.at, e), g = mul(GRAD::one(task.g, e), task.s.gs);
            if (READS) States::one(t.states, at.row, at.within + i, t.row, x, task.shared);
            RULE::update(ieee, p, g, x, task.s);
            States::grow(t.states, o, i, x, magnitude);
        }
        __syncwarp();
        States::settle(t.states, o, magnitude, m);
        for (uint32_t i = o + 2 * task.lane; i < end; i += 64) {
            float x[2][KEPT] = {};
            bool both = i + 1 < end;
            for (uint32_t h = 0; h < 1 + both; h++) {
                int64_t e = at.row * t.row + at.within + i + h;
                float p = WEIGHT::one(t.at, e), g = mul(GRAD::one(task.g, e), task.s.gs);
                if (READS) States::one(t.states, at.row, at.within + i + h, t.row, x[h], task.shared);
                RULE::update(ieee, p, g, x[h], task.s);
                WEIGHT::one(t.at, e, p, WEIGHT::RANDOM ? r16(task.key, e + (t.start & 3)) : 0);
            }
            if (WRITES) States::two(t.states, at.row, at.within + i, t.row, x[0], x[1], both, m, task.shared);
        }
        __syncwarp();
        if (WRITES && task.lane == 0) States::give(t.states, at.row, at.within, o, step, end == at.length, m);
        __syncwarp();
    }
}

// The lines of a tile that this warp takes next, asked into the second-level cache while it computes: lane by lane,
// first p's, then g's, then the codes'. One instruction a tile; what a lane asks for changes only with the tensor.
struct Ahead {
    const char* at;
    uint32_t stride;  // bytes of eight elements
    HD static bool claim(const char* base, uint32_t lines, uint32_t& lane, Ahead& ahead) {
        if (lane < lines) {
            ahead.at = base + lane * 128, ahead.stride = lines * 4;
            return true;
        }
        lane -= lines;
        return false;
    }
    HD Ahead(const Task& task, const Tensor& t) : at(0), stride(0) {
        uint32_t lane = task.lane;
        const Lair& p = t.at;
        if (!claim(p.p, 2 * WEIGHT::BYTES, lane, *this) && !claim(task.g, 2 * GRAD::BYTES, lane, *this) &&
            !claim(p.rest, 2 * WEIGHT::REST, lane, *this))
            if (READS) States::claim(t.states, lane, *this);
    }
    HD void ask(uint32_t eight, uint32_t end) const {  // from that eight of elements on
        if (stride && eight < end) ::ask(at + (uint64_t)eight * stride);
    }
};

// The step of eight elements a lane that have been loaded. True where Core may be wrong about one of them.
HD bool advance(const Task& task, const WEIGHT::Raw& p, const GRAD::Raw& g, const States& states, float (&w)[8], float (&x)[KEPT][8]) {
    float d[8];
    GRAD::get(g, d), WEIGHT::get(p, w);
    if (READS) states.get(x, task.shared);
    if (task.s.gs != 1.0f) {
#pragma unroll
        for (int e = 0; e < 8; e++) d[e] = mul(d[e], task.s.gs);
    }
    Core core;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        float y[KEPT];
#pragma unroll
        for (int n = 0; n < STATES; n++) y[n] = x[n][e];
        RULE::update(core, w[e], d[e], y, task.s);
#pragma unroll
        for (int n = 0; n < STATES; n++) x[n][e] = y[n];
    }
    return core.doubtful();
}
