"""Stored arrays, opened by stretches: what a step reads and writes of one tensor, a page at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refopt import rng
from refopt.codecs import blocks
from refopt.spec import Array, Box, Codec

f32 = np.float32


class Cell:
    """One stored array. A stretch is elements [a, b) of the flattened tensor, from the start of a block to the end of
    one; an array of another shape than its parameter is only ever opened whole."""

    def __init__(self, codec: Codec, have: Any) -> None:
        self.codec, self.shape = codec, have.shape
        self.boxed = isinstance(have, Box)
        arrays = have.arrays if isinstance(have, Box) else {"codes": have}
        self.arrays = {n: a.reshape(-1).copy() for n, a in arrays.items()}
        self.bounds = codec.bounds(self.shape)
        self.size = math.prod(self.shape)

    def load(self, a: int, b: int) -> Array:
        """The stretch, decoded, flat."""
        if not self.boxed:
            return self.arrays["codes"][a:b].copy()
        at, bounds = self._cut(a, b)
        shape = self.codec.given({"shape": self.shape})
        return self.codec.unpack({n: x[at[n]] for n, x in self.arrays.items()}, bounds, self.codec, **shape)

    def store(self, a: int, b: int, x: Array) -> None:
        """Encode the stretch; x is flat."""
        if not self.boxed:
            self.arrays["codes"][a:b] = x
            return
        at, bounds = self._cut(a, b)
        given = self.codec.given({"old": {n: x[at[n]] for n, x in self.arrays.items()}, "shape": self.shape})
        for n, new in self.codec.pack(x, bounds, self.codec, **given, **self._drawn(a, b)).items():
            self.arrays[n][at[n]] = new

    def stored(self) -> Any:
        """As `Optimizer` hands it back: a Box, or the array itself where nothing is coded."""
        if not self.boxed:
            return self.arrays["codes"].reshape(self.shape)
        return Box(self.codec, self.shape, self.codec.shaped(self.shape, self.arrays))

    def _drawn(self, a: int, b: int) -> dict[str, Array]:
        return {}

    def _cut(self, a: int, b: int) -> tuple[dict[str, slice], Array]:
        """Where the stretch lies in each stored array, and its own block list."""
        i, j = (int(k) for k in np.searchsorted(self.bounds, (a, b)))
        cuts = {"element": slice(a, b), "block": slice(i, j)}
        if any(part.per == "nibble" for part in self.codec.parts):
            cuts["nibble"] = slice(*(int(k) for k in blocks.byte_starts(self.bounds)[[i, j]]))
        at = {part.name: cuts.get(part.per, slice(None)) for part in self.codec.parts}
        return at, self.bounds[i : j + 1] - a


class Weights(Cell):
    """The weights: visible in float32, stored by the codec of `p`, whose further arrays lie in the state."""

    def __init__(self, codec: Codec, p: Array, kept: Box | None, key: int) -> None:
        self.p, self.key = p, key
        arrays = {"codes": p} if kept is None else {"codes": codec.encode(p).codes, **kept.arrays}
        super().__init__(codec, Box(codec, p.shape, arrays))
        self.out = p.reshape(-1).copy()

    def load(self, a: int, b: int) -> Array:
        """What the rule steps: the visible weights, or what they and the further arrays make together."""
        return super().load(a, b) if len(self.codec.parts) > 1 else self.p.reshape(-1)[a:b]

    def store(self, a: int, b: int, x: Array) -> None:
        if len(self.codec.parts) > 1:
            super().store(a, b, x)
            self.out[a:b] = visible(self.arrays["codes"][a:b])
            return
        _, bounds = self._cut(a, b)
        self.out[a:b] = visible(self.codec.pack(x, bounds, self.codec, **self._drawn(a, b))["codes"])

    def extras(self) -> dict[str, Box]:
        """What the state keeps of the weights, if anything."""
        if len(self.codec.parts) == 1:
            return {}
        arrays = {n: a for n, a in self.stored().arrays.items() if n != "codes"}
        return {"p": Box(self.codec, self.shape, arrays)}

    def _drawn(self, a: int, b: int) -> dict[str, Array]:
        return {"random": rng.r16(self.key, a, b - a)} if "random" in self.codec.needs else {}


def visible(codes: Array) -> Array:
    """Weight codes as float32: bfloat16 words are the upper halves of float32 words."""
    return (codes.astype(np.uint32) << 16).view(f32) if codes.dtype == np.uint16 else codes


def put(codec: Codec, x: Array) -> Any:
    """A state as it is first stored."""
    return x if codec.stem == "f32" else codec.encode(x)
