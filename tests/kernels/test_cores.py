"""The fast cores (square root, reciprocal) against the IEEE instructions, over every input that is not negative."""

from __future__ import annotations

import pytest

from refopt_cuda.kernels import build

pytestmark = pytest.mark.gpu

PROOF = r"""
extern "C" __global__ void prove(unsigned long long* wrong) {
    unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long w = blockIdx.x * blockDim.x + threadIdx.x; w < 1ull << 32; w += stride) {
        float x = real((uint32_t)w);
        Core root;
        float a = root.sqrt(x), b = Core::rcp_core(x);
        float c = ieee_sqrt(x), d = divide(1.0f, x);
        if (!root.doubtful() && w >> 31 == 0) {
            atomicAdd(wrong + 2, 1ull);
            if (bits(a) != bits(c) && !(is_nan(a) && is_nan(c))) atomicAdd(wrong, 1ull);
        }
        if (w >= 0x00800000u && w < 0x7E800000u) {  // 2^-126 .. 2^126
            atomicAdd(wrong + 3, 1ull);
            if (bits(b) != bits(d) && !(is_nan(b) && is_nan(d))) atomicAdd(wrong + 1, 1ull);
        }
    }
}
"""


def test_the_cores_equal_the_ieee_intrinsics_over_all_inputs_in_range():
    import cupy

    source = build._text("kernels/arith.cuh") + PROOF
    prove = cupy.RawModule(code=source, options=build.OPTIONS).get_function("prove")
    wrong = cupy.zeros(4, cupy.uint64)
    prove((2048,), (256,), (wrong,))
    roots, reciprocals, in_range, in_range_too = wrong.get().tolist()
    assert in_range > 0x5E800000 and in_range_too == 0x7E000000
    assert (roots, reciprocals) == (0, 0)
