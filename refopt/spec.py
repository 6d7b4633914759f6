"""The records that name every rule, codec and place, and the errors that they raise.

Nothing is computed here: a record holds names, symbols, ranges, defaults, sources and byte counts, so that the
oracle (`refopt`), the fast path (`refopt_cuda`), the documentation and the tests all read one table.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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
    `choices` lists the values of a named option; `whole` asks for an integer; `optional` allows None.
    """

    name: str
    symbol: str
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    torch: str = ""
    choices: tuple[Any, ...] = ()
    whole: bool = False
    optional: bool = False

    def check(self, call: str, value: Any) -> None:
        if self.optional and value is None:
            return
        if self.choices:
            if value not in self.choices:
                raise ValueError(
                    f"{call}: {self.name} must be one of {', '.join(map(repr, self.choices))}, got {value!r}"
                )
            return
        if isinstance(self.default, bool):
            if not isinstance(value, bool | np.bool_):
                raise TypeError(f"{call}: {self.name} must be True or False, got {value!r}")
            return
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{call}: {self.name} must be a number, got {value!r}")
        if self.whole and value != int(value):
            raise ValueError(f"{call}: {self.name} must be a whole number, got {value!r}")
        self._bounds(call, value)

    def _bounds(self, call: str, value: Any) -> None:
        if not math.isfinite(value) or (self.low is not None and value < self.low):
            least = "" if self.low is None else f" and >= {self.low:g}"
            raise ValueError(f"{call}: {self.name} must be finite{least}, got {value!r}")
        if self.high is not None and value >= self.high:
            raise ValueError(f"{call}: {self.name} must be in [{self.low:g}, {self.high:g}), got {value!r}")


@dataclass(frozen=True)
class State:
    """One array that a rule keeps between steps: of the parameter's shape, unless `shape` says otherwise.

    `nonnegative` states take a codec's unsigned table; `torch` is the key torch.optim stores the same array under.
    `when(hyper)` tells whether a run with these hyper-parameters keeps it, `shape(p_shape, hyper)` its shape, None
    where a parameter of that shape has none. `coded=False`: too small or too delicate to follow a codec that is named
    for all states; it takes one that is named for it alone. A state of another `dtype` is stored as it is.
    """

    name: str
    doc: str
    nonnegative: bool = False
    torch: str = ""
    when: Callable[[dict[str, Any]], bool] | None = None
    shape: Callable[[tuple[int, ...], dict[str, Any]], tuple[int, ...] | None] | None = None
    coded: bool = True
    dtype: Any = np.float32

    def shape_for(self, shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...] | None:
        """The state's shape for a parameter of this shape, None if it has no such state."""
        if self.when is not None and not self.when(hyper):
            return None
        return shape if self.shape is None else self.shape(shape, hyper)

    def size(self, hyper: dict[str, Any]) -> str:
        """How large it is, in words; a shape is that for a matrix of (1024, 512)."""
        form = self.shape_for((1024, 512), hyper)
        if form is None:
            return "none of a matrix by default"
        wide = np.dtype(self.dtype)
        return f"{wide.itemsize} bytes a weight" if form == (1024, 512) else f"{wide} {form}"


@dataclass(frozen=True)
class Rule:
    """An update rule: what it keeps, what it may be given, and the two functions that run it.

    `scope` is "element" when element i of every output depends on element i of every input alone (`update` is then
    given any stretch of the flattened tensor), "tensor" when a sum or a maximum over rows, columns, blocks or the whole
    tensor enters, "matrix" when a product of matrices does (`update` is given whole tensors in their shape). `tier`
    is the promise between oracle and fast path: T0 and T1 agree bit for bit, T2 to a stated tolerance. `together`
    checks hyper-parameters against one another, `fits(call, shape, hyper)` a parameter's shape. A rule that is
    `random` is given `seed`, and `tensor`, the parameter's number, so that no two parameters draw the same bits.
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
    fits: Callable[[str, tuple[int, ...], dict[str, Any]], None] | None = None
    random: bool = False

    def __str__(self) -> str:
        """What a person asks first: whose rule it is, what it keeps, what it takes."""
        hyper = self.defaults()
        keeps = [f"  {s.name:<8} {s.doc}{', never negative' * s.nonnegative}: {s.size(hyper)}" for s in self.states]
        takes = [f"  {f'{h.name}={h.default!r}':<24} {h.doc}" for h in self.hypers]
        lines = [
            f"{self.title}: {self.source}",
            "keeps, of a matrix of (1024, 512) and before any codec:",
            *keeps,
            "takes:",
            *takes,
        ]
        return "\n".join(lines)

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
        checked = self.check(f"rules.{self.stem}", hyper)
        return tuple(s for s in self.states if s.when is None or s.when(checked))

    def shapes(self, shape: tuple[int, ...], hyper: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shape of each state of a parameter of this shape, in the record's order."""
        every = {s.name: s.shape_for(shape, hyper) for s in self.states}
        return {name: found for name, found in every.items() if found is not None}


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
class Part:
    """One array of a codec. `per` tells how many entries it has: one an "element", half an element rounded up in
    each block ("nibble"), one a "block", one a "group" of 256 blocks, one a "tensor", one for each index of each
    "axis" (a "block" where the tensor has a single axis, or none)."""

    name: str
    dtype: Any
    per: str = "element"

    def count(self, shape: tuple[int, ...], bounds: Array) -> int:
        """Entries for a tensor of this shape and block list."""
        n, blocks = math.prod(shape), len(bounds) - 1
        if self.per == "nibble":
            return int(((np.diff(bounds) + 1) // 2).sum())
        axis = sum(shape) if len(shape) >= 2 else blocks
        return {"element": n, "group": -(-blocks // 256), "block": blocks, "tensor": 1, "axis": axis}[self.per]


CODES = Part("codes", np.uint8)
SCALES = Part("scales", np.float32, "block")


@dataclass(frozen=True)
class Codec:
    """A way to store a float32 array in fewer bytes.

    `pack` and `unpack` work on a flat array and the block list `bounds` (block k is x[bounds[k]:bounds[k+1]]);
    `encode` and `decode` do the same for an array of any shape. `parts` are the arrays that it stores, the first
    always `codes`. `scope` is "element" where each element is coded alone, "block" where those of a block share a
    scale, "tensor" where more than a block must be seen.

    `needs` lists what `pack` is given besides: "random" (uint16 bits, one an element), "old" (the flat arrays that
    are being replaced, or None), "shape" (also given to `unpack`). `signed=False` asks for the table of a state that
    is never negative, where there is one (`unsigned`); an Optimizer does so by itself, unless `signed=True` was asked
    for by name (`sign_asked`). `modes` lists further options and their values, the first being the default, `mode`
    those chosen; `settle` returns the record with what follows from them. `weights`: made for `p`.
    """

    stem: str
    title: str
    source: str
    scope: str
    parts: tuple[Part, ...]
    pack: Callable[..., dict[str, Array]]
    unpack: Callable[..., Array]
    block: int | None = None
    layout: str | None = None
    signed: bool = True
    unsigned: bool = False
    nonfinite: str = "propagate"
    needs: tuple[str, ...] = ()
    weights: bool = False
    modes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)
    mode: Mapping[str, Any] = field(default_factory=dict, hash=False)
    settle: Callable[[Codec], Codec] | None = None
    sign_asked: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        chosen = {name: values[0] for name, values in self.modes.items()} | dict(self.mode)
        object.__setattr__(self, "mode", chosen)

    def __call__(self, **options: Any) -> Codec:
        """A copy with other options: `dynamic8(block=128)`, `int8_linear(signed=False)`, `fp8(format="e5m2")`."""
        self._check_options(options)
        mode = dict(self.mode) | {k: options.pop(k) for k in self.modes if k in options}
        chosen = replace(self, **options, mode=mode, sign_asked=self.sign_asked or "signed" in options)
        return chosen if self.settle is None else self.settle(chosen)

    def _check_options(self, options: dict[str, Any]) -> None:
        allowed = {"layout", "nonfinite", *self.modes} | ({"block"} if self.block else set())
        allowed |= {"signed"} if self.unsigned else set()
        for name, value in options.items():
            if name not in allowed:
                raise TypeError(f"codecs.{self.stem}: no option {name!r}; it takes {', '.join(sorted(allowed))}")
            values = {"layout": (None, "rows", "flat"), "nonfinite": ("propagate", "raise"), **self.modes}.get(name)
            if values and value not in values:
                shown = " or ".join(repr(v) for v in values if v is not None)
                raise ValueError(f"codecs.{self.stem}: {name} must be {shown}, got {value!r}")
        block = options.get("block", self.block)
        if self.block and (not isinstance(block, int | np.integer) or block < 1):
            raise ValueError(f"codecs.{self.stem}: block must be a whole number >= 1, got {block!r}")

    def bounds(self, shape: tuple[int, ...]) -> Array:
        """The block list of a tensor of this shape: int64 offsets into the flattened tensor, last one its size."""
        from refopt.codecs import blocks

        return blocks.bounds(shape, self.block or 256, self.layout)

    def encode(self, x: Array, *, old: Any = None, random: Array | None = None, **options: Any) -> Box:
        """Store `x` (float32, any shape). Raises TypeError for another dtype, NonFiniteError if asked to.

        random: uint16 bits, one an element, for a codec that rounds by chance (`refopt.rng.r16` draws them);
        old: the Box that is being replaced, for one that carries an error along.
        """
        codec = self(**options) if options else self
        x = np.asarray(x)
        if x.dtype != np.float32:
            raise TypeError(f"codecs.{self.stem}.encode: x must be float32, got {x.dtype}")
        if not codec.signed and codec.nonfinite == "raise" and (x < 0).any():
            raise ValueError(f"codecs.{self.stem}.encode: x has negative elements, the unsigned table has none")
        if "random" in codec.needs and (random is None or random.size != x.size or random.dtype != np.uint16):
            raise TypeError(f"codecs.{self.stem}.encode: random must be uint16 bits, one an element, got {random!r}")
        flat = old and {name: a.reshape(-1) for name, a in old.arrays.items()}
        given = {"random": None if random is None else random.reshape(-1), "old": flat, "shape": x.shape}
        arrays = codec.pack(x.reshape(-1), codec.bounds(x.shape), codec, **codec.given(given))
        return Box(codec, x.shape, codec.shaped(x.shape, arrays))

    def decode(self, box: Box) -> Array:
        """The float32 array that `box` stands for. Raises StateError when another codec wrote it."""
        if box.codec != self and box.codec.stem != self.stem:
            raise StateError(f"codecs.{self.stem}.decode: the box was written by {box.codec.stem}")
        flat = {name: a.reshape(-1) for name, a in box.arrays.items()}
        shape = box.codec.given({"shape": box.shape})
        return self.unpack(flat, box.codec.bounds(box.shape), box.codec, **shape).reshape(box.shape)

    def given(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """What this codec needs of what is offered."""
        return {name: offered[name] for name in self.needs if name in offered}

    def shaped(self, shape: tuple[int, ...], arrays: dict[str, Array]) -> dict[str, Array]:
        """Flat stored arrays in the shapes that they are kept in: codes as the tensor, scales a row a row."""
        per = {part.name: part.per for part in self.parts}
        return {name: a.reshape(self._shape_of(per[name], shape, a.size)) for name, a in arrays.items()}

    def _shape_of(self, per: str, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        from refopt.codecs import blocks

        if per == "element":
            return shape
        if per == "block":
            return blocks.grid(shape, self.block or 256, self.layout)
        if per == "nibble" and size and blocks.layout_of(shape, self.layout) == "rows":
            return (*shape[:-1], size // math.prod(shape[:-1]))
        return () if per == "tensor" else (size,)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of a stored tensor of this shape."""
        bounds = self.bounds(shape)
        return sum(part.count(shape, bounds) * np.dtype(part.dtype).itemsize for part in self.parts)


class Move(NamedTuple):
    """Bytes that a place moves in a step: whose they are, the way they go ("host>device"), and how many."""

    what: str
    way: str
    bytes: int


class Peak(NamedTuple):
    """The most bytes that are held at once, by where they are."""

    device: int = 0
    host: int = 0
    disk: int = 0


class Load(NamedTuple):
    """The bytes that one tensor brings to a step: weights, gradient, and each state's share of each page."""

    p: int
    g: int
    pages: tuple[Mapping[str, int], ...]

    @property
    def states(self) -> int:
        return sum(sum(page.values()) for page in self.pages)

    @property
    def page(self) -> int:
        """The largest page."""
        return max((sum(page.values()) for page in self.pages), default=0)


@dataclass(frozen=True)
class Place:
    """Where states live and what moves when. A place changes no bit of any result.

    `pages(blocks, size)` yields the (first, last) block of each page in the order in which they are stepped. `links`
    names the way of what moves: "g" and "p" once a tensor, before and after its pages; "in" and "out" every state of
    every page. `peak(loads, buffers)` is the most that is held at once, with room for `buffers` pages. `shelf` opens
    the store that a step's new states are written to, where that is not memory; `path` is its directory.
    """

    stem: str
    title: str
    source: str
    pages: Callable[[int, int], Any]
    peak: Callable[[Sequence[Load], int], Peak]
    links: Mapping[str, str] = field(default_factory=dict, hash=False)
    options: tuple[str, ...] = ()
    page_blocks: int = 0
    buffers: int = 2
    shelf: Callable[[Place], Any] | None = None
    path: Any = None

    def __call__(self, **options: Any) -> Place:
        """A copy with other options: `paged(page_blocks=3)`, `disk(path="/scratch")`."""
        for name, value in options.items():
            if name not in self.options:
                takes = ", ".join(self.options) or "none"
                raise TypeError(f"places.{self.stem}: no option {name!r}; it takes {takes}")
            if name == "path":
                if not isinstance(value, str | os.PathLike):
                    raise TypeError(f"places.{self.stem}: path must name a directory, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"places.{self.stem}: {name} must be >= 1 and whole, got {value!r}")
        return replace(self, **options)

    def moves(self, loads: Sequence[Load]) -> Iterator[Move]:
        """The schedule of one step over these tensors: every move, in order."""
        for load in loads:
            if "g" in self.links:
                yield Move("g", self.links["g"], load.g)
            for page in load.pages:
                for way in (self.links[k] for k in ("in", "out") if k in self.links):
                    yield from (Move(what, way, n) for what, n in page.items())
            if "p" in self.links:
                yield Move("p", self.links["p"], load.p)
