// Weights of 4 bits to numbers, in one launch: codes, the scale of each block and, where it is coded too, its own scale
// and the mean. A lane takes eight neighbouring codes, one word, and writes 8 or 16 bytes a store; a warp takes four such
// stretches, whose loads are all in flight before the first is used. Sixteen values lie in sixteen banks of shared memory,
// so that lanes never wait for one another.
// Defined ahead: OUT (a number format of formats.cuh), NESTED (0 or 1), SHIFT (log2 of the elements of a block).

static constexpr int AT_ONCE = 4;
#ifdef __CUDA_ARCH__
#define RESIDENT (__CUDA_ARCH__ < 800 ? 4 : 6)  // blocks of 256 threads that a multiprocessor holds
#endif

static HD float scale_of(const char* scales, const float* scales2, float offset, const float* map, uint64_t block) {
#if NESTED
    return add(mul(map[((const uint8_t*)scales)[block]], scales2[block >> 8]), offset);
#else
    return ((const float*)scales)[block];
#endif
}

extern "C" __global__ void __launch_bounds__(256, RESIDENT) nf4_decode(
    const char* codes, const char* scales, const float* scales2, const float* offset, const float* tables, char* out, uint64_t n) {
    __shared__ float values[16], map[256];  // the base's values, and those of dynamic8
    if (threadIdx.x < 16) values[threadIdx.x] = tables[threadIdx.x];
    if (NESTED) map[threadIdx.x] = tables[16 + threadIdx.x];
    const float mean = NESTED ? *offset : 0.0f;
    __syncthreads();
    const uint64_t warps = (uint64_t)gridDim.x * 8, whole = n / 8;
    const uint32_t lane = threadIdx.x & 31;
    for (uint64_t first = ((uint64_t)blockIdx.x * 8 + threadIdx.x / 32) * 32 * AT_ONCE; first < whole; first += warps * 32 * AT_ONCE) {
        uint32_t word[AT_ONCE];
        float scale[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const uint64_t t = first + k * 32 + lane;
            if (t >= whole) continue;
            word[k] = take4(codes + t * 4);
            scale[k] = scale_of(scales, scales2, mean, map, t * 8 >> SHIFT);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const uint64_t t = first + k * 32 + lane;
            if (t >= whole) continue;
            float x[8];
#pragma unroll
            for (int e = 0; e < 8; e++)  // the earlier of two in the high half of its byte
                x[e] = mul(values[word[k] >> (8 * (e / 2) + (e & 1 ? 0 : 4)) & 15], scale[k]);
            OUT::put(out, (uint32_t)t, x);
        }
    }
    const uint64_t i = whole * 8 + threadIdx.x;
    if (blockIdx.x == 0 && i < n) {
        const uint32_t byte = ((const uint8_t*)codes)[i / 2];
        const float scale = scale_of(scales, scales2, mean, map, i >> SHIFT);
        OUT::one(out, (int64_t)i, mul(values[i & 1 ? byte & 15 : byte >> 4], scale));
    }
}
