"""Stored arrays, opened by pages: what a step reads and writes of one tensor, a stretch of its elements at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from refopt import rng
from refopt.codecs import blocks
from refopt.spec import Array, Box, Codec, Place

f32 = np.float32
Make = Callable[[str, Mapping[str, tuple[Any, int]]], Mapping[str, Any]]
"""Makes the flat arrays that a new state is written to: (name, {part: (dtype, size)}) to {part: array}."""


def memory(name: str, sizes: Mapping[str, tuple[Any, int]]) -> dict[str, Array]:
    """New states in memory, where a place has no other shelf."""
    return {part: np.empty(size, dtype) for part, (dtype, size) in sizes.items()}


@contextmanager
def _memory() -> Iterator[Make]:
    yield memory


def shelf(place: Place) -> AbstractContextManager[Make]:
    """Where a place keeps new states; what it made is kept if the block ends without an error."""
    return place.shelf(place) if place.shelf is not None else _memory()


def cut(codec: Codec, shape: tuple[int, ...], bounds: Array, a: int, b: int) -> dict[str, slice]:
    """Where elements [a, b) of a tensor lie in each array that its codec stores."""
    i, j = (int(k) for k in np.searchsorted(bounds, (a, b)))
    cuts = {"element": slice(a, b), "block": slice(i, j)}
    if any(part.per == "nibble" for part in codec.parts):
        cuts["nibble"] = slice(*(int(k) for k in blocks.byte_starts(bounds)[[i, j]]))
    return {part.name: cuts.get(part.per, slice(0, part.count(shape, bounds))) for part in codec.parts}


@lru_cache(maxsize=1024)
def stretch_bytes(codec: Codec, dtype: Any, shape: tuple[int, ...], a: int, b: int) -> int:
    """Bytes that elements [a, b) of a stored tensor take; `dtype` is that of a state that no codec takes."""
    if codec.stem == "f32":
        return (b - a) * np.dtype(dtype).itemsize
    at, wide = cut(codec, shape, codec.bounds(shape), a, b), {p.name: np.dtype(p.dtype).itemsize for p in codec.parts}
    return sum((s.stop - s.start) * wide[n] for n, s in at.items())


@dataclass(frozen=True)
class Share:
    """A rank's share of a stored array: the codec, and its arrays' stretches, flat. It cannot be decoded alone."""

    codec: Codec
    arrays: dict[str, Any] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())


def differ(codec: Codec, other: Codec) -> bool:
    """Whether one could not read what the other wrote."""
    return any(getattr(codec, x) != getattr(other, x) for x in ("stem", "block", "layout", "signed", "mode"))


class Cell:
    """One stored array of a tensor. `fetch` brings a page in, `load` decodes it, `store` encodes into it, `flush` takes
    it out, to where the new state is kept; the old one is never written.

    A page is elements [a, b) of the flattened tensor, from the start of a block to the end of one; an array of another
    shape than its parameter is only ever one page. `have` is a Box, an array, or a rank's Share of either, and then
    `window` says of what: elements [first, last) of a tensor of that shape.
    """

    def __init__(self, codec: Codec, have: Any, make: Make = memory, name: str = "", window: Any = None) -> None:
        self.codec, self.have, self.name = codec, have, name
        self.shape, first, last = window or (have.shape, 0, math.prod(have.shape))
        self.size = math.prod(self.shape)
        self.bounds = codec.bounds(self.shape)
        self.boxed = isinstance(have, Box) or (isinstance(have, Share) and codec.stem != "f32")
        arrays = have.arrays if isinstance(have, Box | Share) else {"codes": have}
        self.arrays = {n: a.reshape(-1) for n, a in arrays.items()}
        self.new = make(name, {n: (a.dtype, a.size) for n, a in self.arrays.items()})
        self.first = {n: s.start for n, s in cut(codec, self.shape, self.bounds, first, last).items()}
        self.page: dict[str, Array] = {}

    def fetch(self, a: int, b: int) -> int:
        """Bring elements [a, b) in; returns the bytes that this takes."""
        self.open(a, b)
        self.page = {n: np.array(x[self.at[n]]) for n, x in self.arrays.items()}
        return sum(x.nbytes for x in self.page.values())

    def load(self) -> Array:
        """The page, decoded, flat."""
        if not self.boxed:
            return self.page["codes"].copy()
        shape = self.codec.given({"shape": self.shape})
        return self.codec.unpack(self.page, self.cuts, self.codec, **shape)

    def store(self, x: Array) -> None:
        """Encode into the page; x is flat."""
        if not self.boxed:
            self.page["codes"][...] = x
            return
        given = self.codec.given({"old": self.page, "shape": self.shape})
        self.page = self.codec.pack(x, self.cuts, self.codec, **given, **self._drawn())

    def flush(self) -> int:
        """Take the page out; returns the bytes that this takes."""
        for n, x in self.page.items():
            self.new[n][self.at[n]] = x
        return sum(x.nbytes for x in self.page.values())

    def stored(self) -> Any:
        """The new state, in the form of the old."""
        if isinstance(self.have, Share):
            return Share(self.codec, dict(self.new))
        if not self.boxed:
            return self.new["codes"].reshape(self.shape)
        return Box(self.codec, self.shape, self.codec.shaped(self.shape, dict(self.new)))

    def open(self, a: int, b: int) -> None:
        """Find elements [a, b) in each stored array (`at`), and the page's own block list (`cuts`)."""
        i, j = (int(k) for k in np.searchsorted(self.bounds, (a, b)))
        at = cut(self.codec, self.shape, self.bounds, a, b)
        self.at = {n: slice(s.start - self.first[n], s.stop - self.first[n]) for n, s in at.items()}
        self.cuts, self.a, self.b = self.bounds[i : j + 1] - a, a, b

    def _drawn(self) -> dict[str, Array]:
        return {}


class Weights(Cell):
    """The weights: visible in float32, stored by the codec of `p`, whose further arrays lie in the state."""

    def __init__(self, codec: Codec, p: Array, kept: Any, key: int, make: Make = memory, window: Any = None) -> None:
        shape, first, _ = window or (p.shape, 0, p.size)
        kept = Box(codec, p.shape, {}) if kept is None else kept
        super().__init__(codec, kept, make if len(codec.parts) > 1 else memory, "p", (shape, first, first + p.size))
        self.p, self.key, self.start = p.reshape(-1), key, first
        self.out, self.further = self.p.copy(), len(codec.parts) > 1

    def fetch(self, a: int, b: int) -> int:
        size = super().fetch(a, b)
        self.here = slice(a - self.start, b - self.start)
        if self.further:
            self.page = {"codes": self.codec.encode(self.p[self.here]).codes, **self.page}
        return size

    def load(self) -> Array:
        """What the rule steps: the visible weights, or what they and the further arrays make together."""
        return super().load() if self.further else self.p[self.here]

    def store(self, x: Array) -> None:
        given = self.codec.given({"old": self.page, "shape": self.shape})
        self.page = self.codec.pack(x, self.cuts, self.codec, **given, **self._drawn())
        self.out[self.here] = visible(self.page["codes"])

    def flush(self) -> int:
        self.page = {n: x for n, x in self.page.items() if n != "codes"}
        return super().flush()

    def extras(self) -> dict[str, Any]:
        """What the state keeps of the weights, if anything."""
        return {"p": self.stored()} if self.further else {}

    def _drawn(self) -> dict[str, Array]:
        return {"random": rng.r16(self.key, self.a, self.b - self.a)} if "random" in self.codec.needs else {}


def visible(codes: Array) -> Array:
    """Weight codes as float32: bfloat16 words are the upper halves of float32 words."""
    return (codes.astype(np.uint32) << 16).view(f32) if codes.dtype == np.uint16 else codes


def put(codec: Codec, x: Array, make: Make = memory, name: str = "") -> Any:
    """A state as it is first stored."""
    have = x if codec.stem == "f32" else codec.encode(x)
    if make is memory or not x.size:
        return have
    cell = Cell(codec, have, make, name)
    cell.fetch(0, cell.size)
    cell.flush()
    return cell.stored()
