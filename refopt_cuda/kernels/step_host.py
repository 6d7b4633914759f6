"""One optimizer step on the CPU: Numba loops over the scalar forms of a rule and of one codec for each state.

`step` is the entry. A tensor is cut into tiles, whole blocks of every coded state; a tile's states are decoded into
buffers that stay in the first-level cache, the rule runs over them, and the fresh states are encoded back. Each
distinct (rule, codecs, formats) is compiled once and kept on disk; large tensors are shared by all of Numba's threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numba
import numpy as np

from refopt_cuda import random as _random
from refopt_cuda.codecs import CODECS, STATES, WEIGHTS
from refopt_cuda.codecs import Form as Codec
from refopt_cuda.codecs import named as codec_named
from refopt_cuda.codecs.forms import Element
from refopt_cuda.kernels import half
from refopt_cuda.kernels.arith import host
from refopt_cuda.kernels.host_cache import cached
from refopt_cuda.kernels.host_tiles import NOTHING, Nibbles, Table, Words, rule_loop, spread, tiles
from refopt_cuda.rules import RULES, Form, named

__all__ = ["step"]

TILE = 512
"""Elements a tile, or the largest block where that is longer. Buffers of 4096 bytes each would share their cache sets."""
UNCODED_TILE = 4096
"""Elements a tile where no state has blocks."""
PARALLEL_FROM = 1 << 17
"""Elements from which a tensor is worth waking threads for."""


class Plan(NamedTuple):
    """What is compiled for one combination: `serial` runs tiles [lo, hi), `parallel` all of them on several threads."""

    serial: Callable
    parallel: Callable
    scalars: int
    codecs: tuple[Codec, ...]
    weight: Codec | None


class Cut(NamedTuple):
    """How a tensor is cut: row length, tile length and number of tiles, block length of each state, and how many codes
    and scales each state has. A flat layout is a single row."""

    row: int
    tile: int
    tiles: int
    blocks: tuple[int, ...]
    counts: tuple[tuple[int, int], ...]


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
) -> None:
    """Update one parameter and its states in place.

    rule     a form of `refopt_cuda.rules`, or a stem: its plainest form with as many states as there are codecs
    codecs   one a state, in the rule's order: a form of `refopt_cuda.codecs`, or its name ("fp8.e5m2"). By name a block
             codec takes its unsigned table for a state that is never negative; "dynamic8.signed" chooses one outright.
    p, g     C-contiguous, `prod(shape)` elements: float32, float16, or bfloat16 as its uint16 (or int16) words
    states   one dict a state: "codes" (C-contiguous, of the codec's dtype: `prod(shape)` elements, or bytes of two
             4-bit codes, where every block begins a byte), and "scales" for a block codec
    shape    the tensor's global shape, which decides the block layout
    block    elements a block: one int, or one a state (each must divide the largest)
    scalars  `refopt_cuda.rules.row(stem, t, hyper)`
    layout   "rows" or "flat"; by default rows for two or more dimensions with a last one of at least 16
    weight   a format of weights, by name or form: p is its bfloat16 words
    rest     what that format keeps beside each word: C-contiguous, `prod(shape)` elements of its dtype
    random   for a format that draws bits: the step's word (`refopt_cuda.random.step_word`), the tensor's number

    Raises ValueError or TypeError, before anything is written, for arrays that do not fit together.
    """
    plan = _plan(rule, tuple(codecs), _word(p, "p"), _word(g, "g"), weight)
    if len(states) != len(codecs):
        raise ValueError(f"step: {len(states)} states for {len(codecs)} codecs")
    if scalars.dtype != np.float32 or scalars.size != plan.scalars:
        got = f"{scalars.dtype}[{scalars.size}]"
        raise ValueError(f"step: scalars must be float32[{plan.scalars}] for {_name(rule)}, got {got}")
    blocks = (block,) * len(codecs) if isinstance(block, int | np.integer) else tuple(block)
    cut, size = _cut(plan.codecs, tuple(shape), blocks, layout), math.prod(shape)
    weights = _flat(p, size, "p"), _rest(plan.weight, rest, size)
    arrays = (*weights, _flat(g, size, "g", written=False), *_stored(plan.codecs, states, cut), scalars)
    key = _key(plan.weight, random)
    if size == 0:
        return
    if size < PARALLEL_FROM or cut.tiles == 1:
        plan.serial(*arrays, cut.blocks, cut.row, cut.tile, key, 0, cut.tiles)
    else:
        with _threads:
            plan.parallel(*arrays, cut.blocks, cut.row, cut.tile, key, cut.tiles, numba.get_num_threads())


_threads = threading.Lock()
"""Numba's own thread pool (its layer of last resort) must not be entered by two threads at once."""


# ---------------------------------------------------------------------------------------------------------- arguments


_WORDS = {"float32": "f32", "float16": "f16", "uint16": "bf16", "int16": "bf16", "bfloat16": "bf16"}


def _word(a: np.ndarray, name: str) -> str:
    word = _WORDS.get(a.dtype.name)
    if word is None:
        raise TypeError(f"step: {name} must be float32, float16 or bfloat16 words (uint16), got {a.dtype}")
    return word


def _flat(a: np.ndarray, size: int, name: str, written: bool = True) -> np.ndarray:
    if written and not a.flags.writeable:
        raise ValueError(f"step: {name} is updated in place and must be writeable")
    if not a.flags.c_contiguous:
        raise ValueError(f"step: {name} must be C-contiguous")
    if a.size != size:
        raise ValueError(f"step: {name} has {a.size} elements, its shape says {size}")
    a = a.reshape(-1)
    return a if a.itemsize == 4 else a.view(np.uint16)


def _rest(weight: Codec | None, rest: np.ndarray | None, size: int) -> np.ndarray:
    """What lies beside the words of a format of weights, checked against it."""
    dtype = _rest_dtype(weight)
    if dtype is None:
        if rest is not None:
            raise ValueError(f"step: {weight.name if weight else 'these weights'} has nothing beside it, got a rest")
        return NOTHING
    return _part({"rest": rest} if rest is not None else {}, "rest", dtype, size, f"weights of {_named(weight)}")


@cache
def _rest_dtype(weight: Codec | None) -> np.dtype | None:
    return weight.module.rest_dtype(**weight.options) if weight else None


def _named(weight: Codec | None) -> str:
    return weight.name if weight else ""


def _key(weight: Codec | None, random: tuple[int, int] | None) -> np.uint64:
    if weight is None or not weight.module.RANDOM:
        return np.uint64(0)
    if random is None:
        raise ValueError(
            f"step: {weight.name} draws random bits: random must be (the step's word, the tensor's number)"
        )
    return np.uint64(_random.key(*random))


@cache
def _cut(codecs: tuple[Codec, ...], shape: tuple[int, ...], blocks: tuple[int, ...], layout: str | None) -> Cut:
    """Rows that are whole blocks of every state are cut as one: the list of blocks is the same."""
    size = math.prod(shape)
    if len(blocks) != len(codecs):
        raise ValueError(f"step: {len(blocks)} block sizes for {len(codecs)} codecs")
    if any(b < 1 for b in blocks):
        raise ValueError(f"step: block must be at least 1, got {blocks}")
    if layout not in (None, "rows", "flat"):
        raise ValueError(f"step: layout must be 'rows' or 'flat', got {layout!r}")
    scaled = [codec.scaled for codec in codecs]
    rows = any(scaled) and shape and (layout == "rows" or (layout is None and len(shape) >= 2 and shape[-1] >= 16))
    row = max(shape[-1] if rows else size, 1)
    blocks = tuple(min(b, row) for b in blocks)
    lengths = [b for b, s in zip(blocks, scaled, strict=True) if s]
    largest = max(lengths, default=1)
    if any(largest % b and largest < row for b in lengths):
        raise ValueError(f"step: block sizes {blocks} of one tensor must each divide the largest")
    counts = tuple(_count(codec, b, row, size) for codec, b in zip(codecs, blocks, strict=True))
    if size and not any(row % b for b in lengths):
        row = size
    tile = min(largest * max((TILE if lengths else UNCODED_TILE) // largest, 1), -(-row // largest) * largest)
    return Cut(row, tile, size // row * -(-row // tile), blocks, counts)


def _count(codec: Codec, block: int, row: int, size: int) -> tuple[int, int]:
    """Entries of a state's arrays of codes and of scales."""
    if not codec.scaled:
        return size, 0
    rows, whole, tail = size // row, *divmod(row, block)
    codes = row if codec.module.BITS == 8 else whole * ((block + 1) // 2) + (tail + 1) // 2
    return rows * codes, rows * (whole + (tail > 0))


def _stored(
    codecs: Sequence[Codec], states: Sequence[dict[str, np.ndarray]], cut: Cut
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The flattened codes and scales of all states, checked against their codecs."""
    codes, scales = [], []
    for i, (codec, state, (count, blocks)) in enumerate(zip(codecs, states, cut.counts, strict=True)):
        dtype, scale_dtype = _dtypes(codec)
        where = f"states[{i}] of {codec.name}"
        code = _part(state, "codes", dtype, count, where)
        codes.append(code.view(np.uint8) if codec.scaled else code)
        if scale_dtype is None:
            scales.append(NOTHING)
            continue
        scale = _part(state, "scales", scale_dtype, blocks, where)
        scales.append(scale if scale.itemsize == 4 else scale.view(np.uint16))
    return tuple(codes), tuple(scales)


def _part(state: dict[str, np.ndarray], name: str, dtype: np.dtype, count: int, where: str) -> np.ndarray:
    a = state.get(name)
    if a is None:
        raise ValueError(f"step: {where} has no {name}: {dtype}[{count}] is needed")
    if a.dtype != dtype:
        raise TypeError(f"step: {name!r} of {where} must be {dtype}, got {a.dtype}")
    if not a.flags.c_contiguous or not a.flags.writeable or a.size != count:
        raise ValueError(f"step: {name!r} of {where} must be C-contiguous, writeable {dtype}[{count}], got {a.shape}")
    return a.reshape(-1)


@cache
def _dtypes(codec: Codec) -> tuple[np.dtype, np.dtype | None]:
    if not codec.scaled:
        return codec.module.DTYPE, None
    return codec.module.dtype(**codec.options), codec.module.scale_dtype(**codec.options)


# --------------------------------------------------------------------------------------------------------------- kernel


@cache
def _plan(rule: str | Form, codecs: tuple[str | Codec, ...], p: str, g: str, weight: str | Codec | None = None) -> Plan:
    """Build the kernel of one combination; compiled, or loaded from disk, when it first runs."""
    if isinstance(rule, str) and rule not in RULES:
        raise ValueError(f"step: unknown rule {rule!r}; there are {', '.join(RULES)}")
    form = named(rule, len(codecs))
    if form is None:
        raise ValueError(f"step: {_name(rule)} does not keep {len(codecs)} states, got codecs {codecs}")
    coded = tuple(_codec(c, nonnegative) for c, (_, nonnegative) in zip(codecs, form.states, strict=True))
    kept = codec_named(weight) if isinstance(weight, str) else weight
    if kept is not None and kept.stem not in WEIGHTS:
        raise ValueError(f"step: unknown format of weights {kept.name!r}; there are {', '.join(WEIGHTS)}")
    if kept is not None and p != "bf16":
        raise TypeError(f"step: p of {kept.name} must be bfloat16 words (uint16), got {p}")
    return _compiled(form, coded, p, g, kept)


@cache
def _compiled(form: Form, codecs: tuple[Codec, ...], p: str, g: str, weight: Codec | None) -> Plan:
    scalars = len(RULES[form.stem].SCALARS)
    tables = tuple(_table(codec) for codec in codecs)
    weights = _number(p) if weight is None else _words(weight)
    serial = tiles(tables, rule_loop(len(codecs), form.make(host()), scalars), weights, _number(g))
    name = "_".join((form.name, *(codec.name for codec in codecs), weight.name if weight else p, g))
    return Plan(cached(serial, name), cached(spread(serial), name + "_parallel"), scalars, codecs, weight)


def _name(rule: str | Form) -> str:
    return rule if isinstance(rule, str) else rule.name


def _codec(codec: str | Codec, nonnegative: bool) -> Codec:
    found = codec_named(codec, nonnegative) if isinstance(codec, str) else codec
    if found.stem not in STATES:
        raise ValueError(f"step: no state is kept in {found.name!r}; there are {', '.join(STATES)}")
    return found


def _number(word: str) -> Element | None:
    """How a weight or gradient of this dtype is read and written; None is float32, which needs nothing."""
    if word == "f32":
        return None
    return (half if word == "f16" else CODECS[word]).make(host())


def _table(codec: Codec) -> Table:
    if not codec.scaled:
        return _number(codec.stem)
    made = codec.make(host())
    return Nibbles(made) if codec.module.BITS == 4 else made


def _words(weight: Codec) -> Words:
    return Words(weight.make(host()), _rest_dtype(weight) is not None, weight.module.RANDOM)
