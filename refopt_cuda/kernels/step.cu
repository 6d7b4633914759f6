// One optimizer step over many tensors in one launch: decode, rule, encode, in one pass through memory.
//
// build.py defines, in front of this text: RULE (functor: a rule with its options chosen), CODECS (a State for each of its
// states, in order), WEIGHT and GRAD (formats), TILE (elements a warp takes at once: 256, or a block of a size that only
// `by_element` steps), GROUP (tiles that the longest block covers), THREADS, TENSORS and ROWS (most tensors, and
// different rows of scalars, a launch), TABLE (words of the codecs' tables, then where they lie) and AHEAD (whether the
// next tile is asked into the second-level cache), READS and WRITES (whether states are read and written), and LIVE
// (whether scalars lie in memory, where rows.cu has left them, and not in the arguments).
//
// A warp takes a unit of eight neighbouring tiles at a time, every warp of a persistent grid in turn, and what is left
// over group by group. Scales of blocks of 64 elements and more are written when their unit ends: sectors that eight
// warps write four bytes each cost a tenth of the bandwidth. Eight neighbouring elements a lane, 16-byte loads; the
// other warps of the multiprocessor compute while one waits. A block that lies in a tile takes as many lanes as it has
// eights of elements; one that covers several is stepped twice, first for its magnitude alone. Tiles that are not
// aligned take `by_element`, the same functors one element at a time.

constexpr int STATES = RULE::STATES, KEPT = STATES > 0 ? STATES : 1;
constexpr uint32_t UNIT = 8, ALONE = GROUP == 1;
typedef RULE::Scalars Scalars;

struct __align__(16) Tensor {  // static: rebuilt only where a pointer changed
    uint32_t first, whole;     // first unit in the joint list; tiles before `whole` lie at TILE times their number
    uint32_t per, aligned;     // tiles a pack of rows, 0 where the tensor is one row; 16-byte accesses are allowed: 1, and EASY: 2, EVEN: 4
    Lair at;
    int64_t row, n;            // elements a row of the block layout, and in all
    uint32_t pack, full;       // rows whose short last tiles are taken together; whole tiles a row
    uint32_t tiles, number;    // number: the tensor's, for random bits
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

// A tile of a tensor. Rows that are not whole blocks come in packs: first the whole tiles of each, then one tile of what
// is left over of all.
struct Place {
    uint32_t row, column;
    bool ends;  // a tile of rows' ends
    HD explicit Place(uint32_t tile) : row(0), column(tile), ends(false) {}
    HD Place(const Tensor& t, uint32_t tile) : row(0), column(tile), ends(false) {
        if (t.per == 0) return;
        uint32_t pack = tile / t.per, within = tile - pack * t.per;
        row = pack * t.pack, column = within, ends = ALONE && within >= t.pack * t.full;
        if (ends) column = t.full;
        else if (t.pack > 1) row += within / t.full, column = within % t.full;
    }
    HD Where where(uint32_t lane) const { return {column * 32 + lane, 0, column * 32 + lane, 0, 31, true}; }
    HD uint32_t eight(const Tensor& t) const { return (uint32_t)((row * t.row) >> 3) + column * (TILE / 8); }  // its first eight elements
    HD Span span(const Tensor& t, uint32_t tiles) const {
        int64_t within = (int64_t)column * TILE, columns = t.per ? t.row : t.n;
        bool there = within < columns && row * columns < t.n;
        return {row, within, there ? (uint32_t)min((int64_t)tiles * TILE, columns - within) : 0};
    }
};

// A tile of rows that each end with a shorter tile of as many blocks: scales lie as if all tiles were whole.
struct Even {
    uint32_t tile, column, start, eights;  // its number, in its row; its first eight elements, how many
    HD Even(const Tensor& t, uint32_t tile) : tile(tile) {
        uint32_t row = tile / t.per;
        column = tile - row * t.per, start = row * (uint32_t)(t.row >> 3) + column * 32, eights = 0;
        measure(t);
    }
    HD void measure(const Tensor& t) { eights = column == t.full ? (uint32_t)(t.row >> 3) - column * 32 : 32; }
    HD void next(const Tensor& t) {
        start += eights, tile++;
        if (++column == t.per) column = 0;
        measure(t);
    }
    HD Where where(uint32_t lane) const {
        const uint32_t at = min(lane, eights - 1);
        return {start + at, 0, tile * 32 + lane, 0, 31, lane < eights};
    }
};

// Blocks of any length and alignment, in order: a first pass over those that begin finds their magnitudes, a second
// repeats the step with the same bits and stores it. A scale is stored when its block has ended.
__device__ __noinline__ void by_element(const Args& a, uint32_t k, Place place, const char* shared) {  // of one row
    const Tensor& t = a.tensors[k];
    const Task task(a, k, t, {shared, (threadIdx.x & 31) * 4});
    const Span at = place.span(t, GROUP);
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
        if (stride && eight < end) asm volatile("prefetch.global.L2 [%0];" ::"l"(at + (uint64_t)eight * stride));
    }
};

// Where this lane's eight elements of a tile lie; false where only `by_element` can step it. Empty: a row has no such tile.
HD bool locate(const Task& task, const Tensor& t, const Place& place, Where& w, bool& empty) {
    w.row = place.row, w.inside = true, empty = false;
    w.i = w.within = place.column * 32 + task.lane;
    w.begin = 0, w.end = 31;
    if (TILE == 256 && place.column < t.whole && !((uint64_t)task.g & 15)) return true;
    const Span at = place.span(t, 1);
    empty = at.length == 0;
    if (empty) return true;
    if (TILE != 256 || !t.aligned || ((uint64_t)task.g & 15) || at.length & 7 || (t.per && t.row & 7)) return false;
    const uint32_t eights = at.length / 8;
    if (place.ends) {
        uint32_t mine = task.lane / eights;
        w.inside = mine < t.pack && (place.row + mine) * t.row < t.n;
        w.begin = mine * eights, w.end = w.begin + eights - 1;
        if (w.inside) w.row += mine;
        w.within = place.column * 32 + (w.inside ? task.lane - w.begin : 0);
    } else {
        w.inside = task.lane < eights;
        w.within = place.column * 32 + (w.inside ? task.lane : eights - 1);
    }
    w.i = (uint32_t)((w.row * t.row) >> 3) + w.within;
    return true;
}

// One tile, number `j` of its unit. DRY looks at magnitudes alone. False, and nothing is stored, where only `by_element`
// can step it.
template <bool DRY, bool EASY, class P> HD bool step_tile(const Task& task, const Tensor& t, const P& place, uint32_t j, uint32_t (&magnitude)[KEPT], float (&hold)[KEPT]) {
    Where at = place.where(task.lane);
    bool empty = false;
    if constexpr (!EASY) {
        if (!locate(task, t, place, at, empty)) return false;
    }
    if (empty) return true;
    WEIGHT::Raw p;
    GRAD::Raw g;
    States states;
    GRAD::load(task.g, at.i, g), WEIGHT::load(t.at, at.i, p);
    if (READS) states.template load<EASY>(t.states, at);
    float x[KEPT][8] = {}, w[8], d[8];
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
    if (DRY || ALONE) {
        if (__any_sync(0xFFFFFFFFu, core.doubtful())) return false;
    }
    if (DRY) {
        States::grow(x, j % GROUP, task.lane, magnitude);
        return true;
    }
    uint32_t random[8];
    if (WEIGHT::RANDOM) r16x8(task.key, (uint64_t)at.i * 8, random);
    if (at.inside) WEIGHT::put(t.at, at.i, w, p, random);
    if (!WRITES) return true;
    Measure m[KEPT];
    Where there = {at.i, 0, at.i, 0, 31, at.inside};  // where one row is all: what else is needed then is found again, not kept
    bool ends = false;
    if constexpr (!EASY) {
        ends = place.ends;
        if (t.per) locate(task, t, place, there, empty);
    }
    States::template measure<EASY>(t.states, x, j % GROUP, task.lane, magnitude, ends, there, m);
    States::put(t.states, at.i, at.inside, x, m, task.shared);
    States::template keep<EASY>(t.states, there, task.lane, j, m, hold);
    return true;
}

// The tiles of a block list that begin and end together. Returns whether `by_element` stepped them.
template <bool EASY> HD bool step_group(const Task& task, const Tensor& t, const Place& place, uint32_t j, float (&hold)[KEPT]) {
    uint32_t magnitude[KEPT] = {};
    bool fast = true;
    Place at = place;
    if (ALONE) fast = step_tile<false, EASY>(task, t, place, j, magnitude, hold);
#pragma unroll 1
    for (uint32_t i = 0; !ALONE && i < GROUP && fast; i++, at.column++) fast = step_tile<true, EASY>(task, t, at, j + i, magnitude, hold);
    if (!fast) {
        for (at = place; at.row < place.row + (place.ends ? t.pack : 1); at.row++) by_element(task.a, task.k, at, task.shared.at);
        return true;
    }
    at = place;
#pragma unroll 1
    for (uint32_t i = 0; !ALONE && i < GROUP; i++, at.column++) step_tile<false, EASY>(task, t, at, j + i, magnitude, hold);
    if (WRITES && !ALONE && !EASY) States::flush(t.states, place.span(t, 1), task.lane, hold);
    return false;
}

// A warp's next piece of work: `count` tiles of tensor k. Pieces before `full` are units, an equal number for each warp;
// the rest are groups.
struct Piece {
    uint32_t k, tile, count;
    HD void seek(const Args& a, uint32_t x, uint32_t full) {
        constexpr uint32_t PARTS = UNIT / GROUP;
        uint32_t u = x < full ? x : full + (x - full) / PARTS, within = x < full ? 0 : (x - full) % PARTS * GROUP;
        while (u >= a.tensors[k + 1].first) k++;
        const Tensor& t = a.tensors[k];
        tile = (u - t.first) * UNIT + within;
        count = a.g[k] == (const char*)1 || tile >= t.tiles ? 0 : min(x < full ? UNIT : GROUP, t.tiles - tile);
    }
};

// A piece whose tiles are all whole and of one row, as nearly all of a model are.
HD void step_easy(const Task& task, View t, const Piece& piece, uint32_t jump) {
    const Ahead ahead(task, t);
    const uint32_t end = (t.whole - 1) * 32 + 1;
    float hold[KEPT] = {};
    Place place(piece.tile);
#pragma unroll 1
    for (uint32_t j = 0; j < piece.count; j += GROUP, place.column += GROUP) {
        if (AHEAD) ahead.ask((place.column + (j + GROUP < piece.count ? GROUP : jump)) * 32, end);
        if (step_group<true>(task, t, place, j, hold) && WRITES) States::template again<true>(t.states, piece.tile, j, 0, task.lane, hold);
    }
    if (WRITES) States::template close<true>(t.states, piece.tile, piece.count, 0, task.lane, hold);
}

// A piece of rows that each end with a shorter tile of as many blocks.
HD void step_even(const Task& task, const Tensor& t, const Piece& piece, uint32_t jump) {
    const Ahead ahead(task, t);
    const uint32_t end = (uint32_t)(t.n >> 3) - 31;
    float hold[KEPT] = {};
    uint32_t none[KEPT];
    Even place(t, piece.tile);
    if (AHEAD) ahead.ask(Even(t, piece.tile + piece.count - 1 + jump).start, end);
#pragma unroll 1
    for (uint32_t j = 0; j < piece.count; j++, place.next(t)) {
        if (AHEAD && j + 1 < piece.count) ahead.ask(place.start + place.eights, end);
        if (step_tile<false, true>(task, t, place, j, none, hold)) continue;
        by_element(task.a, task.k, Place(t, place.tile), task.shared.at);
        if (WRITES) States::template again<true>(t.states, piece.tile, j, 0, task.lane, hold);
    }
    if (WRITES) States::template close<true>(t.states, piece.tile, piece.count, 0, task.lane, hold);
}

HD void step_piece(const Args& a, const Piece& piece, uint32_t jump, const Shared& shared) {
    View t = a.tensors[piece.k];
    const Task task(a, piece.k, t, shared);
    const bool whole = piece.tile + piece.count <= t.whole && piece.count % GROUP == 0;
    if (TILE == 256 && (t.aligned & 2) && whole && !((uint64_t)task.g & 15)) return step_easy(task, t, piece, jump);
    if constexpr (TILE == 256 && ALONE && EVEN) {
        if ((t.aligned & 4) && !((uint64_t)task.g & 15)) return step_even(task, t, piece, jump);
    }
    const Ahead ahead(task, t);
    const uint32_t end = t.n < 256 ? 0 : (uint32_t)(t.n >> 3) - 31;
    float hold[KEPT] = {};
    Place place(t, piece.tile);
#pragma unroll 1
    for (uint32_t j = 0; j < piece.count; j += GROUP) {
        Place next(t, piece.tile + j + (j + GROUP < piece.count ? GROUP : jump));
        if (AHEAD) ahead.ask(next.eight(t), end);
        if (step_group<false>(task, t, place, j, hold) && WRITES) States::template again<false>(t.states, piece.tile, j, (t.n + 7) >> 3, task.lane, hold);
        place = next;
    }
    if (WRITES) States::template close<false>(t.states, piece.tile, piece.count, (t.n + 7) >> 3, task.lane, hold);
}

// TABLE words: columns of values (each row of a plane of 256 x 256 bytes is 32 copies of two of them), then encode tables.
HD void fill(char* shared, const uint32_t* tables) {
    constexpr int COPIES = PLANES * 16384;
    for (int i = threadIdx.x; i < COPIES; i += THREADS) {
        int row = i >> 6 & 255, column = (i >> 14) * 2 + (i >> 5 & 1);
        ((uint32_t*)shared)[i] = tables[column * 256 + row];
    }
    for (int i = threadIdx.x; i < ENCODE; i += THREADS) ((uint32_t*)shared)[COPIES + i] = tables[PLANES * 512 + i];
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) refopt_step(const __grid_constant__ Args a) {
    extern __shared__ char memory[];
    const Shared shared = {memory, (threadIdx.x & 31) * 4};
#if LIVE
    if (skipped(a)) return;
#endif
    if (PLANES + ENCODE > 0) fill(memory, a.tables);
    const uint32_t warps = gridDim.x * (THREADS / 32);
    const uint32_t full = a.units / warps * warps, pieces = full + (a.units - full) * (UNIT / GROUP);
    Piece piece = {0, 0, 0};
    for (uint32_t x = blockIdx.x * (THREADS / 32) + threadIdx.x / 32; x < pieces; x += warps) {
        piece.seek(a, x, full);
        if (piece.count) step_piece(a, piece, (warps - 1) * UNIT + GROUP, shared);
    }
}
