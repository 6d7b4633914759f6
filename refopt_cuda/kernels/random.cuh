// Counted random bits: see refopt/rng.py. The bits of an element depend on its number alone; one mixing serves four
// neighbours, because products of 64 bits are dear on a GPU.
#pragma once

HD uint64_t splitmix64(uint64_t z) {
    z += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}
HD uint64_t key(uint64_t step_word, uint32_t tensor) { return splitmix64(step_word ^ tensor); }
HD uint32_t r16(uint64_t key, int64_t i) { return (uint32_t)(splitmix64(key + (uint64_t)(i >> 2)) >> 16 * (i & 3)) & 0xFFFFu; }
HD void r16x8(uint64_t key, uint64_t first, uint32_t (&r)[8]) {  // of eight elements from `first`, a multiple of eight
    for (int h = 0; h < 2; h++) {
        uint64_t z = splitmix64(key + (first >> 2) + h);
        for (int i = 0; i < 4; i++) r[4 * h + i] = (uint32_t)(z >> 16 * i) & 0xFFFFu;
    }
}
