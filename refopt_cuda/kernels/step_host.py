"""One optimizer step on the CPU: Numba loops over the scalar forms of a rule and of one codec for each state.

`step` is the entry. A tensor is cut into tiles, whole blocks of every coded state; a tile's states are decoded into
buffers that stay in the first-level cache, the rule runs over them, and the fresh states are encoded back. Each distinct
(rule, codecs, dtypes) is compiled once, kept on disk, and spread over `numba.get_num_threads()` threads for large tensors.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.np.unsafe.ndarray import to_fixed_tuple

from refopt_cuda.codecs import BLOCK, CODECS, ELEMENT
from refopt_cuda.codecs.forms import Block, Element
from refopt_cuda.kernels import half
from refopt_cuda.kernels.arith import host
from refopt_cuda.rules import RULES

__all__ = ["step"]

UNCODED_TILE = 4096
"""Elements a tile where no state has blocks."""
PARALLEL_FROM = 1 << 17
"""Elements from which a tensor is worth waking threads for."""
MAGNITUDE = np.uint32(0x7FFFFFFF)
NO_SCALES = np.zeros(0, np.float32)
"""Stands in for the scales of a state without any."""

jit = numba.njit(error_model="numpy", nogil=True, _nrt=False)
"""Without reference counts: a slice would cost two atomic operations, a third of the time of a short block. No allocation, either."""
inline = numba.njit(inline="always")
"""For what returns a slice, which only a counted reference may do across a call."""


class Plan(NamedTuple):
    """What is compiled for one combination: `serial` runs tiles [lo, hi); `parallel` runs them all on several threads."""

    serial: Callable
    parallel: Callable
    scalars: int


def step(
    rule: str,
    codecs: Sequence[str],
    p: np.ndarray,
    g: np.ndarray,
    states: Sequence[dict[str, np.ndarray]],
    shape: Sequence[int],
    block: int | Sequence[int],
    scalars: np.ndarray,
    layout: str | None = None,
) -> None:
    """Update one parameter and its states in place.

    rule     stem of `refopt_cuda.rules.RULES`
    codecs   one name a state, in the rule's order: a stem of `refopt_cuda.codecs.CODECS`. A block codec takes its unsigned table for
             a state that is never negative; "dynamic8.signed" and the like choose one outright.
    p, g     C-contiguous, `prod(shape)` elements: float32, float16, or bfloat16 as its uint16 (or int16) words
    states   one dict a state: "codes" (C-contiguous, `prod(shape)` elements of the codec's dtype), and "scales" (float32) for
             a block codec. All are float32 zeros, or zero codes, before the first step.
    shape    the tensor's global shape, which decides the block layout
    block    elements a block: one int, or one a state (each must divide the largest)
    scalars  `RULES[rule].scalars(t, **hyper)`
    layout   "rows" or "flat"; by default rows for two or more dimensions with a last one of at least 16

    Raises ValueError or TypeError, before anything is written, for arrays that do not fit together.
    """
    size = math.prod(shape)
    plan = _plan(rule, tuple(codecs), _word(p, "p"), _word(g, "g"))
    if len(states) != len(codecs):
        raise ValueError(f"step: {len(states)} states for {len(codecs)} codecs")
    if scalars.dtype != np.float32 or scalars.size != plan.scalars:
        raise ValueError(f"step: scalars must be float32[{plan.scalars}] for {rule}, got {scalars.dtype}[{scalars.size}]")
    blocks = (block,) * len(codecs) if isinstance(block, int) else tuple(block)
    row, tile, blocks = _tiling(tuple(codecs), tuple(shape), size, blocks, layout)
    arrays = _flat(p, size, "p"), _flat(g, size, "g"), *_stored(codecs, states, size, row, blocks)
    if size == 0:
        return
    tiles = (size // row) * -(-row // tile)
    if size < PARALLEL_FROM or tiles == 1:
        plan.serial(*arrays, scalars, blocks, row, tile, 0, tiles)
    else:
        with _threads:
            plan.parallel(*arrays, scalars, blocks, row, tile, tiles, numba.get_num_threads())


_threads = threading.Lock()
"""Numba's own thread pool (its layer of last resort) must not be entered by two threads at once."""


# ---------------------------------------------------------------------------------------------------------- arguments


_WORDS = {"float32": "f32", "float16": "f16", "uint16": "bf16", "int16": "bf16", "bfloat16": "bf16"}


def _word(a: np.ndarray, name: str) -> str:
    word = _WORDS.get(a.dtype.name)
    if word is None:
        raise TypeError(f"step: {name} must be float32, float16 or bfloat16 words (uint16), got {a.dtype}")
    return word


def _flat(a: np.ndarray, size: int, name: str) -> np.ndarray:
    if not a.flags.c_contiguous:
        raise ValueError(f"step: {name} must be C-contiguous")
    if a.size != size:
        raise ValueError(f"step: {name} has {a.size} elements, its shape says {size}")
    a = a.reshape(-1)
    return a if a.itemsize == 4 else a.view(np.uint16)


@cache
def _tiling(
    codecs: tuple[str, ...], shape: tuple[int, ...], size: int, blocks: tuple[int, ...], layout: str | None
) -> tuple[int, int, tuple[int, ...]]:
    """(row length, tile length, block length of each state): a flat layout is a single row."""
    if len(blocks) != len(codecs):
        raise ValueError(f"step: {len(blocks)} block sizes for {len(codecs)} codecs")
    if any(b < 1 for b in blocks):
        raise ValueError(f"step: block must be at least 1, got {blocks}")
    if layout not in (None, "rows", "flat"):
        raise ValueError(f"step: layout must be 'rows' or 'flat', got {layout!r}")
    coded = any(codec.partition(".")[0] in BLOCK for codec in codecs)
    rows = coded and shape and (layout == "rows" or (layout is None and len(shape) >= 2 and shape[-1] >= 16))
    row = max(shape[-1] if rows else size, 1)
    lengths = [min(b, row) for b, codec in zip(blocks, codecs, strict=True) if codec not in ELEMENT]
    tile = max(lengths, default=min(UNCODED_TILE, row))
    if any(b < row and tile % b for b in lengths):
        raise ValueError(f"step: block sizes {blocks} of one tensor must each divide the largest")
    return row, tile, tuple(min(b, row) for b in blocks)


def _stored(
    codecs: Sequence[str], states: Sequence[dict[str, np.ndarray]], size: int, row: int, blocks: Sequence[int]
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The flattened codes and scales of all states, checked against their codecs."""
    codes, scales = [], []
    for i, (codec, state, block) in enumerate(zip(codecs, states, blocks, strict=True)):
        stem, name = codec.partition(".")[0], f"states[{i}]"
        code = state["codes"]
        allowed = _code_dtypes(stem)
        if code.dtype not in allowed:
            raise TypeError(f"step: {name}['codes'] of {codec} must be {' or '.join(map(str, allowed))}, got {code.dtype}")
        if not code.flags.c_contiguous or code.size != size:
            raise ValueError(f"step: {name}['codes'] must be C-contiguous with {size} elements, got shape {code.shape}")
        codes.append(code.reshape(-1).view(np.uint8) if stem in BLOCK else code.reshape(-1))
        if stem in ELEMENT:
            scales.append(NO_SCALES)
            continue
        scale, count = state["scales"], size // row * -(-row // block)
        if scale.dtype != np.float32 or not scale.flags.c_contiguous or scale.size != count:
            raise ValueError(
                f"step: {name}['scales'] of {codec} must be C-contiguous float32[{count}], got {scale.dtype}{scale.shape}"
            )
        scales.append(scale.reshape(-1))
    return tuple(codes), tuple(scales)


@cache
def _code_dtypes(stem: str) -> tuple[np.dtype, ...]:
    codec = CODECS[stem]
    return (codec.DTYPE,) if stem in ELEMENT else (codec.SIGNED_DTYPE, codec.UNSIGNED_DTYPE)


# --------------------------------------------------------------------------------------------------------------- kernel


@cache
def _plan(rule: str, codecs: tuple[str, ...], p: str, g: str) -> Plan:
    """Build the kernel of one combination; compiled, or loaded from disk, when it first runs."""
    if rule not in RULES:
        raise ValueError(f"step: unknown rule {rule!r}; there are {', '.join(RULES)}")
    states = RULES[rule].STATES
    if len(codecs) > len(states) or len(codecs) not in (0, len(states)):
        raise ValueError(f"step: {rule} has {len(states)} states, got codecs {codecs}")
    tables = tuple(_codec(name, nonnegative) for name, (_, nonnegative) in zip(codecs, states, strict=False))
    loop = _rule_loop(len(codecs), RULES[rule].make(host()), len(RULES[rule].SCALARS))
    serial = _tiles(tables, loop, _form(p), _form(g))
    name = "_".join((rule, *codecs, p, g)).replace(".", "_")
    return Plan(_cached(serial, name), _cached(_spread(serial), name + "_parallel"), len(RULES[rule].SCALARS))


def _form(word: str) -> Element | None:
    """How a weight or gradient of this dtype is read and written; None is float32, which needs nothing."""
    if word == "f32":
        return None
    return (half if word == "f16" else CODECS[word]).make(host())


def _codec(name: str, nonnegative: bool) -> Block | Element | None:
    stem, _, table = name.partition(".")
    if stem not in CODECS or table not in ("", "signed", "unsigned") or (table and stem in ELEMENT):
        raise ValueError(f"step: unknown codec {name!r}; there are {', '.join(CODECS)}")
    if stem in ELEMENT:
        return _form(stem)
    unsigned = table == "unsigned" or (nonnegative and not table)
    return CODECS[stem].make(host(), unsigned)


def _tiles(tables: Sequence, loop: Callable, p_form: Element | None, g_form: Element | None) -> Callable:
    """The loop over tiles [lo, hi). `where` is (first element, elements, row, offset in the row, row length)."""
    open_p, open_g, close_p = _open(p_form), _open(g_form), _close(p_form)
    view_p, view_g = _view(p_form), _view(g_form)
    opened, views, closed = _opened(tables), _views(tables), _closed(tables)
    allocate = _allocated(2 + len(tables))

    @jit
    def walk(p, g, codes, scales, s, blocks, row, tile, lo, hi, buffers):
        per_row = (row + tile - 1) // tile
        for k in range(lo, hi):
            r = k // per_row
            offset = (k - r * per_row) * tile
            where = (r * row + offset, min(tile, row - offset), r, offset, row)
            open_p(p, NO_SCALES, buffers[0], 1, where)
            open_g(g, NO_SCALES, buffers[1], 1, where)
            opened(codes, scales, buffers[2:], blocks, where)
            p_tile = view_p(p, buffers[0], where)
            x = views(codes, buffers[2:], where)
            loop(p_tile, view_g(g, buffers[1], where), x, s)
            closed(codes, scales, x, blocks, where)
            close_p(p, NO_SCALES, p_tile, 1, where)

    @numba.njit(error_model="numpy", nogil=True)
    def tiles(p, g, codes, scales, s, blocks, row, tile, lo, hi):
        walk(p, g, codes, scales, s, blocks, row, tile, lo, hi, allocate(tile))

    return tiles


def _spread(tiles: Callable) -> Callable:
    """All tiles, an even share for each thread; no element depends on the share it falls into."""

    @numba.njit(parallel=True, error_model="numpy")
    def spread(p, g, codes, scales, s, blocks, row, tile, count, threads):
        for k in numba.prange(threads):
            tiles(p, g, codes, scales, s, blocks, row, tile, k * count // threads, (k + 1) * count // threads)

    return spread


def _rule_loop(states: int, rule: Callable, scalars: int) -> Callable:
    """The rule over one tile, written out for each number of states so that LLVM sees plain loops over plain arrays."""

    @jit
    def loop0(p, g, x, s):
        row = to_fixed_tuple(s, scalars)
        for i in range(p.size):
            p[i], _ = rule(p[i], g[i], (), row)

    @jit
    def loop1(p, g, x, s):
        row = to_fixed_tuple(s, scalars)
        (a,) = x
        for i in range(p.size):
            p[i], (a[i],) = rule(p[i], g[i], (a[i],), row)

    @jit
    def loop2(p, g, x, s):
        row = to_fixed_tuple(s, scalars)
        a, b = x
        for i in range(p.size):
            p[i], (a[i], b[i]) = rule(p[i], g[i], (a[i], b[i]), row)

    return (loop0, loop1, loop2)[states]


def _allocated(count: int) -> Callable:
    """A tuple of float32 buffers, each an allocation of its own: LLVM cannot tell two rows of one array apart."""
    if count == 0:
        return numba.njit(lambda size: ())
    rest = _allocated(count - 1)
    return numba.njit(lambda size: (np.empty(size, np.float32),) + rest(size))


def _opened(tables: Sequence) -> Callable:
    """Decode one tile of every state into its buffer."""
    if not tables:
        return jit(lambda codes, scales, buffers, blocks, where: None)
    head, tail = _open(tables[0]), _opened(tables[1:])

    @jit
    def opened(codes, scales, buffers, blocks, where):
        head(codes[0], scales[0], buffers[0], blocks[0], where)
        tail(codes[1:], scales[1:], buffers[1:], blocks[1:], where)

    return opened


def _views(tables: Sequence) -> Callable:
    """One tile of every state as a tuple of float32 arrays."""
    if not tables:
        return inline(lambda codes, buffers, where: ())
    head, tail = _view(tables[0]), _views(tables[1:])

    @inline
    def views(codes, buffers, where):
        return (head(codes[0], buffers[0], where),) + tail(codes[1:], buffers[1:], where)

    return views


def _view(table: Block | Element | None) -> Callable:
    """Where a tile lies as float32: in the stored array itself (None), or in the buffer it was decoded into."""
    if table is None:
        return inline(lambda codes, buffer, where: codes[where[0] : where[0] + where[1]])
    return inline(lambda codes, buffer, where: buffer[: where[1]])


def _closed(tables: Sequence) -> Callable:
    """Encode one tile of every state back into its codes and scales."""
    if not tables:
        return jit(lambda codes, scales, x, blocks, where: None)
    head, tail = _close(tables[0]), _closed(tables[1:])

    @jit
    def closed(codes, scales, x, blocks, where):
        head(codes[0], scales[0], x[0], blocks[0], where)
        tail(codes[1:], scales[1:], x[1:], blocks[1:], where)

    return closed


def _open(table: Block | Element | None) -> Callable:
    """How a tile is decoded into its buffer; float32 itself (None) is used where it lies."""
    if table is None:
        return jit(lambda codes, scales, buffer, block, where: None)
    if isinstance(table, Element):
        return _open_elements(table.load)
    return _open_blocks(table.decode)


def _open_elements(load: Callable) -> Callable:
    @jit
    def elements(codes, scales, buffer, block, where):
        words, x = codes[where[0] : where[0] + where[1]], buffer[: where[1]]
        for i in range(x.size):
            x[i] = load(words[i])

    return elements


def _open_blocks(decode: Callable) -> Callable:
    @jit
    def decoded(codes, scale, x):
        for i in range(x.size):
            x[i] = decode(codes[i], scale)

    @jit
    def blocks(codes, scales, buffer, block, where):
        start, size, r, offset, row = where
        words, x = codes[start : start + size], buffer[:size]
        k = r * ((row + block - 1) // block) + offset // block
        for lo in range(0, size, block):
            hi = min(lo + block, size)
            decoded(words[lo:hi], scales[k], x[lo:hi])
            k += 1

    return blocks


def _close(table: Block | Element | None) -> Callable:
    """How a tile of fresh float32 values is stored; float32 itself (None) was updated where it lies."""
    if table is None:
        return jit(lambda codes, scales, x, block, where: None)
    if isinstance(table, Element):
        return _close_elements(table.store)
    return _close_blocks(table)


def _close_elements(store: Callable) -> Callable:
    @jit
    def elements(codes, scales, x, block, where):
        words = codes[where[0] : where[0] + where[1]]
        for i in range(x.size):
            words[i] = store(x[i])

    return elements


def _close_blocks(table: Block) -> Callable:
    encoded = _encoded(table)

    @jit
    def blocks(codes, scales, x, block, where):
        start, size, r, offset, row = where
        k = r * ((row + block - 1) // block) + offset // block
        for lo in range(0, size, block):
            hi = min(lo + block, size)
            scales[k] = encoded(codes[start + lo : start + hi], x[lo:hi])
            k += 1

    return blocks


def _encoded(table: Block) -> Callable:
    """Encode one block; returns its stored scale. The maximum is taken over integers, so that NaN > Inf > any number."""
    scale, encode, zero = table.scale, table.encode, table.zero

    @jit
    def encoded(codes, x):
        words = x.view(np.uint32)
        absmax = np.uint32(0)
        for i in range(words.size):
            absmax = max(absmax, np.uint32(words[i] & MAGNITUDE))
        stored, inverse, coded = scale(absmax)
        if coded:
            for i in range(x.size):
                codes[i] = encode(x[i] * inverse)
        else:
            codes[:] = zero
        return stored

    return encoded


# ---------------------------------------------------------------------------------------------------------------- cache


class _Cache(FunctionCache):
    """Numba's disk cache with a key of our own.

    Numba keys a closure by what it closes over, and jitted functions there are new objects in every process, so that nothing is
    ever found again. Here the file is named after the combination and stamped with the sources of all scalar forms.
    """

    def __init__(self, function: Callable, name: str) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self._cache_path, f"step_host.{name}", _sources())

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        return sig, codegen.magic_tuple()


@cache
def _sources() -> str:
    """One hash over everything that a kernel is made of."""
    root = Path(__file__).parent.parent
    files = sorted(f for folder in ("rules", "codecs", "kernels") for f in (root / folder).glob("*.py"))
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def _cached(kernel: Any, name: str) -> Any:
    try:
        kernel._cache = _Cache(kernel.py_func, name)
    except (RuntimeError, OSError):
        pass  # no directory to write to: compiled in every process
    return kernel
