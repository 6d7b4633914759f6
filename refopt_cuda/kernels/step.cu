// One optimizer step over many tensors in one launch: decode, rule, encode, in one pass through memory.
//
// build.py defines, in front of this text: RULE (functor: a rule with its options chosen), CODECS (a State for each of its
// states, in order), WEIGHT and GRAD (formats), TILE (elements a warp takes at once: 256, or a block of a size that only
// `by_element` steps), GROUP (tiles that the longest block covers), THREADS, TENSORS and ROWS (most tensors, and
// different rows of scalars, a launch), TABLE (words of the codecs' tables, then where they lie) and AHEAD (whether the
// next tile is asked into the second-level cache), RAGGED (whether rows may end within blocks that lie in a tile), READS and
// WRITES (whether states are read and written), and LIVE (whether scalars lie in memory, where rows.cu has left them, and
// not in the arguments).
//
// A warp takes a unit of eight neighbouring tiles (of ragged rows, up to 128) at a time, every warp of a persistent grid in turn, and what is left
// over group by group. Scales of blocks of 64 elements and more are written when their unit ends: sectors that eight
// warps write four bytes each cost a tenth of the bandwidth. Eight neighbouring elements a lane, 16-byte loads; the
// other warps of the multiprocessor compute while one waits. A block that lies in a tile takes as many lanes as it has
// eights of elements; one that covers several is stepped twice, first for its magnitude alone. Rows that are not whole
// blocks take the tiles of step_ragged.cuh, those at odd addresses the blocks of step_lone.cuh, and what else is not
// aligned `by_element`: the same functors, one element at a time.

// A tile of a tensor, which lies in one row.
struct Place {
    uint32_t row, column;
    HD explicit Place(uint32_t tile) : row(0), column(tile) {}
    HD Place(const Tensor& t, uint32_t tile) : row(t.per ? tile / t.per : 0), column(t.per ? tile % t.per : tile) {}
    HD Where where(uint32_t lane) const { return {column * 32 + lane, 0, column * 32 + lane, true}; }
    HD uint32_t eight(const Tensor& t) const { return (uint32_t)((row * t.row) >> 3) + column * (TILE / 8); }  // its first eight elements
    HD Span span(const Tensor& t, uint32_t tiles) const {
        int64_t within = (int64_t)column * TILE, columns = t.per ? t.row : t.n;
        bool there = within < columns && row * columns < t.n;
        return {row, within, there ? (uint32_t)min((int64_t)tiles * TILE, columns - within) : 0};
    }
};

// Where this lane's eight elements of a tile lie; false where only `by_element` can step it. Empty: a row has no such tile.
HD bool locate(const Task& task, const Tensor& t, const Place& place, Where& w, bool& empty) {
    w.row = place.row, w.inside = true, empty = false;
    w.i = w.within = place.column * 32 + task.lane;
    if (TILE == 256 && place.column < t.whole && !((uint64_t)task.g & 15)) return true;
    const Span at = place.span(t, 1);
    empty = at.length == 0;
    if (empty) return true;
    if (TILE != 256 || !t.aligned || ((uint64_t)task.g & 15) || at.length & 7) return false;
    w.inside = task.lane < at.length / 8;
    w.within = place.column * 32 + (w.inside ? task.lane : at.length / 8 - 1);
    w.i = (uint32_t)((w.row * t.row) >> 3) + w.within;
    return true;
}

// One tile, number `j` of its unit. DRY looks at magnitudes alone. False, and nothing is stored, where only `by_element`
// can step it.
template <bool DRY, bool EASY> HD bool step_tile(const Task& task, const Tensor& t, const Place& place, uint32_t j, uint32_t (&magnitude)[KEPT], float (&hold)[KEPT]) {
    Where at = place.where(task.lane);
    bool empty = false;
    if constexpr (!EASY) {
        if (!locate(task, t, place, at, empty)) return false;
    }
    if (empty) return true;
    WEIGHT::Raw p;
    GRAD::Raw g;
    States states;
    float x[KEPT][8] = {}, w[8];
    GRAD::load(task.g, at.i, g), WEIGHT::load(t.at, at.i, p);
    if (READS) states.template load<EASY>(t.states, at);
    const bool doubtful = advance(task, p, g, states, w, x);
    if (DRY || ALONE) {
        if (__any_sync(0xFFFFFFFFu, doubtful)) return false;
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
    Where there = {at.i, 0, at.i, at.inside};  // where one row is all: what else is needed then is found again, not kept
    if constexpr (!EASY) {
        if (t.per) locate(task, t, place, there, empty);
    }
    States::template measure<EASY>(t.states, x, j % GROUP, task.lane, magnitude, m);
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
        by_element(task.a, task.k, place.span(t, GROUP), task.shared.at);
        return true;
    }
    at = place;
#pragma unroll 1
    for (uint32_t i = 0; !ALONE && i < GROUP; i++, at.column++) step_tile<false, EASY>(task, t, at, j + i, magnitude, hold);
    if (WRITES && !ALONE && !EASY) States::flush(t.states, place.span(t, 1), task.lane, hold);
    return false;
}

// A warp's next piece of work: `count` tiles of tensor k. Those before `full` are whole units, an equal number for each
// warp; the units that are left are cut.
struct Piece {
    static constexpr uint32_t PIECES = UNIT / GROUP;
    uint32_t k, tile, count;
    HD void seek(const Args& a, uint32_t x, uint32_t full) {
        uint32_t u = x < full ? x : full + (x - full) / PIECES, part = x < full ? 0 : (x - full) % PIECES;
        while (u >= a.tensors[k + 1].first) k++;
        const Tensor& t = a.tensors[k];
        tile = ((u - t.first) * PIECES + part) * t.piece;
        count = a.g[k] == (const char*)1 || tile >= t.tiles ? 0 : min(x < full ? PIECES * t.piece : t.piece, t.tiles - tile);
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

HD void step_piece(const Args& a, const Piece& piece, uint32_t warps, const Shared& shared) {
    View t = a.tensors[piece.k];
    const Task task(a, piece.k, t, shared);
    const uint32_t jump = (warps - 1) * UNIT + GROUP;
    const bool whole = piece.tile + piece.count <= t.whole && piece.count % GROUP == 0;
    if (TILE == 256 && (t.aligned & 2) && whole && !((uint64_t)task.g & 15)) return step_easy(task, t, piece, jump);
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

// How a tensor is stepped. Each way has a loop of its own over the pieces that fall to a warp: loops share no registers.
enum { ROW, LINES, SCATTERED };
HD uint32_t way(const Args& a, uint32_t k) {
    const Tensor& t = a.tensors[k];
    return !(t.aligned & 4) ? ROW : t.aligned & 1 && !((uint64_t)a.g[k] & 15) ? LINES : SCATTERED;
}
template <uint32_t WAY> HD void step_pieces(const Args& a, const Shared& shared) {
    const uint32_t warps = gridDim.x * (THREADS / 32);
    const uint32_t full = a.units / warps * warps, pieces = full + (a.units - full) * Piece::PIECES;
    Piece piece = {0, 0, 0};
    for (uint32_t x = blockIdx.x * (THREADS / 32) + threadIdx.x / 32; x < pieces; x += warps) {
        piece.seek(a, x, full);
        if (piece.count == 0 || (RAGGED && way(a, piece.k) != WAY)) continue;
        if (WAY == ROW) step_piece(a, piece, warps, shared);
#if RAGGED
        if (WAY == LINES) step_ragged(a, piece.k, piece.tile, piece.count, warps, shared);
        if (WAY == SCATTERED) step_unaligned(a, piece.k, piece.tile, piece.count, shared.at);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) refopt_step(const __grid_constant__ Args a) {
    extern __shared__ char memory[];
    const Shared shared = {memory, (threadIdx.x & 31) * 4};
#if LIVE
    if (skipped(a)) return;
#endif
    if (PLANES + ENCODE > 0) fill(memory, a.tables);
    step_pieces<ROW>(a, shared);
#if RAGGED
    step_pieces<LINES>(a, shared);
    step_pieces<SCATTERED>(a, shared);
#endif
}
