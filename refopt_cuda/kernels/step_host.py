"""One optimizer step on the CPU: Numba loops over the scalar forms of a rule and of one codec for each state.

`step` is the entry. A tensor is cut into tiles, whole blocks of every coded state; a tile's states are decoded into
buffers that stay in the first-level cache, the rule runs over them, and the fresh states are encoded back. Each
distinct (rule, codecs, dtypes) is compiled once and kept on disk; large tensors are shared by all of Numba's threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numba
import numpy as np

from refopt_cuda.codecs import BLOCK, CODECS, ELEMENT
from refopt_cuda.codecs.forms import Block, Element
from refopt_cuda.kernels import half
from refopt_cuda.kernels.arith import host
from refopt_cuda.kernels.host_cache import cached
from refopt_cuda.kernels.host_tiles import NO_SCALES, rule_loop, spread, tiles
from refopt_cuda.rules import RULES, Form, named

__all__ = ["step"]

UNCODED_TILE = 4096
"""Elements a tile where no state has blocks."""
PARALLEL_FROM = 1 << 17
"""Elements from which a tensor is worth waking threads for."""


class Plan(NamedTuple):
    """What is compiled for one combination: `serial` runs tiles [lo, hi), `parallel` all of them on several threads."""

    serial: Callable
    parallel: Callable
    scalars: int


def step(
    rule: str | Form,
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

    rule     a form of `refopt_cuda.rules`, or a stem: its plainest form with as many states as there are codecs
    codecs   one name a state, in the rule's order: a stem of `refopt_cuda.codecs.CODECS`. A block codec takes its
             unsigned table for a state that is never negative; "dynamic8.signed" and the like choose one outright.
    p, g     C-contiguous, `prod(shape)` elements: float32, float16, or bfloat16 as its uint16 (or int16) words
    states   one dict a state: "codes" (C-contiguous, `prod(shape)` elements of the codec's dtype), and "scales"
             (float32) for a block codec
    shape    the tensor's global shape, which decides the block layout
    block    elements a block: one int, or one a state (each must divide the largest)
    scalars  `refopt_cuda.rules.row(stem, t, hyper)`
    layout   "rows" or "flat"; by default rows for two or more dimensions with a last one of at least 16

    Raises ValueError or TypeError, before anything is written, for arrays that do not fit together.
    """
    size = math.prod(shape)
    plan = _plan(rule, tuple(codecs), _word(p, "p"), _word(g, "g"))
    if len(states) != len(codecs):
        raise ValueError(f"step: {len(states)} states for {len(codecs)} codecs")
    if scalars.dtype != np.float32 or scalars.size != plan.scalars:
        got = f"{scalars.dtype}[{scalars.size}]"
        raise ValueError(f"step: scalars must be float32[{plan.scalars}] for {_name(rule)}, got {got}")
    blocks = (block,) * len(codecs) if isinstance(block, int | np.integer) else tuple(block)
    row, tile, blocks = _tiling(tuple(codecs), tuple(shape), size, blocks, layout)
    arrays = _flat(p, size, "p"), _flat(g, size, "g", written=False), *_stored(codecs, states, size, row, blocks)
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


def _flat(a: np.ndarray, size: int, name: str, written: bool = True) -> np.ndarray:
    if written and not a.flags.writeable:
        raise ValueError(f"step: {name} is updated in place and must be writeable")
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
    if tile < row and any(tile % b for b in lengths):
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
            expected = " or ".join(map(str, allowed))
            raise TypeError(f"step: {name}['codes'] of {codec} must be {expected}, got {code.dtype}")
        if not code.flags.c_contiguous or code.size != size:
            raise ValueError(f"step: {name}['codes'] must be C-contiguous with {size} elements, got shape {code.shape}")
        codes.append(code.reshape(-1).view(np.uint8) if stem in BLOCK else code.reshape(-1))
        if stem in ELEMENT:
            scales.append(NO_SCALES)
            continue
        scale, count = state["scales"], size // row * -(-row // block)
        if scale.dtype != np.float32 or not scale.flags.c_contiguous or scale.size != count:
            got = f"{scale.dtype}{scale.shape}"
            raise ValueError(f"step: {name}['scales'] of {codec} must be C-contiguous float32[{count}], got {got}")
        scales.append(scale.reshape(-1))
    return tuple(codes), tuple(scales)


@cache
def _code_dtypes(stem: str) -> tuple[np.dtype, ...]:
    codec = CODECS[stem]
    return (codec.DTYPE,) if stem in ELEMENT else (codec.SIGNED_DTYPE, codec.UNSIGNED_DTYPE)


# --------------------------------------------------------------------------------------------------------------- kernel


@cache
def _plan(rule: str | Form, codecs: tuple[str, ...], p: str, g: str) -> Plan:
    """Build the kernel of one combination; compiled, or loaded from disk, when it first runs."""
    if isinstance(rule, str) and rule not in RULES:
        raise ValueError(f"step: unknown rule {rule!r}; there are {', '.join(RULES)}")
    form = named(rule, len(codecs))
    if form is None:
        raise ValueError(f"step: {_name(rule)} does not keep {len(codecs)} states, got codecs {codecs}")
    tables = tuple(_codec(name, nonnegative) for name, (_, nonnegative) in zip(codecs, form.states, strict=True))
    scalars = len(RULES[form.stem].SCALARS)
    serial = tiles(tables, rule_loop(len(codecs), form.make(host()), scalars), _form(p), _form(g))
    name = "_".join((form.name, *codecs, p, g)).replace(".", "_")
    return Plan(cached(serial, name), cached(spread(serial), name + "_parallel"), scalars)


def _name(rule: str | Form) -> str:
    return rule if isinstance(rule, str) else rule.name


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
