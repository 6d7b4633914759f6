// Rules that see whole tensors: sums over rows, blocks or all of a tensor, in the canonical order (refopt/reduce.py),
// then a step that uses them. Each pass is one launch over all tensors; nothing is read back by the host.
//
// The text follows whole_walk.cuh; whole_build.py puts an ENTRY for each pass behind it.
//
// sums     squares of RULE::sums over each piece of a tensor: a row of 256 elements and more, else 65536 elements
// finish   R over the pieces of each block of the rule, and what RULE::finish makes of it
// tiles    row and column sums of RULE::tile, matrix by matrix, over tiles of 256 x 256
// lines    the factors: running means of those sums, and the inverse roots of the columns
// means    the mean of the row factors of each matrix
// update   RULE::update, element by element

template <class R, int PASS> HD void sums(const Args& a) {
    uint32_t k = 0;
    for (uint32_t x = blockIdx.x * WARPS + threadIdx.x / 32; x < total<PIECES>(a); x += gridDim.x * WARPS) {
        const uint32_t number = seek<PIECES>(a, x, k);
        const Task task(a, k);
        if (task.skipped()) continue;
        const Tensor& t = task.t;
        const Piece piece(t, number);
        Summing<PASS> summing(task, 0);
        walk<R::sums_read(PASS), R::sums_use(PASS), R::BATCH>(task, piece, summing);
        double r[SUMS];
#pragma unroll
        for (int n = 0; n < SUMS; n++) r[n] = tree(summing.sums[n]);
        if (task.lane) continue;
        if (t.per == 1) R::template finish<PASS>(r, (double)t.block, task.s, task.w, t.f[0] + piece.block, t.k + 4 * (uint64_t)piece.block);
        else
#pragma unroll
            for (int n = 0; n < SUMS; n++) t.sums[n * pieces(t) + number] = r[n];
    }
}

template <class R, int PASS> HD void finish(const Args& a) {
    __shared__ double shared[THREADS];
    uint32_t k = 0;
    for (uint32_t x = blockIdx.x; x < total<BLOCKS>(a); x += gridDim.x) {
        const uint32_t block = seek<BLOCKS>(a, x, k);
        const Task task(a, k);
        if (task.skipped()) continue;
        const Tensor& t = task.t;
        double r[SUMS];
        for (int n = 0; n < SUMS; n++) {
            double* parts = t.sums + n * pieces(t) + (uint64_t)block * t.per;
            uint32_t count = t.per;
            while (count > CHUNK) {  // the sum of a chunk takes the place of one of its parts
                const uint32_t chunks = (count + CHUNK - 1) / CHUNK;
                for (uint32_t c = 0; c < chunks; c++) {
                    const double sum = r256(parts + (uint64_t)c * CHUNK, min(CHUNK, count - c * CHUNK), shared);
                    if (threadIdx.x == 0) parts[c] = sum;
                }
                count = chunks;
                __syncthreads();
            }
            r[n] = r256(parts, count, shared);
            if (threadIdx.x == 0) parts[0] = r[n];
        }
        if (threadIdx.x == 0) R::template finish<PASS>(r, (double)t.block, task.s, task.w, t.f[0] + block, t.k + 4 * (uint64_t)block);
    }
}

template <class R, int PASS> HD void tiles(const Args& a) {
    constexpr int READS = R::tiles_read(PASS), USES = R::tiles_use(PASS), BATCH = R::BATCH;
    __shared__ double strips[WARPS][SIDE];
    const uint32_t warp = threadIdx.x / 32;
    uint32_t k = 0;
    for (uint32_t x = blockIdx.x; x < total<TILES>(a); x += gridDim.x) {
        const uint32_t number = seek<TILES>(a, x, k);
        const Task task(a, k);
        if (task.skipped()) continue;
        const Tensor& t = task.t;
        const uint32_t stripe = number / t.across, right = number - stripe * t.across;
        const uint32_t matrix = stripe / t.down, below = stripe - matrix * t.down;
        const uint32_t row = below * SIDE + warp * STRIP, column = right * SIDE + 8 * task.lane;
        const uint32_t count = column < t.columns ? min(8u, t.columns - column) : 0, end = min(t.rows, row + STRIP);
        const bool quick = task.quick() && right * SIDE + SIDE <= t.columns;
        double mine = 0.0, sums[8] = {};
        auto visit = [&](Eight& v, uint32_t i) {
            scale(task.s.gs, v);
            Ieee ieee;
            double sum = 0.0;
#pragma unroll
            for (uint32_t e = 0; e < 8; e++) {
                double q = widened(R::template tile<PASS>(ieee, v.at(e, t.k, false), task.s));
                q = e < count ? q : 0.0;
                sum = add64(sum, q), sums[e] = add64(sums[e], q);
            }
            sum = __shfl_sync(0xFFFFFFFFu, groups(sum), 0);
            if (task.lane == i - row) mine = sum;
        };
        auto inverted = [&](Eight& v, uint32_t i) {
            float rows[PAIRS] = {};
            for (int n = 0; n < USES; n++) rows[n] = row_root(t, n, matrix * t.rows + i);
            if (USES) invert<USES>(t, rows, matrix, column, count, quick, v);
        };
        uint32_t i = row;
        if (quick) {
#pragma unroll 1
            for (; i + BATCH <= end; i += BATCH) {
                Raws<READS> raw[BATCH];
#pragma unroll
                for (int b = 0; b < BATCH; b++) raw[b].load(task, (uint32_t)((((int64_t)matrix * t.rows + i + b) * t.columns + column) >> 3));
#pragma unroll
                for (int b = 0; b < BATCH; b++) {
                    Eight v = {};
                    raw[b].get(task, v), inverted(v, i + b), visit(v, i + b);
                }
            }
        }
#pragma unroll 1
        for (; i < end; i++) {
            Eight v = {};
            take_singly<READS>(task, ((int64_t)matrix * t.rows + i) * t.columns + column, count, v);
            inverted(v, i), visit(v, i);
        }
        const uint64_t rows = (uint64_t)t.matrices * t.rows, columns = (uint64_t)t.matrices * t.columns;
        if (row + task.lane < end) t.lines[right * rows + (uint64_t)matrix * t.rows + row + task.lane] = mine;
#pragma unroll
        for (uint32_t e = 0; e < 8; e++) strips[warp][8 * task.lane + e] = sums[e];
        __syncthreads();
        const uint32_t c = threadIdx.x, at = right * SIDE + c;
        double s[WARPS];
#pragma unroll
        for (uint32_t w = 0; w < WARPS; w++) s[w] = strips[w][c];
        const double sum = add64(add64(add64(s[0], s[4]), add64(s[2], s[6])), add64(add64(s[1], s[5]), add64(s[3], s[7])));
        if (at < t.columns) t.lines[rows * t.across + below * columns + (uint64_t)matrix * t.columns + at] = sum;
        __syncthreads();
    }
}

// A warp takes 32 rows or columns, a thread each, or one where tiles are many.
template <class R, int PASS> HD void lines(const Args& a) {
    uint32_t k = 0;
    for (uint32_t x = blockIdx.x * WARPS + threadIdx.x / 32; x < total<LINES>(a); x += gridDim.x * WARPS) {
        const uint32_t number = seek<LINES>(a, x, k);
        const Task task(a, k);
        if (task.skipped()) continue;
        const Tensor& t = task.t;
        const uint32_t rows = t.matrices * t.rows, columns = t.matrices * t.columns;
        const uint32_t groups = t.across > 32 ? rows : (rows + 31) / 32;
        const bool of_rows = number < groups;
        const uint32_t all = of_rows ? rows : columns, count = of_rows ? t.across : t.down, group = of_rows ? number : number - groups;
        const uint32_t line = count > 32 ? group : group * 32 + task.lane;
        if (line >= all) continue;
        const double* parts = t.lines + (of_rows ? 0 : (uint64_t)rows * t.across) + line;
        const double sum = count > 32 ? r256_of_warp(parts, all, count, task.lane) : r256_of_thread(parts, all, count);
        if (count > 32 && task.lane) continue;
        const float mean = rounded(div64(sum, (double)(of_rows ? t.columns : t.rows)));
        float* factor = t.f[2 * PASS + !of_rows] + line;
        const float fresh = add(mul(R::keep(PASS, task.s), *factor), mul(R::gain(PASS, task.s), mean));
        *factor = fresh;
        if (!of_rows) t.roots[(uint64_t)PASS * columns + line] = divide(1.0f, ieee_sqrt(fresh));
    }
}

template <class R, int PASS> HD void means(const Args& a) {
    __shared__ double shared[THREADS];
    uint32_t k = 0;
    for (uint32_t x = blockIdx.x; x < total<MATRICES>(a); x += gridDim.x) {
        const uint32_t matrix = seek<MATRICES>(a, x, k);
        const Task task(a, k);
        if (task.skipped()) continue;
        const Tensor& t = task.t;
        const double sum = r256(t.f[2 * PASS] + (uint64_t)matrix * t.rows, t.rows, shared);
        if (threadIdx.x == 0) t.means[PASS * t.matrices + matrix] = rounded(maximum64(div64(sum, (double)t.rows), R::least(task.s)));
    }
}

template <class R, int PASS> HD void update(const Args& a) {
    uint32_t k = 0;
    for (uint32_t x = blockIdx.x * WARPS + threadIdx.x / 32; x < total<PIECES>(a); x += gridDim.x * WARPS) {
        const uint32_t number = seek<PIECES>(a, x, k);
        const Task task(a, k);
        if (task.skipped()) continue;
        const Piece piece(task.t, number);
        Updating updating(task, task.t.k + 4 * (uint64_t)piece.block);
        walk<R::UPDATE_READS, R::UPDATE_USES, R::UPDATE_BATCH>(task, piece, updating);
    }
}

#ifndef ENTRY
#define ENTRY(kind, pass, blocks) \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks) kind##pass(const __grid_constant__ Args a) { PASS(kind, pass, a) }
#endif
