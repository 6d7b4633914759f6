// Muon between its matrix products: three passes over matrices of equal shape, blockIdx.y the matrix, blockIdx.x its part.
// The text begins with arith.cuh, codecs/bf16.cuh, formats.cuh and muon.cuh; MATRICES, THREADS, NESTEROV, UNIT, and the
// formats GRAD, BUFFER, WEIGHT and STACK are defined in front of it.
//
//   muon_momentum   B <- mu B + (1 - mu) g, and each part's sum of squares of Z; g is what the gradient, times gs, rounds to
//   muon_input      stack <- UNIT Z / max(norm, eps); Z is computed again, which is cheaper than to keep it in float32
//   muon_apply      p <- p decay - step X
//   muon_mirror     below the diagonal of square matrices what is above it; blockIdx.z the matrix, x and y a tile

struct Live { float scalars[16]; uint64_t random, skip; };  // as rows.cu leaves it
struct Args {
    const char* g[MATRICES];
    char* b[MATRICES];
    char* p[MATRICES];
    char* stack;
    double* sums;  // `parts` of every matrix
    int64_t n;     // elements a matrix
    double eps;
    const Live* live;  // 0: s
    uint32_t parts;
    muon::Scalars s;
};

template <class N> HD float rounded(float x) { return x; }
template <> HD float rounded<bfloat16>(float x) { return real((uint32_t)bf16::encode(x) << 16); }

HD bool stepping(const Args& a, muon::Scalars& s) {  // the scalars; false where the step is skipped
    s = a.live ? *(const muon::Scalars*)a.live->scalars : a.s;
    return !a.live || !a.live->skip;
}
HD float input(float b, float g, const muon::Scalars& s) { return NESTEROV ? muon::ahead(b, g, s) : b; }
HD char* row(const Args& a) { return a.stack + (int64_t)blockIdx.y * a.n * STACK::BYTES; }
HD bool even(const void* at) { return !((uint64_t)at & 15); }

// The sum of what all threads bring, in an order that nothing changes.
HD double joined(double x) {
    __shared__ double lane[THREADS];
    lane[threadIdx.x] = x;
    for (int w = THREADS / 2; w > 0; w >>= 1) {
        __syncthreads();
        if (threadIdx.x < w) lane[threadIdx.x] += lane[threadIdx.x + w];
    }
    __syncthreads();
    return lane[0];
}

// This block's share of a matrix: eights where all addresses allow it, and what is left one by one.
template <class Task> HD void walk(const Args& a, Task& task) {
    const int64_t whole = task.aligned() ? a.n / 8 : 0, each = (whole + a.parts - 1) / a.parts;
    const int64_t first = blockIdx.x * each, last = min(first + each, whole);
    for (int64_t i = first + threadIdx.x; i < last; i += THREADS) task.eight((uint32_t)i);
    for (int64_t i = whole * 8 + blockIdx.x * THREADS + threadIdx.x; i < a.n; i += (int64_t)a.parts * THREADS) task.one(i);
}

struct Momentum {
    const char* g;
    char* b;
    const muon::Scalars& s;
    double sum;
    HD bool aligned() const { return even(g) && even(b); }
    HD float step(float& b, float g) {
        g = mul(g, s.gs);
        b = rounded<BUFFER>(muon::momentum(b, g, s));
        const double z = input(b, g, s);
        sum += z * z;
        return b;
    }
    HD void eight(uint32_t i) {
        BUFFER::Raw old;
        GRAD::Raw raw;
        BUFFER::load(b, i, old), GRAD::load(g, i, raw);
        float x[8], d[8];
        BUFFER::get(old, x), GRAD::get(raw, d);
#pragma unroll
        for (int e = 0; e < 8; e++) step(x[e], d[e]);
        BUFFER::put(b, i, x);
    }
    HD void one(int64_t i) {
        float x = BUFFER::one((const char*)b, i);
        BUFFER::one(b, i, step(x, GRAD::one(g, i)));
    }
};

struct Input {
    const char* g;
    const char* b;
    char* x;
    const muon::Scalars& s;
    float scale;
    HD bool aligned() const { return even(g) && even(b) && even(x); }
    HD void eight(uint32_t i) {
        BUFFER::Raw old;
        GRAD::Raw raw;
        BUFFER::load(b, i, old), GRAD::load(g, i, raw);
        float z[8], d[8];
        BUFFER::get(old, z), GRAD::get(raw, d);
#pragma unroll
        for (int e = 0; e < 8; e++) z[e] = mul(input(z[e], mul(d[e], s.gs), s), scale);
        STACK::put(x, i, z);
    }
    HD void one(int64_t i) { STACK::one(x, i, mul(input(BUFFER::one(b, i), mul(GRAD::one(g, i), s.gs), s), scale)); }
};

struct Apply {
    char* p;
    const char* x;
    const muon::Scalars& s;
    HD bool aligned() const { return even(p) && even(x); }
    HD float step(float w, float d) const { return muon::weight(w, mul(d, 1.0f / UNIT), s); }
    HD void eight(uint32_t i) {
        WEIGHT::Raw old;
        STACK::Raw raw;
        WEIGHT::load(p, i, old), STACK::load(x, i, raw);
        float w[8], d[8];
        WEIGHT::get(old, w), STACK::get(raw, d);
#pragma unroll
        for (int e = 0; e < 8; e++) w[e] = step(w[e], d[e]);
        WEIGHT::put(p, i, w);
    }
    HD void one(int64_t i) { WEIGHT::one(p, i, step(WEIGHT::one((const char*)p, i), STACK::one(x, i))); }
};

extern "C" __global__ void __launch_bounds__(THREADS) muon_momentum(const __grid_constant__ Args a) {
    muon::Scalars s;
    if (!stepping(a, s)) return;
    Momentum task = {a.g[blockIdx.y], a.b[blockIdx.y], s, 0.0};
    walk(a, task);
    const double sum = joined(task.sum);
    if (threadIdx.x == 0) a.sums[blockIdx.y * a.parts + blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) muon_input(const __grid_constant__ Args a) {
    muon::Scalars s;
    if (!stepping(a, s)) return;
    double mine = 0.0;
    for (uint32_t k = threadIdx.x; k < a.parts; k += THREADS) mine += a.sums[blockIdx.y * a.parts + k];
    const double norm = sqrt(joined(mine)), least = norm < a.eps ? a.eps : norm;  // NaN stays
    Input task = {a.g[blockIdx.y], a.b[blockIdx.y], row(a), s, (float)((double)UNIT / least)};
    walk(a, task);
}

extern "C" __global__ void __launch_bounds__(THREADS) muon_apply(const __grid_constant__ Args a) {
    muon::Scalars s;
    if (!stepping(a, s)) return;
    Apply task = {a.p[blockIdx.y], row(a), s};
    walk(a, task);
}

constexpr uint32_t SIDE = 64;
template <int BYTES> struct word { typedef uint16_t type; };
template <> struct word<4> { typedef uint32_t type; };

// `shift` is added to the diagonal. Tiles on it hold both halves: all is read before anything is written.
extern "C" __global__ void __launch_bounds__(THREADS) muon_mirror(char* stack, uint32_t m, float shift) {
    typedef word<STACK::BYTES>::type Word;
    __shared__ Word tile[SIDE][SIDE + 1];
    const uint32_t top = blockIdx.y * SIDE, left = blockIdx.x * SIDE, column = threadIdx.x % SIDE;
    if (top > left) return;
    char* matrix = stack + (int64_t)blockIdx.z * m * m * STACK::BYTES;
    for (uint32_t r = threadIdx.x / SIDE; r < SIDE; r += THREADS / SIDE)
        if (top + r < m && left + column < m) tile[r][column] = ((const Word*)matrix)[(int64_t)(top + r) * m + left + column];
    __syncthreads();
    for (uint32_t r = threadIdx.x / SIDE; r < SIDE; r += THREADS / SIDE) {
        const uint32_t i = left + r, j = top + column;  // of the tile across the diagonal
        if (i < m && j < i) ((Word*)matrix)[(int64_t)i * m + j] = tile[column][r];
        if (i < m && j == i) {
            const int64_t at = (int64_t)i * m + i;
            STACK::one(matrix, at, add(STACK::one((const char*)matrix, at), shift));
        }
    }
}
