// Weights of 4 bits to numbers, in one launch: codes, the scale of each block and, where it is coded too, its own scale
// and the mean. A lane takes eight neighbouring codes, one word, and writes 8 or 16 bytes a store; a warp takes a few such
// stretches, all asked for before the tables are there, and ends. Sixteen values lie in sixteen banks of shared memory, so
// that lanes never wait for one another.
// Defined ahead: OUT (a number format of formats.cuh), NESTED (0 or 1), SHIFT (log2 of the elements of a block), AT_ONCE
// (stretches of a warp), BLOCKS (of 256 threads that a multiprocessor holds), GIVE (the instruction that stores).

static constexpr uint32_t SPAN = 32 * AT_ONCE;

static HD float scale_of(const char* scales, const float* scales2, float offset, const float* map, uint64_t block) {
#if NESTED
    return add(mul(map[((const uint8_t*)scales)[block]], scales2[block >> 8]), offset);
#else
    return ((const float*)scales)[block];
#endif
}

struct Round {  // what a lane takes of one round, as it is stored
    uint32_t word[AT_ONCE];
#if NESTED
    uint8_t scale[AT_ONCE];
    float scale2;  // a round lies within 256 blocks: one for all of it
#else
    float scale[AT_ONCE];
#endif
    HD void take(const char* codes, const char* scales, const float* scales2, uint64_t first) {
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) word[k] = take4(codes + (first + k * 32) * 4);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) scale[k] = ((decltype(&scale[0]))scales)[(first + k * 32) * 8 >> SHIFT];
#if NESTED
        scale2 = scales2[(first * 8 >> SHIFT) >> 8];
#endif
    }
    HD float scaled(int k, float offset, const float* map) const {
#if NESTED
        return add(mul(map[scale[k]], scale2), offset);
#else
        return scale[k];
#endif
    }
};

static HD void give(uint32_t word, float scale, const float* values, char* out, uint64_t t) {
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; e++)  // the earlier of two in the high half of its byte
        x[e] = mul(values[word >> (8 * (e / 2) + (e & 1 ? 0 : 4)) & 15], scale);
    OUT::put(out, (uint32_t)t, x);
}

extern "C" __global__ void __launch_bounds__(256, BLOCKS) nf4_decode(
    const char* codes, const char* scales, const float* scales2, const float* offset, const float* tables, char* out, uint64_t n) {
    __shared__ float values[16], map[256];  // the base's values, and those of dynamic8
    const uint64_t whole = n / 8, first = ((uint64_t)blockIdx.x * 8 + threadIdx.x / 32) * SPAN;
    const uint32_t lane = threadIdx.x & 31;
    const bool full = first + SPAN <= whole;
    Round round;
    if (full) round.take(codes, scales, scales2, first + lane);
    if (threadIdx.x < 16) values[threadIdx.x] = tables[threadIdx.x];
    if (NESTED) map[threadIdx.x] = tables[16 + threadIdx.x];
    const float mean = NESTED ? *offset : 0.0f;
    __syncthreads();
    if (full) {
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) give(round.word[k], round.scaled(k, mean, map), values, out, first + k * 32 + lane);
    }
    for (uint64_t t = first + lane; !full && t < whole; t += 32)  // the last stretches fill no round
        give(take4(codes + t * 4), scale_of(scales, scales2, mean, map, t * 8 >> SHIFT), values, out, t);
    const uint64_t i = whole * 8 + threadIdx.x;
    if (blockIdx.x == 0 && i < n) {
        const uint32_t byte = ((const uint8_t*)codes)[i / 2];
        const float scale = scale_of(scales, scales2, mean, map, i >> SHIFT);
        OUT::one(out, (int64_t)i, mul(values[i & 1 ? byte & 15 : byte >> 4], scale));
    }
}
