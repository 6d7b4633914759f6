"""decode -> rule -> encode: the one file that knows all three axes, and `Optimizer`, which runs it over many tensors.

The weights move by the *fresh* states, as every library does: encoding happens after, so that a first step from zero
states has the bits of the uncoded rule. With `reads="stored"` each state is encoded as soon as its line has run, and
what it decodes to takes its place in the lines below. A place decides only in which pages the block list is walked,
and where new states are written.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from refopt import codecs as _codecs
from refopt import places as _places
from refopt import rng
from refopt import rules as _rules
from refopt.assign import assign, called, lookup, page_list
from refopt.cells import Cell, Make, Weights, differ, memory, put, shelf, stretch_bytes
from refopt.codecs import blocks
from refopt.lines import Stops, stepping
from refopt.reduce import squares, total
from refopt.spec import Array, Box, Codec, Load, Move, NonFiniteError, Peak, Place, Rule, ShapeError, State, StateError
from refopt.trees import Params, leaves, rebuild

f32 = np.float32
TORCH_WORDS = {"weight_decay": "wd", "betas": ("beta1", "beta2")}
Window = tuple[tuple[int, ...], int, int]
"""A rank's share of a tensor: the tensor's shape, and the first and past last element of the share."""


class Optimizer:
    """Any rule, with a codec for each thing it stores, in a place. Pure: nothing that is passed in is changed.

    - rule: a stem ("adamw") or a record (`rules.adamw`)
    - codecs: None, one codec for every state, or {role: codec}; roles are `p` and the rule's states
    - place: "resident", "paged", "host", or a record such as `places.disk(path="/scratch")`
    - min_size: tensors with fewer elements keep float32 states
    - maximize: climb instead of descend; gscale: multiplies every gradient first (1 / loss scale)
    - max_norm: gradients whose joint norm, after gscale, is larger are scaled to it: the norm is a float64 sum over the
      tensors in their order (`refopt.reduce`), gscale becomes gscale min(1, max_norm / (norm + 1e-6)), rounded once
    - reads: "fresh": the weights move by the states as computed; "stored": by what their codecs keep of them
    - seed: of the random bits of codecs and rules that draw them (`refopt.rng`)
    - nonfinite: "propagate" (IEEE), "raise" (NonFiniteError before anything is computed) or "skip" (that parameter)
    - delay: 1: each step applies the gradient of the step before, which waits in the state (ZeRO-Offload's delayed
      update); `finish` applies the last. The first `warm` steps of a tensor are without delay
    - hyper: the rule's own names, or torch's: weight_decay, betas

    `params` and `grads` are a float32 array, or a list, tuple or dict of them; a gradient of None is skipped and its
    step count stays. The state is a list of dicts, one a tensor: `t`, each state as an array or a Box and, with a
    delay, the gradient that is `pending`. `watch`, if set, is called with each `Move` that a step makes.
    """

    def __init__(
        self,
        rule: str | Rule,
        codecs: Any = None,
        place: str | Place = "resident",
        *,
        min_size: int = 0,
        maximize: bool = False,
        gscale: float = 1.0,
        max_norm: float | None = None,
        nonfinite: str = "propagate",
        reads: str = "fresh",
        seed: int = 0,
        delay: int = 0,
        warm: int = 0,
        **hyper: Any,
    ) -> None:
        self.rule: Rule = lookup("rule", _rules.RULES, rule)
        self.place: Place = lookup("place", _places.PLACES, place)
        self.hyper = self.rule.check(f"Optimizer({self.rule.stem!r})", self._translate(hyper))
        self.states = self.rule.states_for(**self.hyper)
        self.codecs = assign(self.rule, self.states, codecs)
        self.block, self.layout = page_list(self.codecs, [s.name for s in self.states])
        if nonfinite not in ("propagate", "raise", "skip"):
            raise ValueError(f"Optimizer: nonfinite must be 'propagate', 'raise' or 'skip', got {nonfinite!r}")
        if reads not in ("fresh", "stored"):
            raise ValueError(f"Optimizer: reads must be 'fresh' or 'stored', got {reads!r}")
        if not math.isfinite(gscale):
            raise ValueError(f"Optimizer: gscale must be finite, got {gscale!r}")
        if max_norm is not None and not (math.isfinite(max_norm) and max_norm > 0):
            raise ValueError(f"Optimizer: max_norm must be finite and above 0, got {max_norm!r}")
        if delay not in (0, 1) or isinstance(delay, bool):
            raise ValueError(f"Optimizer: delay must be 0 or 1, got {delay!r}")
        for name, number in (("warm", warm), ("min_size", min_size)):
            if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0:
                raise ValueError(f"Optimizer: {name} must be whole and >= 0, got {number!r}")
        if "path" in self.place.options and self.place.path is None:
            raise ValueError(
                f"Optimizer: places.{self.place.stem} needs a directory: places.{self.place.stem}(path=...)"
            )
        self.min_size, self.nonfinite, self.reads, self.seed = min_size, nonfinite, reads, seed
        self.delay, self.warm = delay, warm
        self.watch: Callable[[Move], Any] | None = None
        self.max_norm, self.factor = max_norm, float(-gscale if maximize else gscale)
        self.gscale = f32(self.factor)

    def _translate(self, hyper: dict[str, Any]) -> dict[str, Any]:
        """torch's words into ours."""
        out: dict[str, Any] = {}
        for name, value in hyper.items():
            ours = TORCH_WORDS.get(name, name)
            if isinstance(ours, tuple) and not (isinstance(value, list | tuple) and len(value) == len(ours)):
                raise ValueError(f"Optimizer({self.rule.stem!r}): {name} must be ({', '.join(ours)}), got {value!r}")
            new = dict(zip(ours, value, strict=True)) if isinstance(ours, tuple) else {str(ours): value}
            for twice in new.keys() & (out.keys() | hyper.keys() - {name}):
                raise TypeError(f"Optimizer({self.rule.stem!r}): {twice} is given twice, once as {name}")
            out |= new
        return out

    def init(self, params: Params) -> list[dict[str, Any]]:
        """Zero states, each in its codec. Raises TypeError for weights that are not float32."""
        with shelf(self.place) as make:
            return [self._init_one(k, p, make) for k, p in enumerate(leaves("init", "params", params))]

    def step(
        self, params: Params, grads: Params, state: list[dict[str, Any]], **now: Any
    ) -> tuple[Params, list[dict[str, Any]]]:
        """One step over every tensor. Everything is checked before anything is computed.

        `now` changes hyper-parameters for this step alone, as a schedule of the learning rate does: `lr=...`.
        """
        ps, gs, hyper = self.checked("step", params, grads, state, now)
        run = enumerate(zip(ps, gs, state, strict=True))
        opt = self.clipped([self.due(g, s)[0] for g, s in zip(gs, state, strict=True)])
        with shelf(self.place) as make:
            done = [opt._apply(k, p, g, s, hyper, make) for k, (p, g, s) in run]
        return rebuild(params, [p for p, _ in done]), [s for _, s in done]

    def checked(
        self, call: str, params: Params, grads: Params, state: list[dict[str, Any]], now: dict[str, Any]
    ) -> tuple[list[Array], list[Array | None], dict[str, Any]]:
        """Weights, usable gradients and hyper-parameters of a step; raises for what must not be stepped."""
        ps, gs = leaves(call, "params", params), leaves(call, "grads", grads, like=params)
        if not len(ps) == len(gs) == len(state):
            raise ShapeError(f"{call}: {len(ps)} params, {len(gs)} grads and {len(state)} states: one each is needed")
        hyper = self.rule.check(call, self.hyper | self._translate(now)) if now else self.hyper
        gs = [self._check_one(k, p, g, s) for k, (p, g, s) in enumerate(zip(ps, gs, state, strict=True))]
        return ps, gs, hyper

    def clipped(self, grads: Sequence[Array | None]) -> Optimizer:
        """The optimizer of a step that applies these gradients: its gscale keeps their norm within max_norm."""
        if self.max_norm is None:
            return self
        squared = 0.0
        with np.errstate(all="ignore"):
            for g in grads:
                squared += total(squares(g)) if g is not None and g.size else 0.0
            cut = self.max_norm / (np.abs(self.factor) * np.sqrt(np.float64(squared)) + 1e-6)
        out = copy.copy(self)
        out.gscale = f32(self.factor if cut > 1 else self.factor * cut)
        return out

    def finish(self, params: Params, state: list[dict[str, Any]], **now: Any) -> tuple[Params, list[dict[str, Any]]]:
        """Apply the gradients that are pending, if any: the last step of a run with `delay=1`."""
        return self.step(params, [None] * len(state), state, **now)

    def codec_of(self, role: str, size: int) -> Codec:
        """The codec of a role in a tensor of `size` elements: float32 below `min_size`."""
        return _codecs.f32 if role != "p" and size < self.min_size else self.codecs[role]

    def loads(self, params: Params) -> list[Load]:
        """What each tensor brings to a step, in bytes; of `params` only the shapes count."""
        return [self._load(p.shape) for p in leaves("loads", "params", params)]

    def schedule(self, params: Params) -> list[Move]:
        """Every move that the place makes in one step over these tensors, in order; only their shapes count."""
        return list(self.place.moves(self.loads(params)))

    def peak(self, params: Params) -> Peak:
        """The most bytes that weights, gradients and states take in a step, by where they are."""
        return self.place.peak(self.loads(params), self.place.buffers)

    def bounds(self, shape: tuple[int, ...]) -> Array:
        """Where a tensor of this shape may be cut: between blocks, or not at all if the step must see all of it."""
        size = math.prod(shape)
        codecs = [self.codec_of(n, size) for n in self.rule.shapes(shape, self.hyper)]
        if self.rule.scope != "element" or any(c.scope == "tensor" for c in codecs):
            return np.array([0, size] if size else [0])
        return blocks.bounds(shape, self.block, self.layout)

    def drawn(self, k: int) -> dict[str, int]:
        """What a rule that draws random bits is given for tensor k."""
        return {"tensor": k, "seed": self.seed} if self.rule.random else {}

    def due(self, g: Array | None, s: dict[str, Any]) -> tuple[Array | None, Array | None]:
        """(the gradient that a step given `g` applies, the one that waits for the next)."""
        pending = s.get("pending")
        if not self.delay or (pending is None and s.get("t", 0) < self.warm):
            return g, None
        return pending, g

    def _init_one(self, k: int, p: Array, make: Make) -> dict[str, Any]:
        if p.dtype != f32:
            raise TypeError(f"init: params[{k}] must be float32, got {p.dtype}")
        if self.rule.fits is not None:
            self.rule.fits(f"init: params[{k}]", p.shape, self.hyper)
        first = self.rule.init(p, **self.hyper)
        state = {n: put(self.codec_of(n, p.size), z, make, f"{k}.{n}") for n, z in first.items()}
        return {"t": 0} | state | self._extras(p)

    def _extras(self, p: Array) -> dict[str, Any]:
        """What the weights' codec stores beside the visible weights: a remainder, a compensation; else nothing."""
        codec = self.codecs["p"]
        if len(codec.parts) == 1:
            return {}
        box = codec.encode(p)
        return {"p": Box(codec, p.shape, {n: a for n, a in box.arrays.items() if n != "codes"})}

    def _check_one(self, k: int, p: Array, g: Array | None, s: dict[str, Any]) -> Array | None:
        """The gradient of tensor k, None if it is to be skipped; raises for what must not be stepped."""
        pending = s.get("pending")
        if pending is not None and not self.delay:
            raise StateError(f"step: state[{k}] has a pending gradient, and this optimizer no delay: finish first")
        if g is None and pending is None:
            return None
        for name, a in (("params", p), ("grads", g), ("pending gradients", pending)):
            if a is None:
                continue
            if a.dtype != f32:
                raise TypeError(f"step: {name}[{k}] must be float32, got {a.dtype}")
            if a.shape != p.shape:
                raise ShapeError(f"step: {name}[{k}] has shape {a.shape}, params[{k}] has {p.shape}")
        if self.rule.fits is not None:
            self.rule.fits(f"step: params[{k}]", p.shape, self.hyper)
        self._check_states(k, p, s)
        return self._usable(f"step: grads[{k}]", g)

    def _usable(self, call: str, g: Array | None) -> Array | None:
        """The gradient, or None for one with NaN or Inf that is to be skipped."""
        if g is None or self.nonfinite == "propagate" or np.isfinite(g).all():
            return g
        if self.nonfinite == "raise":
            raise NonFiniteError(f"{call} holds NaN or Inf")
        return None

    def _check_states(self, k: int, p: Array, s: dict[str, Any]) -> None:
        shapes = self.rule.shapes(p.shape, self.hyper)
        for name in (*shapes, "t"):
            if s.get(name) is None:
                raise StateError(f"step: state[{k}] has no {name!r}; it was made by another rule")
        for st in self.states:
            if st.name in shapes:
                self._check_state(k, p, st, s, shapes[st.name])
        if len(self.codecs["p"].parts) > 1 and not isinstance(s.get("p"), Box):
            raise StateError(f"step: state[{k}] has no 'p'; {called(self.codecs['p'])} keeps part of the weights there")
        if isinstance(s.get("p"), Box) and differ(s["p"].codec, self.codecs["p"]):
            have, want = called(s["p"].codec), called(self.codecs["p"])
            raise StateError(f"step: state[{k}]['p'] is kept by {have}, this optimizer's weights are {want}")

    def _check_state(self, k: int, p: Array, st: State, s: dict[str, Any], shape: tuple[int, ...]) -> None:
        want, have = self.codec_of(st.name, p.size), s[st.name]
        codec = have.codec if isinstance(have, Box) else _codecs.f32
        if differ(codec, want):
            raise StateError(
                f"step: state[{k}][{st.name!r}] is stored as {called(codec)}, this optimizer has {called(want)}"
            )
        if have.shape != shape:
            raise StateError(f"step: state[{k}][{st.name!r}] has shape {have.shape}, params[{k}] has {p.shape}")
        kept = want.encode(np.zeros(0, f32)).arrays if st.dtype == f32 else {"codes": np.zeros(0, st.dtype)}
        for part, a in (have.arrays if isinstance(have, Box) else {"codes": have}).items():
            if a.dtype != kept[part].dtype:
                raise TypeError(f"step: state[{k}][{st.name!r}]: {part} must be {kept[part].dtype}, got {a.dtype}")

    def _apply(
        self,
        k: int,
        p: Array,
        g: Array | None,
        s: dict[str, Any],
        hyper: dict[str, Any],
        make: Make = memory,
        window: Window | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Step tensor k by the gradient that is due, and let the other wait."""
        now, later = self.due(g, s)
        if now is not None:
            p, s = self._step_one(k, p, now, s, hyper, make, window)
        return p, self.waiting(s, later)

    def waiting(self, s: dict[str, Any], later: Array | None) -> dict[str, Any]:
        """The state with the gradient that waits for the next step, if one does."""
        s = {n: x for n, x in s.items() if n != "pending"}
        return s if later is None else s | {"pending": later.copy()}

    def opened(
        self, k: int, p: Array, s: dict[str, Any], make: Make = memory, window: Window | None = None
    ) -> tuple[dict[str, Cell], Weights]:
        """The stored arrays of tensor k, as its next step finds them."""
        shape, first, last = window or (p.shape, 0, p.size)
        size, shapes = math.prod(shape), self.rule.shapes(shape, self.hyper)
        spans = {n: (f, *self._span(math.prod(f), first, last)) for n, f in shapes.items()}
        cells = {n: Cell(self.codec_of(n, size), s[n], make, f"{k}.{n}", spans[n]) for n in shapes}
        return cells, Weights(self.codecs["p"], p, s.get("p"), rng.key(self.seed, s["t"] + 1, k), make, window)

    def _step_one(
        self,
        k: int,
        p: Array,
        g: Array,
        s: dict[str, Any],
        hyper: dict[str, Any],
        make: Make = memory,
        window: Window | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Walk the pages of tensor k: decode, rule, encode. With a window p, g and s are a rank's share of it, flat."""
        t = s["t"] + 1
        shape, first, last = window or (p.shape, 0, p.size)
        if first == last:
            return p, s | {"t": t}
        cells, weights = self.opened(k, p, s, make, window)
        now = {"t": t} | self.drawn(k) | hyper
        self._moved("g", "g", g.nbytes)
        with np.errstate(all="ignore"):
            for a, b in self._pages(shape, first, last):
                self._fetch(cells, weights, a, b)
                grad = g.reshape(-1)[a - first : b - first] * self.gscale
                weights.store(self._run(weights.load(), grad, cells, shape, now))
                self._flush(cells, weights)
        self._moved("p", "p", self._visible_bytes(p.size))
        return weights.out.reshape(p.shape), {"t": t} | {n: c.stored() for n, c in cells.items()} | weights.extras()

    def _pages(self, shape: tuple[int, ...], first: int, last: int) -> list[tuple[int, int]]:
        """The (first, past last) element of each page; one page where more than a block must be seen at once."""
        bounds = self.bounds(shape)
        i, j = (int(n) for n in np.searchsorted(bounds, (first, last)))
        pages = self.place.pages(j - i, self.place.page_blocks)
        return [(int(bounds[i + one]), int(bounds[i + end])) for one, end in pages]

    def _fetch(self, cells: Mapping[str, Cell], weights: Weights, a: int, b: int) -> None:
        for n, c in cells.items():
            self._moved(n, "in", c.fetch(*self._span(c.size, a, b)))
        kept = weights.fetch(a, b)
        if weights.further:
            self._moved("p", "in", kept)

    def _flush(self, cells: Mapping[str, Cell], weights: Weights) -> None:
        for n, c in cells.items():
            self._moved(n, "out", c.flush())
        kept = weights.flush()
        if weights.further:
            self._moved("p", "out", kept)

    def _span(self, size: int, a: int, b: int) -> tuple[int, int]:
        """The stretch of a state that goes with elements [a, b): all of it unless the rule is one of elements."""
        return (a, b) if self.rule.scope == "element" else (0, size)

    def _moved(self, what: str, link: str, n: int) -> None:
        if self.watch is not None and link in self.place.links:
            self.watch(Move(what, self.place.links[link], n))

    def _visible_bytes(self, size: int) -> int:
        return size * np.dtype(self.codecs["p"].parts[0].dtype).itemsize

    def _load(self, shape: tuple[int, ...]) -> Load:
        size, pages, p = math.prod(shape), [], self.codecs["p"]
        for a, b in self._pages(shape, 0, size):
            page = {}
            for st in self.states:
                form = st.shape_for(shape, self.hyper)
                if form is not None:
                    span = self._span(math.prod(form), a, b)
                    page[st.name] = stretch_bytes(self.codec_of(st.name, size), st.dtype, form, *span)
            if len(p.parts) > 1:
                page["p"] = sum((b - a) * np.dtype(part.dtype).itemsize for part in p.parts[1:])
            pages.append(page)
        return Load(self._visible_bytes(size), size * 4, tuple(pages))

    def _run(self, p: Array, g: Array, cells: Mapping[str, Cell], shape: tuple[int, ...], now: dict[str, Any]) -> Array:
        """The rule over one page: new weights back, new states stored."""
        if self.reads == "stored":
            run = self.lines(p, g, cells, shape, now)
            while True:
                try:
                    next(run)
                except StopIteration as stop:
                    return stop.value
        p, g, old = self._shaped(p, g, cells, shape)
        p, new = self.rule.update(p, g, old, **now)
        for n, c in cells.items():
            c.store(new[n].reshape(-1))
        return p.reshape(-1)

    def lines(
        self, p: Array, g: Array, cells: Mapping[str, Cell], shape: tuple[int, ...], now: dict[str, Any]
    ) -> Stops:
        """The same, stopping after every line of the rule; yields (names, (line number, *values)).

        With reads="stored", where a line sets a state, the lines below read what its codec keeps of it.
        """
        p, g, old = self._shaped(p, g, cells, shape)
        run, sent, left = stepping(self.rule.update)(p, g, old, **now), None, set(cells)
        while True:
            try:
                names, (number, *values) = run.send(sent)
            except StopIteration as stop:
                p, new = stop.value
                break
            if self.reads == "stored":
                values = [self._kept(n, x, old, cells, left) for n, x in zip(names, values, strict=True)]
                sent = tuple(values)
            yield names, (number, *values)
        if self.reads == "stored" and left:
            says = f"step: no line of {self.rule.stem} is named {', '.join(sorted(left))}"
            raise ValueError(f"{says}: reads='stored' cannot be had")
        for n, c in cells.items() if self.reads == "fresh" else ():
            c.store(new[n].reshape(-1))
        return p.reshape(-1)

    def _shaped(
        self, p: Array, g: Array, cells: Mapping[str, Cell], shape: tuple[int, ...]
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Weights, gradient and states of a page: in their shapes if it is all of the tensor, else flat."""
        old = {n: c.load() for n, c in cells.items()}
        if self.rule.scope == "element" and p.size < math.prod(shape):
            return p, g, old
        return p.reshape(shape), g.reshape(shape), {n: x.reshape(cells[n].shape) for n, x in old.items()}

    def _kept(self, n: str, x: Any, old: Mapping[str, Array], cells: Mapping[str, Cell], left: set[str]) -> Any:
        """What the codec of state n keeps of x; anything else is kept as it is."""
        if n not in cells or x is old[n]:
            return x
        cells[n].store(x.reshape(-1))
        left.discard(n)
        return cells[n].load().reshape(x.shape)
