"""The records that name every rule, codec and place, and the errors that they raise.

Nothing is computed here: a record holds names, symbols, ranges, defaults, sources and byte counts, so that the
oracle (`refopt`), the fast path (`refopt_cuda`), the documentation and the tests all read one table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Array = np.ndarray


class ShapeError(ValueError):
    """An array has the wrong shape: a gradient unlike its parameter, a vector where a rule needs a matrix."""


class NonFiniteError(ValueError):
    """A gradient or a block holds NaN or Inf and the caller asked for `nonfinite="raise"`."""


class StateError(RuntimeError):
    """A state was made by another codec, block size, shape or partition than the one that reads it."""


@dataclass(frozen=True)
class Hyper:
    """One hyper-parameter: its name in code, its symbol in the paper, its default and the range it must lie in.

    `low` and `high` bound the value: `low <= value`, and `value < high` (a momentum of exactly 1 never forgets).
    """

    name: str
    symbol: str
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    torch: str = ""

    def check(self, call: str, value: Any) -> None:
        if isinstance(self.default, bool):
            if not isinstance(value, bool | np.bool_):
                raise TypeError(f"{call}: {self.name} must be True or False, got {value!r}")
            return
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{call}: {self.name} must be a number, got {value!r}")
        if not math.isfinite(value) or (self.low is not None and value < self.low):
            raise ValueError(f"{call}: {self.name} must be finite and >= {self.low:g}, got {value!r}")
        if self.high is not None and value >= self.high:
            raise ValueError(f"{call}: {self.name} must be in [{self.low:g}, {self.high:g}), got {value!r}")


@dataclass(frozen=True)
class State:
    """One array that a rule keeps between steps, of the parameter's shape.

    `nonnegative` states take a codec's unsigned table; `torch` is the key torch.optim stores the same array under.
    """

    name: str
    doc: str
    nonnegative: bool = False
    torch: str = ""


@dataclass(frozen=True)
class Rule:
    """An update rule: what it keeps, what it may be given, and the two functions that run it.

    `scope` is "element" when element i of every output depends on element i of every input alone. `tier` is the
    promise between oracle and fast path: T0 and T1 agree bit for bit, T2 to a stated tolerance.
    """

    stem: str
    title: str
    source: str
    states: tuple[State, ...]
    hypers: tuple[Hyper, ...]
    init: Callable[..., dict[str, Array]]
    update: Callable[..., tuple[Array, dict[str, Array]]]
    scope: str = "element"
    tier: str = "T0"
    together: Callable[[str, dict[str, Any]], None] | None = None

    def defaults(self) -> dict[str, Any]:
        return {h.name: h.default for h in self.hypers}

    def check(self, call: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """All hyper-parameters, defaults filled in; raises TypeError or ValueError that names the one at fault."""
        known = self.defaults()
        for name in given:
            if name not in known:
                raise TypeError(f"{call}: {self.stem} has no hyper-parameter {name!r}; it has {', '.join(known)}")
        hyper = known | dict(given)
        for h in self.hypers:
            h.check(call, hyper[h.name])
        if self.together is not None:
            self.together(call, hyper)
        return hyper

    def states_for(self, **hyper: Any) -> tuple[State, ...]:
        """The states that a run with these hyper-parameters keeps (SGD without momentum keeps none)."""
        kept = self.init(np.zeros(1, np.float32), **self.check(f"rules.{self.stem}", hyper))
        return tuple(s for s in self.states if s.name in kept)


@dataclass(frozen=True)
class Box:
    """One float32 array as a codec stores it: named arrays, the array's shape, and the codec that can read it."""

    codec: Codec
    shape: tuple[int, ...]
    arrays: dict[str, Array] = field(repr=False)

    def __getattr__(self, name: str) -> Array:
        try:
            return self.__dict__["arrays"][name]
        except KeyError:
            raise AttributeError(f"a {type(self).__name__} has no array {name!r}") from None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())

    def decode(self) -> Array:
        return self.codec.decode(self)


@dataclass(frozen=True)
class Codec:
    """A way to store a float32 array in fewer bytes.

    `pack` and `unpack` work on a flat array and the block list `bounds` (block k is x[bounds[k]:bounds[k+1]]);
    `encode` and `decode` do the same for an array of any shape. `scope` is "block" where elements of a block share a
    scale, else "element". `signed=False` asks for the table of a state that is never negative; an Optimizer does so
    by itself, unless `signed=True` was asked for by name (`sign_asked`).
    """

    stem: str
    title: str
    source: str
    scope: str
    code_dtype: Any
    code_bits: int
    pack: Callable[..., dict[str, Array]]
    unpack: Callable[..., Array]
    block: int | None = None
    layout: str | None = None
    signed: bool = True
    nonfinite: str = "propagate"
    sign_asked: bool = field(default=False, repr=False, compare=False)

    def __call__(self, **options: Any) -> Codec:
        """A copy with other options: `dynamic8(block=128)`, `int8_linear(signed=False)`."""
        allowed = {"layout", "signed", "nonfinite"} | ({"block"} if self.scope == "block" else set())
        for name in options:
            if name not in allowed:
                raise TypeError(f"codecs.{self.stem}: no option {name!r}; it takes {', '.join(sorted(allowed))}")
        block = options.get("block", self.block)
        if self.scope == "block" and (not isinstance(block, int | np.integer) or block < 1):
            raise ValueError(f"codecs.{self.stem}: block must be a whole number >= 1, got {block!r}")
        if options.get("layout") not in (None, "rows", "flat"):
            raise ValueError(f"codecs.{self.stem}: layout must be 'rows' or 'flat', got {options['layout']!r}")
        policy = options.get("nonfinite", "propagate")
        if policy not in ("propagate", "raise"):
            raise ValueError(f"codecs.{self.stem}: nonfinite must be 'propagate' or 'raise', got {policy!r}")
        return replace(self, **options, sign_asked=self.sign_asked or "signed" in options)

    def bounds(self, shape: tuple[int, ...]) -> Array:
        """The block list of a tensor of this shape: int64 offsets into the flattened tensor, last one its size."""
        from refopt.codecs import blocks

        return blocks.bounds(shape, self.block or 256, self.layout)

    def encode(self, x: Array, **options: Any) -> Box:
        """Store `x` (float32, any shape). Raises TypeError for another dtype, NonFiniteError if asked to."""
        codec = self(**options) if options else self
        x = np.asarray(x)
        if x.dtype != np.float32:
            raise TypeError(f"codecs.{self.stem}.encode: x must be float32, got {x.dtype}")
        if not codec.signed and codec.nonfinite == "raise" and (x < 0).any():
            raise ValueError(f"codecs.{self.stem}.encode: x has negative elements, the unsigned table has none")
        bounds = codec.bounds(x.shape)
        arrays = codec.pack(x.reshape(-1), bounds, codec)
        return Box(codec, x.shape, codec.shaped(x.shape, arrays))

    def decode(self, box: Box) -> Array:
        """The float32 array that `box` stands for. Raises StateError when another codec wrote it."""
        if box.codec != self and box.codec.stem != self.stem:
            raise StateError(f"codecs.{self.stem}.decode: the box was written by {box.codec.stem}")
        flat = {name: a.reshape(-1) for name, a in box.arrays.items()}
        return self.unpack(flat, box.codec.bounds(box.shape), box.codec).reshape(box.shape)

    def shaped(self, shape: tuple[int, ...], arrays: dict[str, Array]) -> dict[str, Array]:
        """Flat stored arrays in the shapes that they are kept in: codes as the tensor, scales a row a row."""
        from refopt.codecs import blocks

        grid = blocks.grid(shape, self.block or 256, self.layout)
        return {name: a.reshape(grid if name == "scales" else shape) for name, a in arrays.items()}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of a stored tensor of this shape."""
        codes = math.prod(shape) * self.code_bits // 8
        return codes + (4 * (len(self.bounds(shape)) - 1) if self.scope == "block" else 0)


@dataclass(frozen=True)
class Place:
    """Where states live and what moves when. A place changes no bit of any result.

    `pages(blocks, size)` yields the (first, last) block of each page in the order in which they are stepped.
    """

    stem: str
    title: str
    source: str
    pages: Callable[[int, int], Any]
    page_blocks: int = 0

    def __call__(self, *, page_blocks: int) -> Place:
        if page_blocks < 1:
            raise ValueError(f"places.{self.stem}: page_blocks must be >= 1, got {page_blocks!r}")
        return replace(self, page_blocks=page_blocks)
