"""Quantize and dequantize on a GPU: the walk of `step.cu` with nothing in between, and the mean that double
quantization takes off its scales, summed in the canonical order."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from refopt_cuda.codecs import Form
from refopt_cuda.kernels import build
from refopt_cuda.kernels.step_cuda import Launch, Tensor, _cupy, on_stream
from refopt_cuda.kernels.transfer import LOAD, STORE, Transfer

__all__ = ["Bound", "dequantize", "mean", "quantize"]

ONE = np.ones((1, 1), np.float32)
MEAN = r"""
extern "C" __global__ void partial(const float* x, const double* y, double* out, long long n, int first) {
    __shared__ double lane[256];  // R256 of a chunk of 65536 (refopt/reduce.py): lane j adds every 256th, then a tree
    long long at = (long long)blockIdx.x * 65536 + threadIdx.x, end = min((long long)(blockIdx.x + 1) * 65536, n);
    double sum = 0.0;
    for (; at < end; at += 256) sum = __dadd_rn(sum, first ? (double)x[at] : y[at]);
    lane[threadIdx.x] = sum;
    for (int w = 128; w; w >>= 1) {
        __syncthreads();
        if (threadIdx.x < w) lane[threadIdx.x] = __dadd_rn(lane[threadIdx.x], lane[threadIdx.x + w]);
    }
    if (threadIdx.x == 0) out[blockIdx.x] = lane[0];
}
extern "C" __global__ void finish(const double* total, float* out, long long n) {
    *out = __double2float_rn(__ddiv_rn(*total, (double)n));
}
"""


@cache
def _launch(transfer: Any, form: Form, number: str, block: int, device: int) -> Launch:
    weight, grad = (build.NOTHING, number) if transfer is STORE else (number, build.NOTHING)
    return Launch(transfer, (form,), weight, grad, block)


def quantize(
    form: Form, x: int, number: str, shape: tuple[int, ...], block: int, at: tuple[int, int], stream: int
) -> None:
    """Enqueue: codes and scales, at these addresses, of the array at `x`; current device."""
    launch = _launch(STORE, form, number, block, _cupy().cuda.Device().id)
    with on_stream(stream):
        launch.bind([Tensor(0, (at,), shape)])
        launch.run([x], ONE, None, stream)


def dequantize(
    form: Form, at: tuple[int, int], shape: tuple[int, ...], block: int, x: int, number: str, stream: int
) -> None:
    """Enqueue: what codes and scales at these addresses stand for, into the array at `x`; current device."""
    launch = _launch(LOAD, form, number, block, _cupy().cuda.Device().id)
    with on_stream(stream):
        launch.bind([Tensor(x, (at,), shape)])
        launch.run([0], ONE, None, stream)


class Bound:
    """One of the two for codes that stay where they are, with a launch of its own: once it has run, `run` only enqueues
    a kernel, which a CUDA graph can repeat.

    transfer  STORE or LOAD
    at        device addresses of codes and scales; `x`, for LOAD, that of the float32 array
    """

    def __init__(
        self, transfer: Transfer, form: Form, at: tuple[int, int], shape: tuple[int, ...], block: int, x: int = 0
    ) -> None:
        weight, grad = (build.NOTHING, "float32") if transfer is STORE else ("float32", build.NOTHING)
        self.launch = Launch(transfer, (form,), weight, grad, block)
        self.tensor = Tensor(x, (at,), shape)

    def bind(self, stream: int) -> None:
        """Copy the table; before the first `run`, on its stream and device."""
        with on_stream(stream):
            self.launch.bind([self.tensor])

    def run(self, stream: int, x: int = 0) -> None:
        """Enqueue; `x`, for STORE, is the address of the float32 array."""
        self.launch.run([x], ONE, None, stream)


@cache
def _mean(device: int) -> tuple[Any, Any]:
    module = _cupy().RawModule(code=MEAN, options=("--std=c++17",), backend="nvrtc")
    return module.get_function("partial"), module.get_function("finish")


def mean(x: int, n: int, out: int, stream: int) -> None:
    """Enqueue: the mean of n float32 at `x` into one float32 at `out`: R / n in float64, rounded once."""
    cupy = _cupy()
    partial, finish = _mean(cupy.cuda.Device().id)
    with on_stream(stream):
        count, source, first = n, np.uint64(0), 1
        while first or count > 1:
            chunks = -(-count // 65536)
            sums = cupy.empty(chunks, np.float64)
            partial((chunks,), (256,), (np.uint64(x), source, sums, np.int64(count), np.int32(first)))
            source, count, first, kept = np.uint64(sums.data.ptr), chunks, 0, sums  # noqa: F841
        finish((1,), (1,), (source, np.uint64(out), np.int64(n)))
