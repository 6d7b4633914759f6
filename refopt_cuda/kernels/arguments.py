"""What the two twins are called with: names become forms; arrays are checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refopt_cuda import random as _random
from refopt_cuda.codecs import CODECS, STATES, WEIGHTS
from refopt_cuda.codecs import Form as Codec
from refopt_cuda.codecs import named as codec_named
from refopt_cuda.kernels import half
from refopt_cuda.rules import APART, RULES, Form, named

__all__ = ["NOTHING", "Arrays", "Combination", "Cut", "arrays", "combination", "cut", "number"]

NOTHING = np.zeros(0, np.uint16)
"""Stands in for what lies beside codes without anything."""
WORDS = {"float32": "f32", "float16": "f16", "uint16": "bf16", "int16": "bf16", "bfloat16": "bf16"}
"""The number format that an array of weights or gradients holds, by its dtype."""


class Combination(NamedTuple):
    """What one kernel is made of: a form of a rule, of a codec for each state, and the formats of weights (a number
    format, or the form of a codec that keeps something beside bfloat16 words) and of gradients."""

    rule: Form
    codecs: tuple[Codec, ...]
    weight: str | Codec
    grad: str

    @property
    def name(self) -> str:
        """A word for files and for tests."""
        weight = self.weight if isinstance(self.weight, str) else self.weight.name
        return "_".join((self.rule.name, *(codec.name for codec in self.codecs), weight, self.grad))

    @property
    def scalars(self) -> int:
        return self.rule.width

    @property
    def random(self) -> bool:
        """Whether storing the weights draws random bits."""
        return not isinstance(self.weight, str) and self.weight.module.RANDOM

    @property
    def rest_dtype(self) -> np.dtype | None:
        """Of what lies beside each weight."""
        return None if isinstance(self.weight, str) else self.weight.module.rest_dtype(**self.weight.options)


class Cut(NamedTuple):
    """How a tensor is cut: elements in all and in a row (one where the layout is flat), block length of each state, the
    largest, and how many codes and scales each state has."""

    size: int
    row: int
    blocks: tuple[int, ...]
    largest: int
    counts: tuple[tuple[int, int], ...]


class Arrays(NamedTuple):
    """Flat views: bfloat16 and float16 as uint16 words, `NOTHING` in place of what there is not."""

    p: np.ndarray
    rest: np.ndarray
    g: np.ndarray
    codes: tuple[np.ndarray, ...]
    scales: tuple[np.ndarray, ...]


def number(word: str) -> Any:
    """The module of a number format, with a `make(o)`."""
    return half if word == "f16" else CODECS[word]


@cache
def combination(
    rule: str | Form, codecs: tuple[str | Codec, ...], p: np.dtype, g: np.dtype, weight: str | Codec | None = None
) -> Combination:
    """The forms that these names mean for weights and gradients of these dtypes. ValueError, TypeError."""
    if isinstance(rule, str) and rule not in RULES | APART:
        raise ValueError(f"step: unknown rule {rule!r}; there are {', '.join(RULES)}")
    form = named(rule, len(codecs))
    if form is None:
        name = rule if isinstance(rule, str) else rule.name
        raise ValueError(f"step: {name} does not keep {len(codecs)} states, got codecs {codecs}")
    found = [_form(codec, nonnegative) for codec, (_, nonnegative) in zip(codecs, form.states, strict=True)]
    for codec in found:
        if codec.stem not in STATES:
            raise ValueError(f"step: no state is kept in {codec.name}; there are {', '.join(STATES)}")
    return Combination(form, tuple(found), _weight(p, weight), _word(g, "g"))


def _form(codec: str | Codec, nonnegative: bool) -> Codec:
    if not isinstance(codec, str):
        return codec
    try:
        return codec_named(codec, nonnegative)
    except ValueError as error:
        raise ValueError(f"step: {error}") from None


def _word(dtype: np.dtype, name: str) -> str:
    word = WORDS.get(dtype.name)
    if word is None:
        raise TypeError(f"step: {name} must be float32, float16 or bfloat16 words (uint16), got {dtype}")
    return word


def _weight(p: np.dtype, weight: str | Codec | None) -> str | Codec:
    word = _word(p, "p")
    if weight is None:
        return word
    form = _form(weight, False)
    if form.stem not in WEIGHTS:
        raise ValueError(f"step: no format of weights is named {form.name}; there are {', '.join(WEIGHTS)}")
    if word != "bf16":
        raise TypeError(f"step: p of {form.name} must be bfloat16 words (uint16), got {p}")
    return form


@cache
def cut(
    codecs: tuple[Codec, ...], shape: tuple[int, ...], block: int | tuple[int, ...], layout: str | None = None
) -> Cut:
    """Rows that are whole blocks of every state are cut as one: the list of blocks is the same. ValueError."""
    size, blocks = math.prod(shape), block if isinstance(block, tuple) else (block,) * len(codecs)
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
    lengths = [b for b, has_scales in zip(blocks, scaled, strict=True) if has_scales]
    largest = max(lengths, default=1)
    if any(largest % b for b in lengths) and largest < row:
        raise ValueError(f"step: block sizes {blocks} of one tensor must each divide the largest")
    counts = tuple(_count(codec, b, row, size) for codec, b in zip(codecs, blocks, strict=True))
    whole = size and not any(row % b for b in lengths)
    return Cut(size, size if whole else row, blocks, largest, counts)


def _count(codec: Codec, block: int, row: int, size: int) -> tuple[int, int]:
    if not codec.scaled:
        return size, 0
    rows, whole, tail = size // row, *divmod(row, block)
    codes = row if codec.module.BITS == 8 else whole * ((block + 1) // 2) + (tail + 1) // 2
    return rows * codes, rows * (whole + (tail > 0))


def arrays(
    of: Combination,
    cut: Cut,
    p: np.ndarray,
    g: np.ndarray,
    states: Sequence[dict[str, np.ndarray]],
    rest: np.ndarray | None,
) -> Arrays:
    """All arrays of a call, checked. ValueError, TypeError."""
    weights, beside = _flat(p, cut.size, "p"), _rest(of, rest, cut.size)
    if len(states) != len(of.codecs):
        raise ValueError(f"step: {len(states)} states for {len(of.codecs)} codecs")
    codes, scales = [], []
    for i, (codec, state, (count, blocks)) in enumerate(zip(of.codecs, states, cut.counts, strict=True)):
        dtype, scale_dtype = _dtypes(codec)
        code = _part(state.get("codes"), f"states[{i}]['codes']", codec, dtype, count)
        codes.append(code.view(np.uint8) if codec.scaled else code)
        if scale_dtype is None:
            scales.append(NOTHING)
            continue
        scale = _part(state.get("scales"), f"states[{i}]['scales']", codec, scale_dtype, blocks)
        scales.append(scale if scale.itemsize == 4 else scale.view(np.uint16))
    return Arrays(weights, beside, _flat(g, cut.size, "g", written=False), tuple(codes), tuple(scales))


def _flat(a: np.ndarray, size: int, name: str, written: bool = True) -> np.ndarray:
    if written and not a.flags.writeable:
        raise ValueError(f"step: {name} is updated in place and must be writeable")
    if not a.flags.c_contiguous:
        raise ValueError(f"step: {name} must be C-contiguous")
    if a.size != size:
        raise ValueError(f"step: {name} has {a.size} elements, its shape says {size}")
    a = a.reshape(-1)
    return a if a.itemsize == 4 else a.view(np.uint16)


def _rest(of: Combination, rest: np.ndarray | None, size: int) -> np.ndarray:
    if isinstance(of.weight, str) or of.rest_dtype is None:
        if rest is not None:
            raise ValueError(f"step: nothing lies beside weights in {of.name}, got a rest")
        return NOTHING
    return _part(rest, "rest", of.weight, of.rest_dtype, size)


def _part(a: np.ndarray | None, name: str, codec: Codec, dtype: np.dtype, count: int) -> np.ndarray:
    if a is None:
        raise ValueError(f"step: {codec.name} needs {name}, {dtype}[{count}]")
    if a.dtype != dtype:
        raise TypeError(f"step: {name} of {codec.name} must be {dtype}, got {a.dtype}")
    if a.size != count or not a.flags.c_contiguous or not a.flags.writeable:
        raise ValueError(
            f"step: {name} of {codec.name} must be C-contiguous, writeable {dtype}[{count}], got shape {a.shape}"
        )
    return a.reshape(-1)


@cache
def _dtypes(codec: Codec) -> tuple[np.dtype, np.dtype | None]:
    """Of the codes and of the scales."""
    if not codec.scaled:
        return codec.module.DTYPE, None
    return codec.module.dtype(**codec.options), codec.module.scale_dtype(**codec.options)


def key(of: Combination, random: tuple[int, int] | None, first: int = 0) -> tuple[np.uint64, np.int64]:
    """The key of a tensor's random bits, or of those from element `first` on, and how many of its first four are left
    out; 0 where none are drawn. ValueError."""
    if not isinstance(first, int) or first < 0:
        raise ValueError(f"step: first must be the number of an element, got {first!r}")
    if not of.random:
        return np.uint64(0), np.int64(0)
    if random is None:
        raise ValueError(f"step: {of.name} draws random bits: random must be (the step's word, the tensor's number)")
    return np.uint64((_random.key(*random) + first // 4) & _random.MASK), np.int64(first % 4)


def row(of: Combination, scalars: np.ndarray) -> np.ndarray:
    """The step's row of scalars, checked."""
    if scalars.dtype != np.float32 or scalars.size != of.scalars:
        got = f"{scalars.dtype}[{scalars.size}]"
        raise ValueError(f"step: scalars must be float32[{of.scalars}] for {of.rule.name}, got {got}")
    return scalars
