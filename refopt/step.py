"""decode -> rule -> encode: the one file that knows all three axes, and `Optimizer`, which runs it over many tensors.

The weights move by the *fresh* states, as every library does: encoding happens after, so that a first step from zero
states has the bits of the uncoded rule. With `reads="stored"` each state is encoded as soon as its line has run, and
what it decodes to takes its place in the lines below. A place decides only in which pages the block list is walked.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from refopt import codecs as _codecs
from refopt import places as _places
from refopt import rng
from refopt import rules as _rules
from refopt.cells import Cell, Weights, put
from refopt.codecs import blocks
from refopt.lines import stepping
from refopt.spec import Array, Box, Codec, NonFiniteError, Place, Rule, ShapeError, State, StateError

f32 = np.float32
Params = Any
TORCH_WORDS = {"weight_decay": "wd", "betas": ("beta1", "beta2")}


def lookup(kind: str, table: Mapping[str, Any], name: Any) -> Any:
    """The record called `name`, or `name` itself if it is one; ValueError with a suggestion otherwise."""
    if isinstance(name, type(next(iter(table.values())))):
        return name
    if not isinstance(name, str):
        raise TypeError(f"Optimizer: a {kind} is a record or a name such as {next(iter(table))!r}, got {name!r}")
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"Optimizer: no {kind} {name!r}{hint}; there are {', '.join(table)}")
    return table[name]


def assign(rule: Rule, states: Sequence[State], given: Any) -> dict[str, Codec]:
    """A codec for each role: `p` and every state. One name stands for all states; a non-negative state takes the
    unsigned table of the codec that is named for it, or, with a warning, the signed one if that was asked for."""
    roles = {"p": "f32"} | {s.name: "f32" for s in states}
    if isinstance(given, Mapping):
        for role in given:
            if role not in roles and role not in {s.name for s in rule.states}:
                raise ValueError(f"Optimizer: {rule.stem} has no role {role!r}; it has {', '.join(roles)}")
        roles |= {k: v for k, v in given.items() if k in roles}
    elif given is not None:
        roles |= {s.name: given for s in states if s.coded}
    out = {role: lookup("codec", _codecs.CODECS, name) for role, name in roles.items()}
    for s in states:
        if out[s.name].weights:
            raise ValueError(f"Optimizer: {out[s.name].stem} is a format of weights; {s.name} cannot take it")
        if s.dtype != f32 and out[s.name].stem != "f32":
            raise ValueError(f"Optimizer: {s.name} is {np.dtype(s.dtype)} and kept as it is: no {out[s.name].stem}")
        if s.nonnegative and out[s.name].unsigned and not _insists(s, out[s.name]):
            out[s.name] = out[s.name](signed=False)
        elif not s.nonnegative and not out[s.name].signed:
            raise ValueError(f"Optimizer: {s.name} takes either sign, and {_name(out[s.name])} stores none")
    if out["p"].scope != "element":
        raise ValueError(f"Optimizer: {out['p'].stem} shares a scale in a block; weights take an element codec")
    return out


def _insists(state: State, codec: Codec) -> bool:
    """Whether a sign was asked for that a state never has; warns if so."""
    asked = codec.signed and codec.sign_asked
    if asked:
        says = f"Optimizer: {state.name} is never negative; {codec.stem}(signed=True) leaves half of its codes unused"
        warnings.warn(says, stacklevel=4)
    return asked


def page_list(codecs: Mapping[str, Codec], roles: Sequence[str]) -> tuple[int, str | None]:
    """(block, layout) of the block list that pages are cut along: that of the coded state with the largest blocks,
    which all smaller blocks divide."""
    coded = [codecs[r] for r in roles if codecs[r].scope == "block"]
    sizes, layouts = {c.block or 256 for c in coded} or {256}, {c.layout for c in coded} or {None}
    largest = max(sizes)
    for s in sizes:
        if largest % s:
            raise ValueError(f"Optimizer: block {s} does not divide block {largest}; states of one tensor share pages")
    if len(layouts) > 1:
        raise ValueError(f"Optimizer: layouts {sorted(map(str, layouts))} differ; states of one tensor share pages")
    return largest, layouts.pop()


class Optimizer:
    """Any rule, with a codec for each thing it stores, in a place. Pure: nothing that is passed in is changed.

    rule      a stem ("adamw") or a record (`rules.adamw`)
    codecs    None, one codec for every state, or {role: codec}; roles are `p` and the rule's states
    place     "resident", "paged", or a record such as `places.paged(page_blocks=3)`
    min_size  tensors with fewer elements keep float32 states
    maximize  climb instead of descend; gscale multiplies every gradient first (1 / loss scale)
    reads     "fresh": the weights move by the states as computed; "stored": by what their codecs keep of them
    seed      of the random bits of codecs and rules that draw them (`refopt.rng`)
    nonfinite "propagate" (IEEE), "raise" (NonFiniteError before anything is computed) or "skip" (that parameter)
    hyper     the rule's own names, or torch's: weight_decay, betas

    `params` and `grads` are a float32 array, or a list, tuple or dict of them; a gradient of None is skipped and its
    step count stays. The state is a list of dicts, one a tensor: `t`, and each state as an array or a Box.
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
        nonfinite: str = "propagate",
        reads: str = "fresh",
        seed: int = 0,
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
        self.min_size, self.nonfinite, self.reads, self.seed = min_size, nonfinite, reads, seed
        self.gscale = f32(-gscale if maximize else gscale)

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
        return [self._init_one(k, p) for k, p in enumerate(_leaves("init", "params", params))]

    def step(
        self, params: Params, grads: Params, state: list[dict[str, Any]], **now: Any
    ) -> tuple[Params, list[dict[str, Any]]]:
        """One step over every tensor. Everything is checked before anything is computed.

        `now` changes hyper-parameters for this step alone, as a schedule of the learning rate does: `lr=...`.
        """
        ps, gs = _leaves("step", "params", params), _leaves("step", "grads", grads, like=params)
        if not len(ps) == len(gs) == len(state):
            raise ShapeError(f"step: {len(ps)} params, {len(gs)} grads and {len(state)} states: one each is needed")
        hyper = self.rule.check("step", self.hyper | self._translate(now)) if now else self.hyper
        live = [self._check_one(k, p, g, s) for k, (p, g, s) in enumerate(zip(ps, gs, state, strict=True))]
        run = enumerate(zip(ps, gs, state, live, strict=True))
        done = [self._step_one(k, p, g, s, hyper) if go else (p, s) for k, (p, g, s, go) in run]
        return _rebuild(params, [p for p, _ in done]), [s for _, s in done]

    def codec_of(self, role: str, size: int) -> Codec:
        """The codec of a role in a tensor of `size` elements: float32 below `min_size`."""
        return _codecs.f32 if role != "p" and size < self.min_size else self.codecs[role]

    def _init_one(self, k: int, p: Array) -> dict[str, Any]:
        if p.dtype != f32:
            raise TypeError(f"init: params[{k}] must be float32, got {p.dtype}")
        if self.rule.fits is not None:
            self.rule.fits(f"init: params[{k}]", p.shape, self.hyper)
        first = self.rule.init(p, **self.hyper)
        state = {"t": 0} | {name: put(self.codec_of(name, p.size), z) for name, z in first.items()}
        return state | self._extras(p)

    def _extras(self, p: Array) -> dict[str, Any]:
        """What the weights' codec stores beside the visible weights: a remainder, a compensation; else nothing."""
        codec = self.codecs["p"]
        if len(codec.parts) == 1:
            return {}
        box = codec.encode(p)
        return {"p": Box(codec, p.shape, {n: a for n, a in box.arrays.items() if n != "codes"})}

    def _check_one(self, k: int, p: Array, g: Array | None, s: dict[str, Any]) -> bool:
        """Whether tensor k is stepped; raises for what must not be."""
        if g is None:
            return False
        for name, a in (("params", p), ("grads", g)):
            if a.dtype != f32:
                raise TypeError(f"step: {name}[{k}] must be float32, got {a.dtype}")
        if g.shape != p.shape:
            raise ShapeError(f"step: grads[{k}] has shape {g.shape}, params[{k}] has {p.shape}")
        if self.rule.fits is not None:
            self.rule.fits(f"step: params[{k}]", p.shape, self.hyper)
        shapes = self.rule.shapes(p.shape, self.hyper)
        for st in self.states:
            if st.name in shapes:
                self._check_state(k, p, st, s, shapes[st.name])
        if len(self.codecs["p"].parts) > 1 and not isinstance(s.get("p"), Box):
            raise StateError(f"step: state[{k}] has no 'p'; {_name(self.codecs['p'])} keeps part of the weights there")
        if self.nonfinite == "propagate" or np.isfinite(g).all():
            return True
        if self.nonfinite == "raise":
            raise NonFiniteError(f"step: grads[{k}] holds NaN or Inf")
        return False

    def _check_state(self, k: int, p: Array, st: State, s: dict[str, Any], shape: tuple[int, ...]) -> None:
        for name in (st.name, "t"):
            if s.get(name) is None:
                raise StateError(f"step: state[{k}] has no {name!r}; it was made by another rule")
        want, have = self.codec_of(st.name, p.size), s[st.name]
        codec = have.codec if isinstance(have, Box) else _codecs.f32
        if any(getattr(codec, x) != getattr(want, x) for x in ("stem", "block", "layout", "signed", "mode")):
            raise StateError(
                f"step: state[{k}][{st.name!r}] is stored as {_name(codec)}, this optimizer has {_name(want)}"
            )
        if have.shape != shape:
            raise StateError(f"step: state[{k}][{st.name!r}] has shape {have.shape}, params[{k}] has {p.shape}")
        kept = want.encode(np.zeros(0, f32)).arrays if st.dtype == f32 else {"codes": np.zeros(0, st.dtype)}
        for part, a in (have.arrays if isinstance(have, Box) else {"codes": have}).items():
            if a.dtype != kept[part].dtype:
                raise TypeError(f"step: state[{k}][{st.name!r}]: {part} must be {kept[part].dtype}, got {a.dtype}")

    def _step_one(
        self, k: int, p: Array, g: Array, s: dict[str, Any], hyper: dict[str, Any]
    ) -> tuple[Array, dict[str, Any]]:
        """Walk the stretches of tensor k: decode, rule, encode."""
        t = s["t"] + 1
        shapes = self.rule.shapes(p.shape, hyper)
        cells = {n: Cell(self.codec_of(n, p.size), s[n]) for n in shapes}
        weights = Weights(self.codecs["p"], p, s.get("p"), rng.key(self.seed, t, k))
        now = {"t": t} | ({"tensor": k} if self.rule.random else {}) | hyper
        with np.errstate(all="ignore"):
            for a, b in self._stretches(p, cells):
                grad = g.reshape(-1)[a:b] * self.gscale
                weights.store(a, b, self._run(weights.load(a, b), grad, cells, a, b, p.shape, now))
        return weights.out.reshape(p.shape), {"t": t} | {n: c.stored() for n, c in cells.items()} | weights.extras()

    def _stretches(self, p: Array, cells: Mapping[str, Cell]) -> list[tuple[int, int]]:
        """The (first, past last) element of each page; one page where more than a block must be seen at once."""
        if self.rule.scope != "element" or any(c.codec.scope == "tensor" for c in cells.values()):
            return [(0, p.size)] if p.size else []
        bounds = blocks.bounds(p.shape, self.block, self.layout)
        pages = self.place.pages(len(bounds) - 1, self.place.page_blocks)
        return [(int(bounds[first]), int(bounds[last])) for first, last in pages]

    def _run(
        self, p: Array, g: Array, cells: Mapping[str, Cell], a: int, b: int, shape: tuple[int, ...], now: dict[str, Any]
    ) -> Array:
        """The rule over one stretch: new weights back, new states stored. All but element rules see whole shapes."""
        if self.rule.scope == "element":
            old = {n: c.load(a, b) for n, c in cells.items()}
        else:
            p, g = p.reshape(shape), g.reshape(shape)
            old = {n: c.load(0, c.size).reshape(c.shape) for n, c in cells.items()}
        if self.reads == "stored":
            return self._run_stored(p, g, old, cells, a, b, now).reshape(-1)
        p, new = self.rule.update(p, g, old, **now)
        for n, c in cells.items():
            c.store(*self._span(c, a, b), new[n].reshape(-1))
        return p.reshape(-1)

    def _span(self, cell: Cell, a: int, b: int) -> tuple[int, int]:
        return (a, b) if self.rule.scope == "element" else (0, cell.size)

    def _run_stored(
        self, p: Array, g: Array, old: dict[str, Array], cells: Mapping[str, Cell], a: int, b: int, now: dict[str, Any]
    ) -> Array:
        """The rule, line by line: where a line sets a state, the lines below read what its codec keeps of it."""
        run, sent, left = stepping(self.rule.update)(p, g, old, **now), None, set(cells)
        while True:
            try:
                names, (_, *values) = run.send(sent)
            except StopIteration as stop:
                if left:
                    says = f"step: no line of {self.rule.stem} is named {', '.join(sorted(left))}"
                    raise ValueError(f"{says}: reads='stored' cannot be had") from None
                return stop.value[0]
            for i, n in enumerate(names):
                if n in cells and values[i] is not old[n]:
                    span, form = self._span(cells[n], a, b), values[i].shape
                    cells[n].store(*span, values[i].reshape(-1))
                    values[i] = cells[n].load(*span).reshape(form)
                    left.discard(n)
            sent = tuple(values)


def _name(codec: Codec) -> str:
    sign = "" if codec.signed else ", signed=False"
    return f"{codec.stem}(block={codec.block}{sign})" if codec.scope == "block" else codec.stem


def _leaves(call: str, name: str, tree: Params, like: Params = None) -> list[Any]:
    """The arrays of a tree, in order; a dict of gradients in the order of the keys of its parameters (`like`)."""
    if isinstance(tree, np.ndarray | np.generic):
        tree = [tree]
    elif isinstance(tree, Mapping):
        keys = list(like if isinstance(like, Mapping) else tree)
        if set(keys) != set(tree):
            raise ValueError(f"{call}: {name} has keys {sorted(map(str, tree))}, params has {sorted(map(str, keys))}")
        tree = [tree[k] for k in keys]
    elif tree is None and name == "grads":
        tree = [None]
    elif not isinstance(tree, list | tuple):
        kind = type(tree).__name__
        raise TypeError(f"{call}: {name} must be an array, or a list, tuple or dict of arrays, got {kind}")
    for k, leaf in enumerate(tree):
        if not (isinstance(leaf, np.ndarray | np.generic) or (leaf is None and name == "grads")):
            raise TypeError(f"{call}: {name}[{k}] must be an array, got {type(leaf).__name__}")
    return [None if leaf is None else np.asarray(leaf) for leaf in tree]


def _rebuild(like: Params, leaves: list[Array]) -> Params:
    if isinstance(like, np.ndarray | np.generic):
        return leaves[0]
    if isinstance(like, Mapping):
        return dict(zip(like, leaves, strict=True))
    build: Callable[..., Any] = type(like)
    return build(leaves)
