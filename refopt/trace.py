"""The same step, one equation at a time: `trace` yields (name, equation, value) as the rule's own lines run.

No equation exists twice: `refopt.lines` makes a generator of the rule's `update`, and a debugger steps through it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refopt import codecs as _codecs
from refopt import rules as _rules
from refopt.assign import lookup
from refopt.lines import stepping
from refopt.spec import Array, Box, Codec, Rule
from refopt.step import Optimizer
from refopt.trees import leaves as _leaves


class Line(NamedTuple):
    """One traced line: the name it sets, the line of source that set it, the value, and where that line stands."""

    name: str
    equation: str
    value: Any
    where: str = ""


Lines = Generator[Line, None, Any]
"""Traced lines; what the traced code returns is the generator's return value."""


def lines(rule: Rule, p: Array, g: Array, state: dict[str, Array], t: int, hyper: dict[str, Any]) -> Lines:
    """Run `rule.update` and yield a Line for every name that it sets; the generator's return value is the result."""
    path = inspect.getsourcefile(rule.update) or "<rule>"
    text = Path(path).read_text("utf-8").splitlines()
    run = stepping(rule.update)(p, g, state, t=t, **hyper)
    while True:
        try:
            names, (number, *values) = next(run)
        except StopIteration as stop:
            return stop.value
        equation = text[number - 1].strip()
        for name, value in zip(names, values, strict=True):
            yield Line(name, equation, value, f"{path}:{number}")


def trace(opt: Optimizer, params: Any, grads: Any, state: list[dict[str, Any]]) -> Lines:
    """The step that `opt.step(params, grads, state)` takes, as it happens; its bits are `step`'s bits.

    Yields `Line(name, equation, value, where)`: what is decoded, every line of the rule, what is encoded. The
    generator's return value is (params, state), as from `step`.
    """
    after_p, after = opt.step(params, grads, state)
    ps, gs = _leaves("trace", "params", params), _leaves("trace", "grads", grads, like=params)
    for k, (p, g, s) in enumerate(zip(ps, gs, state, strict=True)):
        if g is None or after[k]["t"] == s["t"]:
            continue
        yield Line("p", f"params[{k}]", p)
        yield Line("g", f"grads[{k}] * gscale", g * opt.gscale)
        old: dict[str, Array] = {}
        states = [st for st in opt.states if st.name in opt.rule.shapes(p.shape, opt.hyper)]
        for st in states:
            old[st.name] = yield from _opened(st.name, s[st.name])
        with np.errstate(all="ignore"):
            _, new = yield from lines(opt.rule, p, g * opt.gscale, old, s["t"] + 1, opt.hyper | opt.drawn(k))
        if opt.codecs["p"].stem != "f32":
            yield Line("p", f"{opt.codecs['p'].stem}(p)", _leaves("trace", "params", after_p)[k])
        for st in states:
            yield from _closed(st.name, opt.codec_of(st.name, p.size), new[st.name])
    return after_p, after


def _opened(name: str, stored: Any) -> Lines:
    if not isinstance(stored, Box):
        yield Line(name, f"state[{name!r}]", stored)
        return stored
    for part, value in stored.arrays.items():
        yield Line(f"{name}.{part}", f"state[{name!r}].{part}", value)
    x = stored.decode()
    yield Line(name, f"{stored.codec.stem}.decode({name})", x)
    return x


def _closed(name: str, codec: Codec, x: Array) -> Lines:
    if codec.stem == "f32":
        yield Line(name, f"state[{name!r}]", x)
        return
    for part, value in codec.encode(x).arrays.items():
        yield Line(f"{name}.{part}", f"{codec.stem}.encode({name})", value)


def _numbers(value: Any) -> str:
    a = np.asarray(value)
    if a.ndim == 0:
        return f"{a.item():.7g}" if a.dtype.kind == "f" else str(a.item())
    shown = [f"{v:.6g}" if a.dtype.kind == "f" else str(v) for v in a.reshape(-1)[:8].tolist()]
    return "[" + ", ".join(shown) + (", ..." if a.size > 8 else "") + "]"


def _print_step(opt: Optimizer, p: Array, g: Array, state: Any, as_json: bool, t: int) -> tuple[Any, Any]:
    run = trace(opt, p, g, state)
    if not as_json:
        print(f"\nstep t={t}")
    while True:
        try:
            line = next(run)
        except StopIteration as stop:
            return stop.value
        if isinstance(line.value, dict):
            continue
        if as_json:
            print(json.dumps({"t": t} | line._asdict() | {"value": np.asarray(line.value).tolist()}))
        else:
            print(f"  {line.name:<9} {_numbers(line.value):<52} {line.equation}")


def main(argv: list[str]) -> int:
    """`refopt trace RULE [--codec NAME] [--steps N] [--json] [--lr X]`: every equation with the numbers in it."""
    parser = argparse.ArgumentParser(prog="refopt trace", description="Print a rule's equations as they run.")
    parser.add_argument("rule", help=f"one of {', '.join(_rules.RULES)}")
    parser.add_argument("--codec", help=f"for every state: one of {', '.join(_codecs.CODECS)}")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--lr", type=float, help="learning rate (default: the rule's own)")
    args = parser.parse_args(argv)
    hyper = {} if args.lr is None else {"lr": args.lr}
    try:
        if args.steps < 1:
            raise ValueError(f"trace: --steps must be >= 1, got {args.steps}")
        rule = lookup("rule", _rules.RULES, args.rule)
        if rule.stem == "sgd":
            hyper["momentum"] = 0.9
        opt = Optimizer(rule, args.codec, **hyper)
    except ValueError as error:
        print(f"refopt trace: {error}", file=sys.stderr)
        return 2
    p = np.array([1.0, -2.0, 0.5, 0.0], np.float32)
    grads = np.array([[0.1, -0.2, 0.3, 0.0], [-0.05, 0.4, 0.3, 1e-8], [2.0, 0.0, -0.7, -1e-3]], np.float32)
    if not args.json:
        print(f"{rule.title}: {rule.source}\n" + "  ".join(f"{k}={v}" for k, v in opt.hyper.items()))
    state = opt.init(p)
    for t in range(1, args.steps + 1):
        p, state = _print_step(opt, p, grads[(t - 1) % 3], state, args.json, t)
    return 0
