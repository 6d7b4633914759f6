"""One optimizer step on the CPU: Numba loops over the scalar forms of a rule and of one codec for each state.

`step` is the entry. A tensor is cut into tiles, whole blocks of every coded state; a tile's states are decoded into
buffers that stay in the first-level cache, the rule runs over them, and the fresh states are encoded back. Each
distinct (rule, codecs, formats) is compiled once and kept on disk; large tensors are shared by all of Numba's threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numba
import numpy as np

from refopt_cuda.codecs import Form as Codec
from refopt_cuda.codecs.forms import Element
from refopt_cuda.kernels import arguments
from refopt_cuda.kernels.arguments import Combination, Cut
from refopt_cuda.kernels.arith import host
from refopt_cuda.kernels.host_cache import cached
from refopt_cuda.kernels.host_tiles import POOL, Nibbles, Table, Words, rule_loop, spread, tiles
from refopt_cuda.rules import Form

__all__ = ["step"]

TILE = 2048
"""Elements a tile, or the largest block where that is longer: weights and gradients are fetched ahead in long runs,
and buffers still stay in the first-level cache."""
UNCODED_TILE = 4096
"""Elements a tile where no state has blocks."""
PARALLEL_FROM = 1 << 17
"""Elements from which a tensor is worth waking threads for."""


class Plan(NamedTuple):
    """What is compiled for one combination: `serial` runs tiles [lo, hi), `parallel` all of them on several threads."""

    serial: Callable
    parallel: Callable


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
    first    of a piece of a tensor (whole blocks of every state): the number of its first element there

    Raises ValueError or TypeError, before anything is written, for arrays that do not fit together.
    """
    of = arguments.combination(rule, tuple(codecs), p.dtype, g.dtype, weight)
    cut = arguments.cut(of.codecs, tuple(shape), tuple(block) if isinstance(block, Sequence) else block, layout)
    arrays, key = arguments.arrays(of, cut, p, g, states, rest), arguments.key(of, random, first)
    row, plan = arguments.row(of, scalars), _plan(of)
    tile, count = _tiles(cut, any(codec.scaled for codec in of.codecs))
    if count == 0:
        return
    if cut.size < PARALLEL_FROM or count == 1:
        plan.serial(*arrays, row, cut.blocks, cut.row, tile, key, 0, count)
    else:
        with POOL:
            plan.parallel(*arrays, row, cut.blocks, cut.row, tile, key, count, numba.get_num_threads())


@cache
def _tiles(cut: Cut, coded: bool) -> tuple[int, int]:
    """Elements a tile, whole blocks, and how many tiles there are."""
    whole = (TILE if coded else UNCODED_TILE) // cut.largest
    tile = cut.largest * min(max(whole, 1), -(-cut.row // cut.largest))
    return tile, cut.size // cut.row * -(-cut.row // tile)


@cache
def _plan(of: Combination) -> Plan:
    """Build the kernel of one combination; compiled, or loaded from disk, when it first runs."""
    loop = rule_loop(len(of.codecs), of.rule.make(host()), of.scalars)
    serial = tiles([_table(codec) for codec in of.codecs], loop, _weight(of.weight), _number(of.grad))
    return Plan(cached(serial, of.name), cached(spread(serial), of.name + "_parallel"))


@cache
def _number(word: str) -> Element | None:
    """How a weight or gradient of this format is read and written; None is float32, which needs nothing."""
    return None if word == "f32" else arguments.number(word).make(host())


@cache
def _weight(weight: str | Codec) -> Table:
    if isinstance(weight, str):
        return _number(weight)
    rests = weight.module.rest_dtype(**weight.options) is not None
    return Words(weight.make(host()), rests, weight.module.RANDOM)


@cache
def _table(codec: Codec) -> Table:
    if not codec.scaled:
        return _number(codec.stem)
    made = codec.make(host())
    return Nibbles(made) if codec.module.BITS == 4 else made
