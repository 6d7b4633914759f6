"""One optimizer step as a Numba-CUDA kernel to read and to step through: AdamW and Lion, float32 or dynamic8 states.

One CUDA block works on one quantisation block; each thread takes elements tid, tid + THREADS, ... The block's maximum
is reduced in a tree over shared memory, because the simulator has no warp shuffles. With `NUMBA_ENABLE_CUDASIM=1` set
before Numba is first imported, the same source runs as plain Python, where a breakpoint can be set.

The fast kernel is `step.cu`; this one says the same in a language that can be read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda, types
from numba.core import config

from refopt_cuda.codecs import BLOCK, CODECS, ELEMENT
from refopt_cuda.codecs.forms import Block, Element
from refopt_cuda.kernels import arith
from refopt_cuda.rules import RULES, named

__all__ = ["body", "kernel", "signature", "simulated", "step"]

SUPPORTED_RULES = ("adamw", "lion")
SUPPORTED_CODECS = ("f32", "dynamic8")
THREADS = 32
"""Threads a CUDA block: a power of two, for the tree."""
MAGNITUDE = np.uint32(0x7FFFFFFF)
NOTHING = np.uint32(0)


def simulated() -> bool:
    """Whether Numba runs CUDA kernels in its simulator in this process."""
    return bool(vars(config)["ENABLE_CUDASIM"])


def step(
    rule: str,
    codecs: Sequence[str],
    p: np.ndarray,
    g: np.ndarray,
    states: Sequence[dict[str, np.ndarray]],
    shape: Sequence[int],
    block: int,
    scalars: np.ndarray,
) -> None:
    """Update one float32 parameter and its states in place; arguments as in `step_host.step`, float32 p and g only.

    Arrays are NumPy arrays, or device arrays that Numba-CUDA takes. Raises ValueError for a rule or codec that this
    kernel has not. The module itself raises ImportError where numba-cuda is not installed.
    """
    size = math.prod(shape)
    run = kernel(rule, tuple(codecs), block)
    if size == 0:
        return
    coded = any(codec in BLOCK for codec in codecs)
    row = shape[-1] if coded and len(shape) >= 2 and shape[-1] >= 16 else size
    flat = [[a.reshape(-1) for a in (s["codes"], s.get("scales", np.zeros(1, np.float32)))] for s in states]
    arrays = [p.reshape(-1), g.reshape(-1), *(a for pair in flat for a in pair), scalars]
    on_device = [cuda.to_device(a) if isinstance(a, np.ndarray) else a for a in arrays]
    run[size // row * -(-row // block), THREADS](*on_device, row)
    for a, d in zip(arrays[:-1], on_device, strict=False):
        if d is not a:
            d.copy_to_host(a)


def signature(rule: str, codecs: Sequence[str]) -> tuple:
    """The types of the kernel's arguments, for compiling it to PTX where there is no GPU."""
    f32s, u8s = types.Array(types.float32, 1, "C"), types.Array(types.uint8, 1, "C")
    states = [t for codec in codecs for t in (f32s if codec in ELEMENT else u8s, f32s)]
    return (f32s, f32s, *states, f32s, types.int64)


@cache
def kernel(rule: str, codecs: tuple[str, ...], block: int) -> Any:
    """The Numba-CUDA kernel of one combination, compiled when it is first launched."""
    return cuda.jit(body(rule, codecs, block, arith.simulator() if simulated() else arith.cuda()))


def body(rule: str, codecs: tuple[str, ...], block: int, o: SimpleNamespace) -> Callable:
    """The kernel as a plain function: (p, g, codes and scales of each state, scalars, row length)."""
    if rule not in SUPPORTED_RULES:
        raise ValueError(f"step_numba: rule must be one of {', '.join(SUPPORTED_RULES)}, got {rule!r}")
    chosen = named(rule, {"adamw": 2, "lion": 1}[rule])
    if chosen is None or len(codecs) != len(chosen.states) or any(codec not in SUPPORTED_CODECS for codec in codecs):
        raise ValueError(f"step_numba: {rule} takes one of {', '.join(SUPPORTED_CODECS)} a state, got {codecs}")
    one = chosen.make(o)
    forms = [_state(codec, unsigned, block, o) for codec, (_, unsigned) in zip(codecs, chosen.states, strict=True)]
    make = {"adamw": _adamw_like, "lion": _lion_like}[rule]
    return make(one, forms, block, len(RULES[rule].SCALARS))


def _adamw_like(rule: Callable, forms: Sequence, block: int, scalars: int) -> Callable:
    """A rule with two states: m and v."""
    (load_m, store_m), (load_v, store_v) = forms
    where, row_of = _where(block), _row(scalars)

    def step(p, g, m_codes, m_scales, v_codes, v_scales, s, row):
        m_fresh = cuda.shared.array(block, np.float32)
        v_fresh = cuda.shared.array(block, np.float32)
        k = cuda.blockIdx.x
        start, size = where(k, row)
        for i in range(cuda.threadIdx.x, size, THREADS):
            m = load_m(m_codes[start + i], m_scales, k)
            v = load_v(v_codes[start + i], v_scales, k)
            p[start + i], (m_fresh[i], v_fresh[i]) = rule(p[start + i], g[start + i], (m, v), row_of(s))
        cuda.syncthreads()
        store_m(m_codes, m_scales, m_fresh, k, start, size)
        store_v(v_codes, v_scales, v_fresh, k, start, size)

    return step


def _lion_like(rule: Callable, forms: Sequence, block: int, scalars: int) -> Callable:
    """A rule with one state: m."""
    ((load_m, store_m),) = forms
    where, row_of = _where(block), _row(scalars)

    def step(p, g, m_codes, m_scales, s, row):
        m_fresh = cuda.shared.array(block, np.float32)
        k = cuda.blockIdx.x
        start, size = where(k, row)
        for i in range(cuda.threadIdx.x, size, THREADS):
            m = load_m(m_codes[start + i], m_scales, k)
            p[start + i], (m_fresh[i],) = rule(p[start + i], g[start + i], (m,), row_of(s))
        cuda.syncthreads()
        store_m(m_codes, m_scales, m_fresh, k, start, size)

    return step


def _where(block: int) -> Callable:
    """First element and length of block k: rows are cut in blocks, and a row's tail is a block of its own."""

    @cuda.jit(device=True)
    def where(k, row):
        per_row = (row + block - 1) // block
        offset = (k % per_row) * block
        return k // per_row * row + offset, min(block, row - offset)

    return where


def _row(scalars: int) -> Callable:
    """The scalars as a tuple, which the rule takes apart by name."""
    if scalars == 8:
        return cuda.jit(device=True)(lambda s: (s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]))
    return cuda.jit(device=True)(lambda s: (s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11]))


def _state(codec: str, nonnegative: bool, block: int, o: SimpleNamespace) -> tuple[Callable, Callable]:
    """`load(code, scales, k)` of one element and `store(codes, scales, fresh, k, start, size)` of a whole block."""
    if codec in ELEMENT:
        return _element_state(CODECS[codec].make(o))
    return _block_state(CODECS[codec].make(o, nonnegative), o)


def _element_state(form: Element) -> tuple[Callable, Callable]:
    load_one, store_one = form.load, form.store

    @cuda.jit(device=True)
    def load(code, scales, k):
        return load_one(code)

    @cuda.jit(device=True)
    def store(codes, scales, fresh, k, start, size):
        for i in range(cuda.threadIdx.x, size, THREADS):
            codes[start + i] = store_one(fresh[i])

    return load, store


def _block_state(form: Block, o: SimpleNamespace) -> tuple[Callable, Callable]:
    scale, encode, decode, zero = form.scale, form.encode, form.decode, form.zero
    absmax = _absmax(o)

    @cuda.jit(device=True)
    def load(code, scales, k):
        return decode(code, scales[k])

    @cuda.jit(device=True)
    def store(codes, scales, fresh, k, start, size):
        stored, inverse, coded = scale(absmax(fresh, size))
        for i in range(cuda.threadIdx.x, size, THREADS):
            codes[start + i] = encode(fresh[i], inverse) if coded else zero
        if cuda.threadIdx.x == 0:
            scales[k] = stored

    return load, store


def _absmax(o: SimpleNamespace) -> Callable:
    """The block's largest magnitude as a word: integers order NaN > Inf > any number, in any order of reduction."""
    bits = o.bits

    @cuda.jit(device=True)
    def absmax(fresh, size):
        tree = cuda.shared.array(THREADS, np.uint32)
        tid = cuda.threadIdx.x
        largest = NOTHING
        for i in range(tid, size, THREADS):
            largest = max(largest, np.uint32(bits(fresh[i]) & MAGNITUDE))
        cuda.syncthreads()
        tree[tid] = largest
        cuda.syncthreads()
        width = THREADS // 2
        while width > 0:
            if tid < width:
                tree[tid] = max(tree[tid], tree[tid + width])
            cuda.syncthreads()
            width //= 2
        return tree[0]

    return absmax
