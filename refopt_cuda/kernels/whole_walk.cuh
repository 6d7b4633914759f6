// How the passes of whole.cu walk tensors: the table, tasks, sums in the canonical order (refopt/reduce.py), pieces.
//
// whole_build.py defines, in front of this text: RULE (a functor of refopt_cuda/rules), WEIGHT and GRAD (number formats),
// TENSORS and ROWS (most tensors, and different rows of scalars, a launch) and LIVE (whether scalars are read from the
// device's memory, where rows.cu has left them, instead of the arguments).
//
// A warp walks a piece, eight neighbouring elements a lane: lane l has accumulators 8 l .. 8 l + 7 of the 256, and adds
// one element to each for every 256 elements of the piece.

constexpr int KEPT = RULE::KEPT, SUMS = RULE::SUMS, PAIRS = RULE::PAIRS > 0 ? RULE::PAIRS : 1;
constexpr uint32_t THREADS = 256, WARPS = THREADS / 32, SIDE = 256, CHUNK = 65536, STRIP = SIDE / WARPS;
enum { PIECES, BLOCKS, TILES, LINES, MATRICES, KINDS };
enum { READS_P = 1, READS_G = 2, READS_X = 4 };  // READS_X << n: state n
typedef RULE::Scalars Scalars;
typedef RULE::Wide Wide;

struct __align__(16) Tensor {
    char* p;
    float* x[KEPT];        // states of one entry a weight, 0 where this tensor has none
    float* f[2 * PAIRS];   // row and column factors, or one entry a block of the rule
    double* sums;          // SUMS planes of one entry a piece
    double* lines;         // sums of all rows in the first tiles across, in the second ...; then of all columns, down
    float* k;              // four floats a block, made by `finish`
    float* roots;          // PAIRS planes of one entry a column: 1 / sqrt(column factor)
    float* means;          // PAIRS planes of one entry a matrix: mean of the row factor
    int64_t n, block, piece;  // elements in all, of a block of the rule, of a piece
    uint32_t per, aligned;    // pieces a block; whether eights of elements may be read at once
    uint32_t matrices, rows, columns, across, down;  // matrices: 0 where nothing is factored; tiles a row, a column
    uint32_t by_row;          // whether a piece is a row
    uint32_t first[KINDS];    // this tensor's first piece, block ... among those of all
};
struct Args {
    const Tensor* tensors;  // one more than there are: the last only ends the lists
    uint32_t count;
#if LIVE
    const struct Live* live;
#else
    double wide[ROWS][8];
    float scalars[ROWS][16];
#endif
    unsigned char which[TENSORS];  // row of scalars a tensor
    const char* g[TENSORS];        // 1: skip
};

#if LIVE
struct Live { float scalars[16]; double wide[8]; uint64_t skip, spare; };
__shared__ Live live[ROWS];
HD bool skipped(const Args& a) {  // by the whole launch, once its rows are at hand
    for (uint32_t i = threadIdx.x; i < sizeof(live) / 4; i += THREADS) ((uint32_t*)live)[i] = ((const uint32_t*)a.live)[i];
    __syncthreads();
    return live[0].skip;
}
#define ROW(a, k) live[a.which[k]].scalars
#define WIDE_ROW(a, k) live[a.which[k]].wide
#else
HD bool skipped(const Args&) { return false; }
#define ROW(a, k) a.scalars[a.which[k]]
#define WIDE_ROW(a, k) a.wide[a.which[k]]
#endif
#define PASS(kind, pass, a) if (!skipped(a)) kind<RULE, pass>(a);

struct Element {  // what a rule knows of one weight
    float p, g, x[KEPT];
    float inverse[PAIRS];  // roots of the rank-1 moments, one over each
    const float* k;        // of its block
    bool vector;           // nothing is factored
};

template <int KIND> HD uint32_t total(const Args& a) { return a.tensors[a.count].first[KIND]; }

// An item's tensor, and its number there. Items are asked for in ascending order.
template <int KIND> HD uint32_t seek(const Args& a, uint32_t item, uint32_t& k) {
    while (item >= a.tensors[k + 1].first[KIND]) k++;
    return item - a.tensors[k].first[KIND];
}

struct Task {  // a tensor in this step
    const Tensor& t;
    const char* g;
    const Scalars& s;
    const Wide& w;
    uint32_t lane;
    HD Task(const Args& a, uint32_t k)
        : t(a.tensors[k]), g(a.g[k]), s(*(const Scalars*)ROW(a, k)), w(*(const Wide*)WIDE_ROW(a, k)), lane(threadIdx.x & 31) {}
    HD bool skipped() const { return g == (const char*)1; }
    HD bool quick() const { return t.aligned && !((uint64_t)g & 15); }
};

HD uint64_t pieces(const Tensor& t) { return (uint64_t)(t.n / t.block) * t.per; }

// ---- sums in the canonical order ----

HD double widened(double x) { return x; }

HD double tree(double (&a)[8]) {  // over the 256 accumulators of a warp; the result is lane 0's
#pragma unroll
    for (int w = 16; w > 0; w >>= 1) {
#pragma unroll
        for (int e = 0; e < 8; e++) a[e] = add64(a[e], __shfl_down_sync(0xFFFFFFFFu, a[e], w));
    }
    return add64(add64(add64(a[0], a[4]), add64(a[2], a[6])), add64(add64(a[1], a[5]), add64(a[3], a[7])));
}

HD double groups(double a) {  // over 32 groups of a row of a tile, one a lane
#pragma unroll
    for (int w = 16; w > 0; w >>= 1) a = add64(a, __shfl_down_sync(0xFFFFFFFFu, a, w));
    return a;
}

template <class X> HD double r256(const X* x, uint32_t count, double* shared) {  // by a thread block
    double sum = 0.0;
    uint32_t i = threadIdx.x;
#pragma unroll 1
    for (; i + 7 * SIDE < count; i += 8 * SIDE) {  // loads of long sums do not wait for each other
        X held[8];
#pragma unroll
        for (int e = 0; e < 8; e++) held[e] = x[i + e * SIDE];
#pragma unroll
        for (int e = 0; e < 8; e++) sum = add64(sum, widened(held[e]));
    }
    for (; i < count; i += SIDE) sum = add64(sum, widened(x[i]));
    shared[threadIdx.x] = sum;
    for (uint32_t w = SIDE / 2; w > 0; w >>= 1) {
        __syncthreads();
        if (threadIdx.x < w) shared[threadIdx.x] = add64(shared[threadIdx.x], shared[threadIdx.x + w]);
    }
    __syncthreads();
    sum = shared[0];
    __syncthreads();
    return sum;
}

HD double r256_of_warp(const double* x, uint32_t apart, uint32_t count, uint32_t lane) {
    double a[8] = {};
    for (uint32_t i = 8 * lane; i < count; i += SIDE) {
#pragma unroll
        for (uint32_t e = 0; e < 8; e++)
            if (i + e < count) a[e] = add64(a[e], x[(uint64_t)(i + e) * apart]);
    }
    return tree(a);
}

HD double r256_of_thread(const double* x, uint32_t apart, uint32_t count) {  // of at most 32: the accumulators beyond hold zero
    double a[32];
#pragma unroll
    for (uint32_t i = 0; i < 32; i++) a[i] = i < count ? add64(0.0, x[(uint64_t)i * apart]) : 0.0;
#pragma unroll
    for (int w = 16; w > 0; w >>= 1) {
#pragma unroll
        for (int i = 0; i < w; i++) a[i] = add64(a[i], a[i + w]);
    }
    return a[0];
}

// ---- eight elements of a lane ----

struct __align__(16) Four { float x[4]; };

struct Eight {
    float p[8], g[8], x[KEPT][8], inverse[PAIRS][8];  // inverse: roots of the rank-1 moments
    HD Element at(int e, const float* k, bool vector) const {
        Element one = {p[e], g[e], {}, {}, k, vector};
#pragma unroll
        for (int n = 0; n < KEPT; n++) one.x[n] = x[n][e];
#pragma unroll
        for (int n = 0; n < PAIRS; n++) one.inverse[n] = inverse[n][e];
        return one;
    }
};

template <int READS> struct Raws {  // as they lie in memory
    WEIGHT::Raw p;
    GRAD::Raw g;
    float32::Raw x[KEPT];
    HD void load(const Task& task, uint32_t eight) {
        if (READS & READS_P) WEIGHT::load(task.t.p, eight, p);
        if (READS & READS_G) GRAD::load(task.g, eight, g);
#pragma unroll
        for (int n = 0; n < KEPT; n++)
            if (READS & READS_X << n && task.t.x[n]) float32::load((const char*)task.t.x[n], eight, x[n]);
    }
    HD void get(const Task& task, Eight& v) const {
        if (READS & READS_P) WEIGHT::get(p, v.p);
        if (READS & READS_G) GRAD::get(g, v.g);
#pragma unroll
        for (int n = 0; n < KEPT; n++)
            if (READS & READS_X << n && task.t.x[n]) float32::get(x[n], v.x[n]);
    }
};

template <int READS> HD void take_singly(const Task& task, int64_t at, uint32_t count, Eight& v) {
#pragma unroll
    for (uint32_t e = 0; e < 8; e++) {
        if (e >= count) continue;
        if (READS & READS_P) v.p[e] = WEIGHT::one((const char*)task.t.p, at + e);
        if (READS & READS_G) v.g[e] = GRAD::one(task.g, at + e);
#pragma unroll
        for (int n = 0; n < KEPT; n++)
            if (READS & READS_X << n && task.t.x[n]) v.x[n][e] = task.t.x[n][at + e];
    }
}

HD void scale(float gs, Eight& v) {
#pragma unroll
    for (int e = 0; e < 8; e++) v.g[e] = mul(v.g[e], gs);
}

HD float row_root(const Tensor& t, int n, uint32_t row) {  // of row `row` of all matrices
    return divide(1.0f, ieee_sqrt(divide(t.f[2 * n][row], t.means[n * t.matrices + row / t.rows])));
}

HD const float* column_roots(const Tensor& t, int n, uint32_t matrix) {
    return t.roots + ((uint64_t)n * t.matrices + matrix) * t.columns;
}

// The inverse roots of eight moments in one row; `rows` are the row's.
template <int USES> HD void invert(const Tensor& t, const float (&rows)[PAIRS], uint32_t matrix, uint32_t column, uint32_t count, bool quick, Eight& v) {
#pragma unroll
    for (int n = 0; n < USES; n++) {
        const float* roots = column_roots(t, n, matrix) + column;
        if (quick && count == 8) {
            const Four a = ((const Four*)roots)[0], b = ((const Four*)roots)[1];
#pragma unroll
            for (int e = 0; e < 8; e++) v.inverse[n][e] = mul(rows[n], e < 4 ? a.x[e & 3] : b.x[e & 3]);
        } else {
#pragma unroll
            for (uint32_t e = 0; e < 8; e++)
                if (e < count) v.inverse[n][e] = mul(rows[n], roots[e]);
        }
    }
}

template <int USES> HD void invert_singly(const Tensor& t, int64_t at, uint32_t count, Eight& v) {  // across rows
#pragma unroll 1
    for (uint32_t e = 0; e < count; e++) {
        uint32_t row = (uint32_t)((at + e) / t.columns), column = (uint32_t)(at + e - (int64_t)row * t.columns);
#pragma unroll
        for (int n = 0; n < USES; n++) {
            float inverse = mul(row_root(t, n, row), column_roots(t, n, row / t.rows)[column]);
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) v.inverse[n][i] = i == e ? inverse : v.inverse[n][i];
        }
    }
}

// ---- a piece, tile by tile ----

struct Piece {
    uint32_t block;
    int64_t start;
    uint32_t length;
    HD Piece(const Tensor& t, uint32_t number) {
        block = t.per == 1 ? number : number / t.per;
        int64_t within = (int64_t)(number - block * t.per) * t.piece;
        start = block * t.block + within, length = (uint32_t)min(t.piece, t.block - within);
    }
};

template <int READS, int USES, int BATCH, class Visitor> HD void walk(const Task& task, const Piece& piece, Visitor& visit) {
    const Tensor& t = task.t;
    const bool quick = task.quick(), factored = USES > 0 && t.matrices > 0, by_row = t.by_row;
    float rows[PAIRS] = {};
    uint32_t matrix = 0;
    bool unknown = factored && by_row;
    auto root = [&] {  // while the first loads are on their way
        const uint32_t row = (uint32_t)(piece.start / t.columns);
        matrix = row / t.rows, unknown = false;
#pragma unroll
        for (int n = 0; n < USES; n++) rows[n] = row_root(t, n, row);
    };
    uint32_t o = 8 * task.lane;
    if (BATCH > 1 && quick && (USES == 0 || (factored && by_row))) {
#pragma unroll 1
        for (; o - 8 * task.lane + BATCH * SIDE <= piece.length; o += BATCH * SIDE) {
            Raws<READS> raw[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++) raw[b].load(task, (uint32_t)((piece.start + o) >> 3) + b * 32);
            if (USES && unknown) root();
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                Eight v = {};
                raw[b].get(task, v), scale(task.s.gs, v);
                if (USES) invert<USES>(t, rows, matrix, o + b * SIDE, 8, true, v);
                visit(v, piece.start + o + b * SIDE, 8, true, false);
            }
        }
    }
    if (USES && unknown) root();
#pragma unroll 1
    for (; o < piece.length; o += SIDE) {
        const uint32_t count = min(8u, piece.length - o);
        const bool whole = quick && count == 8;
        const int64_t at = piece.start + o;
        Eight v = {};
        if (whole) {
            Raws<READS> raw;
            raw.load(task, (uint32_t)(at >> 3)), raw.get(task, v);
        } else take_singly<READS>(task, at, count, v);
        scale(task.s.gs, v);
        if (factored && by_row) invert<USES>(t, rows, matrix, o, count, whole, v);
        else if (factored) invert_singly<USES>(t, at, count, v);
        visit(v, at, count, whole, t.matrices == 0);
    }
}

template <int PASS> struct Summing {
    const Task& task;
    const float* k;
    double sums[SUMS][8] = {};
    HD Summing(const Task& task, const float* k) : task(task), k(k) {}
    HD void operator()(const Eight& v, int64_t, uint32_t count, bool, bool vector) {
        Ieee ieee;
#pragma unroll
        for (uint32_t e = 0; e < 8; e++) {
            float out[SUMS];
            RULE::template sums<PASS>(ieee, v.at(e, k, vector), task.s, out);
#pragma unroll
            for (int n = 0; n < SUMS; n++) sums[n][e] = e < count ? add_square64(sums[n][e], widened(out[n])) : sums[n][e];
        }
    }
};

struct Updating {
    const Task& task;
    const float* k;
    HD Updating(const Task& task, const float* k) : task(task), k(k) {}
    HD void operator()(Eight& v, int64_t at, uint32_t count, bool whole, bool vector) {
        const Tensor& t = task.t;
        Ieee ieee;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            Element one = v.at(e, k, vector);
            RULE::update(ieee, one, task.s);
            v.p[e] = one.p;
#pragma unroll
            for (int n = 0; n < KEPT; n++) v.x[n][e] = one.x[n];
        }
        if (whole) {
            WEIGHT::put(t.p, (uint32_t)(at >> 3), v.p);
#pragma unroll
            for (int n = 0; n < KEPT; n++)
                if (t.x[n]) float32::put((char*)t.x[n], (uint32_t)(at >> 3), v.x[n]);
            return;
        }
#pragma unroll
        for (uint32_t e = 0; e < 8; e++) {
            if (e >= count) continue;
            WEIGHT::one(t.p, at + e, v.p[e]);
#pragma unroll
            for (int n = 0; n < KEPT; n++)
                if (t.x[n]) t.x[n][at + e] = v.x[n][e];
        }
    }
};
