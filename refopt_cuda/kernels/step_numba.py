"""One optimizer step as a Numba-CUDA kernel to read and to step through: every rule, codec and format of weights.

One CUDA block works on one quantisation block, the largest of a tensor's states; each thread takes elements tid,
tid + THREADS, ... A block's maximum is reduced in a tree over shared memory, because the simulator has no warp
shuffles. With `NUMBA_ENABLE_CUDASIM=1` set before Numba is first imported, the same source runs as plain Python, where
a breakpoint can be set.

The fast kernel is `step.cu`; this one says the same in a language that can be read aloud. The functions of a kernel are
put together from one `load` and one `store` a state; `at` is where its CUDA block lies in the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, types
from numba.core import config
from numba.np.numpy_support import from_dtype

from refopt_cuda.codecs import Form as Codec
from refopt_cuda.codecs.forms import Block, Element
from refopt_cuda.kernels import arguments, arith
from refopt_cuda.kernels.arguments import Combination
from refopt_cuda.random import make as random_bits
from refopt_cuda.rules import Form

__all__ = ["body", "kernel", "signature", "simulated", "step"]

THREADS = 32
"""Threads a CUDA block: a power of two, for the tree."""
UNCODED = 256
"""Elements a CUDA block where no state has blocks."""
MAGNITUDE = np.uint32(0x7FFFFFFF)
NONE, LOW, HALF_BYTE = np.uint32(0), np.uint8(15), np.uint8(4)


def simulated() -> bool:
    """Whether Numba runs CUDA kernels in its simulator in this process."""
    return bool(vars(config)["ENABLE_CUDASIM"])


def step(
    rule: str | Form,
    codecs: Sequence[str | Codec],
    p: np.ndarray,
    g: np.ndarray,
    states: Sequence[dict[str, np.ndarray]],
    shape: Sequence[int],
    block: int | Sequence[int],
    scalars: np.ndarray,
    layout: str | None = None,
    *,
    weight: str | Codec | None = None,
    rest: np.ndarray | None = None,
    random: tuple[int, int] | None = None,
    first: int = 0,
) -> None:
    """Update one parameter and its states in place; arguments and errors are those of `step_host.step`.

    NumPy arrays are copied to the device and back. The module itself raises ImportError where numba-cuda is not
    installed.
    """
    of = arguments.combination(rule, tuple(codecs), p.dtype, g.dtype, weight)
    cut = arguments.cut(of.codecs, tuple(shape), tuple(block) if isinstance(block, Sequence) else block, layout)
    host = arguments.arrays(of, cut, p, g, states, rest)
    row, key = tuple(arguments.row(of, scalars)), arguments.key(of, random, first)
    if cut.size == 0:
        return
    largest = cut.largest if any(codec.scaled for codec in of.codecs) else UNCODED
    flat = [host.p, host.rest, host.g, *host.codes, *host.scales]
    device = [cuda.to_device(np.append(a, a.dtype.type(0)) if a.size == 0 else a) for a in flat]
    n = len(of.codecs)
    grid = cut.size // cut.row * -(-cut.row // largest)
    run = kernel(of, cut.blocks, largest)
    run[grid, THREADS](*device[:3], tuple(device[3 : 3 + n]), tuple(device[3 + n :]), row, np.int64(cut.row), key)
    for a, d in zip(flat, device, strict=True):
        if a.size and a is not host.g:
            d.copy_to_host(a)


def signature(of: Combination) -> tuple:
    """The types of the kernel's arguments, for compiling it to PTX where there is no GPU."""

    def array(dtype: Any) -> types.Array:
        return types.Array(from_dtype(np.dtype(dtype)), 1, "C")

    def word(name: str) -> types.Array:
        return array(np.float32 if name == "f32" else np.uint16)

    p = word(of.weight if isinstance(of.weight, str) else "bf16")
    codes = [array(np.uint8 if c.scaled else c.module.DTYPE) for c in of.codecs]
    scales = [array(_scale_word(c)) for c in of.codecs]
    row = types.UniTuple(types.float32, of.scalars)
    return (p, array(of.rest_dtype or np.uint16), word(of.grad), types.Tuple(codes), types.Tuple(scales), row,
            types.int64, types.Tuple([types.uint64, types.int64]))  # fmt: skip


def _scale_word(codec: Codec) -> Any:
    wide = codec.scaled and codec.module.scale_dtype(**codec.options).itemsize == 4
    return np.float32 if wide else np.uint16


@cache
def kernel(of: Combination, blocks: tuple[int, ...], largest: int) -> Any:
    """The Numba-CUDA kernel of one combination, compiled when it is first launched."""
    return cuda.jit(body(of, blocks, largest, arith.simulator() if simulated() else arith.cuda()))


def body(of: Combination, blocks: tuple[int, ...], largest: int, o: SimpleNamespace) -> Callable:
    """The kernel as a plain function of p, what lies beside it, g, codes and scales of each state, scalars, row length
    and the key of random bits; each state has its block length, and a CUDA block takes the `largest`."""
    states = [_state(codec, block, o) for codec, block in zip(of.codecs, blocks, strict=True)]
    load, keep, store = _loads(states), _keeps(len(states)), _stores(states)
    open_p, close_p = _weight(of, o)
    open_g = arguments.number(of.grad).make(o).load
    rule, where, kept = of.rule.make(o), _where(largest), max(len(states), 1)

    def step(p, rest, g, codes, scales, s, row, key):
        fresh = cuda.shared.array((kept, largest), np.float32)
        at = where(cuda.blockIdx.x, row)
        for i in range(cuda.threadIdx.x, at[1], THREADS):
            n = at[0] + i
            x = load(codes, scales, at, i)
            w, x = rule(open_p(p, rest, n), open_g(g[n]), x, s)
            close_p(p, rest, n, w, key)
            keep(fresh, i, x)
        cuda.syncthreads()
        store(codes, scales, fresh, at)

    return step


def _where(largest: int) -> Callable:
    """(first element, elements, row, offset in the row, row length) of CUDA block k: rows are cut in blocks, and a
    row's tail is a block of its own."""

    @cuda.jit(device=True)
    def where(k, row):
        per_row = (row + largest - 1) // largest
        r = k // per_row
        offset = (k - r * per_row) * largest
        return r * row + offset, min(largest, row - offset), r, offset, row

    return where


# -------------------------------------------------------------------------------------------------------------- weights


def _weight(of: Combination, o: SimpleNamespace) -> tuple[Callable, Callable]:
    """`load(p, rest, n)` of weight n, and `store(p, rest, n, x, key)`."""
    if isinstance(of.weight, str):
        return _number(arguments.number(of.weight).make(o))
    form, (_, r16), drawn = of.weight.make(o), random_bits(o.jit), of.random
    open_one, close_one = form.open, form.close

    @cuda.jit(device=True)
    def load(p, rest, n):
        return open_one(p[n], NONE)

    @cuda.jit(device=True)
    def store(p, rest, n, x, key):
        p[n], _ = close_one(x, p[n], NONE, r16(key[0], n + key[1]) if drawn else NONE)

    @cuda.jit(device=True)
    def load_both(p, rest, n):
        return open_one(p[n], rest[n])

    @cuda.jit(device=True)
    def store_both(p, rest, n, x, key):
        p[n], rest[n] = close_one(x, p[n], rest[n], r16(key[0], n + key[1]) if drawn else NONE)

    return (load, store) if of.rest_dtype is None else (load_both, store_both)


def _number(form: Element) -> tuple[Callable, Callable]:
    load_one, store_one = form.load, form.store

    @cuda.jit(device=True)
    def load(p, rest, n):
        return load_one(p[n])

    @cuda.jit(device=True)
    def store(p, rest, n, x, key):
        p[n] = store_one(x)

    return load, store


# --------------------------------------------------------------------------------------------------------------- states


class State(NamedTuple):
    """How one state is kept: `load(codes, scales, at, i)` of element i of a CUDA block, and
    `store(codes, scales, fresh, at)` of all of them."""

    load: Callable
    store: Callable


def _loads(states: Sequence[State]) -> Callable:
    """Element i of every state, as a tuple."""
    if not states:
        return cuda.jit(device=True)(lambda codes, scales, at, i: ())
    first, others = states[0].load, _loads(states[1:])

    @cuda.jit(device=True)
    def load(codes, scales, at, i):
        return (first(codes[0], scales[0], at, i),) + others(codes[1:], scales[1:], at, i)

    return load


def _keeps(count: int, of: int = 0) -> Callable:
    """Put the fresh element i of every state into shared memory, a row a state."""
    if count == 0:
        return cuda.jit(device=True)(lambda fresh, i, x: None)
    others, row = _keeps(count - 1, of + 1), of

    @cuda.jit(device=True)
    def keep(fresh, i, x):
        fresh[row, i] = x[0]
        others(fresh, i, x[1:])

    return keep


def _stores(states: Sequence[State], of: int = 0) -> Callable:
    """Every state's row of fresh elements back into its codes and scales."""
    if not states:
        return cuda.jit(device=True)(lambda codes, scales, fresh, at: None)
    first, others, row = states[0].store, _stores(states[1:], of + 1), of

    @cuda.jit(device=True)
    def store(codes, scales, fresh, at):
        first(codes[0], scales[0], fresh[row], at)
        others(codes[1:], scales[1:], fresh, at)

    return store


def _state(codec: Codec, block: int, o: SimpleNamespace) -> State:
    form = codec.make(o)
    if not codec.scaled:
        return _element_state(form)
    if codec.module.BITS == 4:
        return _nibble_state(form, block, o)
    return _byte_state(form, block, o)


def _element_state(form: Element) -> State:
    load_one, store_one = form.load, form.store

    @cuda.jit(device=True)
    def load(codes, scales, at, i):
        return load_one(codes[at[0] + i])

    @cuda.jit(device=True)
    def store(codes, scales, fresh, at):
        for i in range(cuda.threadIdx.x, at[1], THREADS):
            codes[at[0] + i] = store_one(fresh[i])

    return State(load, store)


def _byte_state(form: Block, block: int, o: SimpleNamespace) -> State:
    scale, encode, decode, zero = form.scale, form.encode, form.decode, form.zero
    absmax, number = _absmax(o), _block_number(block)

    @cuda.jit(device=True)
    def load(codes, scales, at, i):
        return decode(codes[at[0] + i], scales[number(at, i)])

    @cuda.jit(device=True)
    def store(codes, scales, fresh, at):
        for lo in range(0, at[1], block):
            hi = min(lo + block, at[1])
            stored, factor, coded = scale(absmax(fresh, lo, hi))
            for i in range(lo + cuda.threadIdx.x, hi, THREADS):
                codes[at[0] + i] = encode(fresh[i], factor) if coded else zero
            if cuda.threadIdx.x == 0:
                scales[number(at, lo)] = stored

    return State(load, store)


def _nibble_state(form: Block, block: int, o: SimpleNamespace) -> State:
    """Two codes a byte, the earlier in its upper half; every block begins a byte, and one of odd length ends with the
    code of zero. When codes are stored a thread takes two neighbours, so that no byte has two writers."""
    scale, encode, decode, zero = form.scale, form.encode, form.decode, np.uint8(form.zero)
    absmax, number, begin = _absmax(o), _block_number(block), _block_byte(block)

    @cuda.jit(device=True)
    def load(codes, scales, at, i):
        j = i % block
        byte = codes[begin(at, i) + j // 2]
        return decode(np.uint8(byte >> HALF_BYTE if j % 2 == 0 else byte & LOW), scales[number(at, i)])

    @cuda.jit(device=True)
    def store(codes, scales, fresh, at):
        for lo in range(0, at[1], block):
            hi = min(lo + block, at[1])
            stored, factor, coded = scale(absmax(fresh, lo, hi))
            for i in range(lo + 2 * cuda.threadIdx.x, hi, 2 * THREADS):
                high = encode(fresh[i], factor) if coded else zero
                low = encode(fresh[i + 1], factor) if coded and i + 1 < hi else zero
                codes[begin(at, lo) + (i - lo) // 2] = np.uint8(high << HALF_BYTE) | low
            if cuda.threadIdx.x == 0:
                scales[number(at, lo)] = stored

    return State(load, store)


def _block_number(block: int) -> Callable:
    """Which of a state's blocks element i of a CUDA block is in."""

    @cuda.jit(device=True)
    def number(at, i):
        _, _, r, offset, row = at
        return r * ((row + block - 1) // block) + (offset + i) // block

    return number


def _block_byte(block: int) -> Callable:
    """The first byte of that block where two codes share a byte."""

    @cuda.jit(device=True)
    def begin(at, i):
        _, _, r, offset, row = at
        whole, tail = (block + 1) // 2, (row % block + 1) // 2
        return r * (row // block * whole + tail) + (offset + i) // block * whole

    return begin


def _absmax(o: SimpleNamespace) -> Callable:
    """The largest magnitude of fresh[lo:hi] as a word: integers order NaN > Inf > any number, however reduced."""
    bits = o.bits

    @cuda.jit(device=True)
    def absmax(fresh, lo, hi):
        tree = cuda.shared.array(THREADS, np.uint32)
        tid = cuda.threadIdx.x
        largest = NONE
        for i in range(lo + tid, hi, THREADS):
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
