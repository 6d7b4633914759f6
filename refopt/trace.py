"""The same step, one equation at a time: `trace` yields (name, equation, value) as the rule's own lines run.

No equation exists twice: `refopt.lines` makes a generator of the rule's `update`, and a debugger steps through it.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refopt.cells import Cell, Make, shelf
from refopt.spec import Array, Rule
from refopt.step import Optimizer
from refopt.trees import rebuild


class Line(NamedTuple):
    """One traced line: the name it sets, the line of source that set it, the value, and where that line stands.

    `cuts` are the ends of the blocks of a coded state, in elements; empty for what is not coded in blocks.
    """

    name: str
    equation: str
    value: Any
    where: str = ""
    cuts: tuple[int, ...] = ()


Lines = Generator[Line, None, Any]
"""Traced lines; what the traced code returns is the generator's return value."""


def trace(opt: Optimizer, params: Any, grads: Any, state: list[dict[str, Any]], **now: Any) -> Lines:
    """The step that `opt.step(params, grads, state)` takes, as it happens; its bits are `step`'s bits.

    Yields `Line(name, equation, value, where)`: what is decoded, every line of the rule, what is encoded. The
    generator's return value is (params, state), as from `step`. It opens the same arrays and runs the same lines as
    `step`, so a debugger that steps into it steps through the rule.
    """
    ps, gs, hyper = opt.checked("trace", params, grads, state, now)
    opt = opt.clipped([opt.due(g, s)[0] for g, s in zip(gs, state, strict=True)])
    done = []
    with shelf(opt.place) as make, np.errstate(all="ignore"):
        for k, (p, g, s) in enumerate(zip(ps, gs, state, strict=True)):
            due, later = opt.due(g, s)
            if due is not None:
                p, s = yield from _tensor(opt, k, p, due, s, hyper, make)
            if later is not None:
                yield Line("g", f"grads[{k}] waits for the next step", later)
            done.append((p, opt.waiting(s, later)))
    return rebuild(params, [p for p, _ in done]), [s for _, s in done]


def _tensor(opt: Optimizer, k: int, p: Array, g: Array, s: dict[str, Any], hyper: dict[str, Any], make: Make) -> Lines:
    """One tensor, all of it as one page."""
    if not p.size:
        return p, s | {"t": s["t"] + 1}
    cells, weights = opt.opened(k, p, s, make)
    yield Line("p", f"params[{k}]", p)
    weights.fetch(0, p.size)
    if weights.further:
        yield from _arrays("p", "state['p']", weights)
        yield Line("p", f"{weights.codec.stem}.decode(p)", weights.load().reshape(p.shape))
    grad = g * opt.gscale
    yield Line("g", f"grads[{k}] * gscale" if "pending" not in s else f"state[{k}]['pending'] * gscale", grad)
    for n, c in cells.items():
        c.fetch(0, c.size)
        yield from _arrays(n, f"state[{n!r}]", c)
        if c.boxed:
            yield Line(n, f"{c.codec.stem}.decode({n})", c.load().reshape(c.shape), cuts=_cuts(c))
    now = {"t": s["t"] + 1} | opt.drawn(k) | hyper
    new = yield from _rule(opt.rule, opt.lines(weights.load(), grad.reshape(-1), cells, p.shape, now))
    weights.store(new)
    if weights.codec.stem != "f32":
        yield Line("p", f"{weights.codec.stem}(p)", weights.out.reshape(p.shape).copy())
    if weights.further:
        yield from _arrays("p", f"{weights.codec.stem}.encode(p)", weights)
    for n, c in cells.items():
        yield from _arrays(n, f"{c.codec.stem}.encode({n})" if c.boxed else f"state[{n!r}]", c)
    for cell in (*cells.values(), weights):
        cell.flush()
    stored = {n: c.stored() for n, c in cells.items()} | weights.extras()
    return weights.out.reshape(p.shape), {"t": s["t"] + 1} | stored


def _rule(rule: Rule, run: Any) -> Lines:
    """A Line for every name that the rule's lines set."""
    path = inspect.getsourcefile(rule.update) or "<rule>"
    text = Path(path).read_text("utf-8").splitlines()
    while True:
        try:
            names, (number, *values) = next(run)
        except StopIteration as stop:
            return stop.value
        equation = text[number - 1].strip()
        for name, value in zip(names, values, strict=True):
            yield Line(name, equation, value, f"{path}:{number}")


def _arrays(name: str, equation: str, cell: Cell) -> Lines:
    """What a cell has stored: each array of a coded state, or the state itself."""
    if not cell.boxed:
        yield Line(name, equation, cell.page["codes"].reshape(cell.shape).copy())
        return
    for part, value in cell.codec.shaped(cell.shape, dict(cell.page)).items():
        yield Line(f"{name}.{part}", f"{equation}.{part}", value.copy(), cuts=_cuts(cell) if part == "codes" else ())


def _cuts(cell: Cell) -> tuple[int, ...]:
    return tuple(cell.bounds[1:-1].tolist()) if cell.codec.scope == "block" else ()


def numbers(value: Any, cuts: tuple[int, ...] = (), most: int = 16) -> str:
    """The first numbers of a value, blocks apart from one another."""
    if isinstance(value, tuple | list):
        return "(" + ", ".join(numbers(x) for x in value) + ")"
    a = np.asarray(value)
    if a.dtype.kind not in "fiub":
        return str(value)
    words = [f"{v:.6g}" if a.dtype.kind == "f" else str(v) for v in a.reshape(-1)[:most].tolist()]
    if a.ndim == 0:
        return f"{a.item():.7g}" if a.dtype.kind == "f" else words[0]
    shown = [("| " if i in cuts else "") + word for i, word in enumerate(words)]
    return "[" + ", ".join(shown).replace(", |", " |") + (", ..." if a.size > most else "") + "]"


def shown(line: Line) -> str:
    """A line of the printed trace."""
    return f"  {line.name:<9} {numbers(line.value, line.cuts):<52} {line.equation}"
