// The scalars of a step where its count, its rate or the size of its gradients are known on the device alone: one thread a
// row does in float64 what the rule's `scalars` does on the host, and counts the step. rows_cuda.py defines RULE and WHOLE before.
//
// A row is of one step count. `skip` leaves a launch without any effect: gradients held Inf or NaN, and found_inf says so.

constexpr uint32_t COUNTS = 64, CHUNK = 256;  // rows a launch, and sums that are read at once
typedef RULE::Scalars Scalars;
typedef RULE::Hypers Hypers;

#if WHOLE  // a rule that sees whole tensors: a count has a row for tensors of two axes or more, and one for vectors
constexpr uint32_t EACH = 2;
struct Live { float scalars[16]; double wide[8]; uint64_t skip, spare; };
#else
constexpr uint32_t EACH = 1;
struct Live { float scalars[16]; uint64_t random, skip; };
#endif
struct Args {
    Live* rows;
    const float *rate, *scale, *inf;  // 0 where the host knows them, or they are not asked for
    const double *wide_rate, *squares;
    double hyper[16];        // Hypers, in order
    double factor, longest;  // of gradients, and the norm that they are cut to; `squares` of each, 0: they are not
    uint64_t seed;
    uint32_t measured, count, maximize, pad;
    int64_t* counts[COUNTS];  // steps so far; 0 where the host knows them
    int64_t steps[COUNTS];    // the step that is taken
};

// What gradients are multiplied by: `factor` over the scale of the loss, cut so that their joint norm is `longest` at most.
HD double gradient_factor(double factor, double scale, bool clip, double total, double longest) {
    factor = div64(factor, scale);
    if (!clip) return factor;
    double norm = mul64(factor < 0.0 ? -factor : factor, sqrt64(total)), cut = div64(longest, add64(norm, 1e-6));
    return cut > 1.0 ? factor : mul64(factor, cut);
}

HD uint64_t step_word(uint64_t seed, uint64_t t) { return splitmix64(seed ^ t * 0x9E3779B97F4A7C15ull); }

HD void fill(Live* rows, uint64_t t, double gs, const Hypers& hyper, uint64_t seed) {
#if WHOLE
    for (uint32_t i = 0; i < EACH; i++)
        RULE::scalars(t, i == 1, gs, hyper, *(Scalars*)rows[i].scalars, *(RULE::Wide*)rows[i].wide);
#else
    RULE::scalars(t, gs, hyper, *(Scalars*)rows->scalars);
    rows->random = step_word(seed, t);
#endif
}

#ifdef __CUDACC_RTC__
__device__ double sum_in_order(const double* x, uint32_t count) {
    __shared__ double chunk[CHUNK];
    double sum = 0.0;
    for (uint32_t first = 0; first < count; first += CHUNK) {
        __syncthreads();
        if (first + threadIdx.x < count) chunk[threadIdx.x] = x[first + threadIdx.x];
        __syncthreads();
        for (uint32_t i = 0; i < CHUNK && first + i < count; i++) sum = add64(sum, chunk[i]);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(CHUNK) refopt_rows(const __grid_constant__ Args a) {
    const double total = a.squares ? sum_in_order(a.squares, a.measured) : 0.0;
    const uint32_t k = threadIdx.x;
    if (k >= a.count) return;
    Live* rows = a.rows + EACH * k;
    const bool skip = a.inf && bits(*a.inf) << 1;
    for (uint32_t i = 0; i < EACH; i++) rows[i].skip = skip;
    if (skip) return;
    const int64_t t = a.counts[k] ? *a.counts[k] + 1 : a.steps[k];
    double hyper[16];
    for (int i = 0; i < 16; i++) hyper[i] = a.hyper[i];
    if (a.rate) hyper[0] = widened(*a.rate);
    if (a.wide_rate) hyper[0] = *a.wide_rate;
    double gs = gradient_factor(a.factor, a.scale ? widened(*a.scale) : 1.0, a.squares, total, a.longest);
    fill(rows, (uint64_t)t, a.maximize ? -gs : gs, *(const Hypers*)hyper, a.seed);
    if (a.counts[k]) *a.counts[k] = t;
}
#endif
