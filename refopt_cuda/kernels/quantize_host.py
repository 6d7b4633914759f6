"""Quantize and dequantize on the CPU: Numba loops over the blocks of an array, shared by all threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numba
import numpy as np

from refopt_cuda.codecs import Form
from refopt_cuda.kernels import arguments
from refopt_cuda.kernels.arith import INNER, OUTER, host
from refopt_cuda.kernels.host_cache import cached
from refopt_cuda.kernels.host_tiles import POOL

__all__ = ["dequantize", "quantize"]

PART = 1 << 18
"""Elements that are worth a thread: about half a millisecond."""
MAGNITUDE = np.uint32(0x7FFFFFFF)


def quantize(form: Form, x: np.ndarray, bounds: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> None:
    """Fill `codes` and `scales` with the blocks bounds[k] .. bounds[k + 1] of flat `x` (float32, float16, bfloat16
    words); codes of 4 bits share a byte, the earlier in the high half, and every block begins one."""
    starts = _starts(form, bounds)
    with _threads(x.size):
        _quantizer(form, x.dtype.name)(_words(x), bounds, starts, codes.reshape(-1), _words(scales))


def dequantize(form: Form, codes: np.ndarray, scales: np.ndarray, bounds: np.ndarray, x: np.ndarray) -> None:
    """Fill flat `x` with what the codes stand for, rounded once."""
    with _threads(x.size):
        _dequantizer(form, x.dtype.name)(codes.reshape(-1), _words(scales), bounds, _starts(form, bounds), _words(x))


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """No more threads than n elements are worth: to wake one takes longer than to do its part of a small array."""
    before = numba.get_num_threads()
    numba.set_num_threads(max(1, min(before, n // PART)))
    try:
        with POOL:
            yield
    finally:
        numba.set_num_threads(before)


def _words(a: np.ndarray) -> np.ndarray:
    """Flat; 16-bit numbers as uint16 words."""
    flat = a.reshape(-1)
    return flat if flat.dtype == np.float32 else flat.view(np.uint16)


def _starts(form: Form, bounds: np.ndarray) -> np.ndarray:
    """Where each block's bytes begin."""
    if form.module.BITS == 8:
        return bounds
    return np.concatenate([np.zeros(1, np.int64), np.cumsum((np.diff(bounds) + 1) // 2)])


def _number(name: str) -> tuple[Callable, Callable]:
    if name == "float32":
        same = numba.njit(**INNER)(lambda x: x)
        return same, same
    made = arguments.number({"float16": "f16", "uint16": "bf16"}[name]).make(host())
    return made.load, made.store


@cache
def _quantizer(form: Form, number: str) -> Callable:
    block, load, half = form.make(host()), _number(number)[0], form.module.BITS == 4
    scale, encode, zero = block.scale, block.encode, block.zero
    kind = numba.from_dtype(form.module.dtype(**form.options))

    @numba.njit(parallel=True, **OUTER)
    def run(x, bounds, starts, codes, scales):
        for k in numba.prange(bounds.size - 1):
            first, last = bounds[k], bounds[k + 1]
            words = np.empty(last - first, np.float32)
            absmax = np.uint32(0)
            for i in range(words.size):
                words[i] = load(x[first + i])
                absmax = max(absmax, np.uint32(words[i : i + 1].view(np.uint32)[0] & MAGNITUDE))
            stored, factor, coded = scale(absmax)
            scales[k] = stored
            for i in range(words.size):
                code = encode(words[i], factor) if coded else zero
                if not half:
                    codes[starts[k] + i] = code
                elif i % 2 == 0:
                    codes[starts[k] + i // 2] = kind(np.uint8(code) << 4 | np.uint8(zero))
                else:
                    codes[starts[k] + i // 2] = kind(codes[starts[k] + i // 2] & 0xF0 | np.uint8(code))

    return cached(run, f"quantize_{form.name}_{number}")


@cache
def _dequantizer(form: Form, number: str) -> Callable:
    decode, store, half = form.make(host()).decode, _number(number)[1], form.module.BITS == 4

    @numba.njit(parallel=True, **OUTER)
    def run(codes, scales, bounds, starts, x):
        for k in numba.prange(bounds.size - 1):
            for i in range(bounds[k + 1] - bounds[k]):
                if half:
                    byte = codes[starts[k] + i // 2]
                    code = np.uint8(byte & 15 if i % 2 else byte >> 4)
                    x[bounds[k] + i] = store(decode(code, scales[k]))
                else:
                    x[bounds[k] + i] = store(decode(codes[starts[k] + i], scales[k]))

    return cached(run, f"dequantize_{form.name}_{number}")
