"""`refopt trace`: every equation of a step with the numbers in it, as text or JSON; two rules side by side."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from refopt import codecs, rules
from refopt.assign import lookup
from refopt.spec import Array, Codec, Rule
from refopt.step import Optimizer
from refopt.trace import Line, numbers, shown, trace

VECTOR = np.array([1.0, -2.0, 0.5, 0.0], np.float32)
GRADIENTS = np.array([[0.1, -0.2, 0.3, 0.0], [-0.05, 0.4, 0.3, 1e-8], [2.0, 0.0, -0.7, -1e-3]], np.float32)
WIDE = 62
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "galore": {"rank": 1, "gap": 2},
    "apollo": {"rank": 1, "gap": 2},
}
"""Hyper-parameters that a small tensor needs, or that show more than the default."""


def subject(stem: str, args: argparse.Namespace) -> tuple[Optimizer, Array]:
    """The optimizer that is traced, and weights that it can step: a vector, or a matrix where the rule needs one."""
    rule: Rule = lookup("rule", rules.RULES, stem)
    hyper = OPTIONS.get(rule.stem, {}) | ({} if args.lr is None else {"lr": args.lr})
    roles: Any = args.codec and _blocked(lookup("codec", codecs.CODECS, args.codec), args.block)
    if args.weights:
        states = rule.states_for(**hyper)
        roles = {"p": args.weights} | ({s.name: roles for s in states if s.coded} if roles else {})
    opt = Optimizer(rule, roles, reads=args.reads, **hyper)
    try:
        opt.init(VECTOR)
    except ValueError:
        return opt, VECTOR.reshape(2, 2)
    return opt, VECTOR


def _blocked(codec: Codec, block: int | None) -> Codec:
    """The codec with the blocks that were asked for, or with blocks so small that a vector of four has two."""
    if codec.block is None and block is not None:
        raise ValueError(f"trace: {codec.stem} has no blocks, got --block {block}")
    if block is not None or codec.block is None:
        return codec if block is None else codec(block=block)
    try:
        return codec(block=2)
    except ValueError:
        return codec


def steps(opt: Optimizer, p: Array, count: int) -> Iterator[tuple[int, list[Line]]]:
    """(t, the lines of step t)."""
    state: Any = opt.init(p)
    for t in range(1, count + 1):
        run, lines = trace(opt, p, GRADIENTS[(t - 1) % 3].reshape(p.shape), state), []
        while True:
            try:
                lines.append(next(run))
            except StopIteration as stop:
                p, state = stop.value
                break
        yield t, [line for line in lines if not isinstance(line.value, dict)]


def _column(lines: list[Line]) -> Iterator[str]:
    """Each equation once and, below, what it set."""
    for equation, same in itertools.groupby(lines, lambda line: (line.equation, line.where)):
        yield equation[0]
        yield from (f"    {line.name:<8} {numbers(line.value, line.cuts)}" for line in same)


def _side_by_side(one: list[Line], other: list[Line]) -> Iterator[str]:
    """Two steps in two columns."""
    for left, right in itertools.zip_longest(_column(one), _column(other), fillvalue=""):
        yield f"  {_fit(left):<{WIDE}}  {_fit(right)}".rstrip()


def _fit(text: str) -> str:
    return text if len(text) <= WIDE else f"{text[: WIDE - 3]}..."


def main(argv: list[str]) -> int:
    """`refopt trace RULE [--codec NAME] [--steps N] [--against RULE] [--json]`: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="refopt trace", description="Print a rule's equations as they run.")
    parser.add_argument("rule", help=f"one of {', '.join(rules.RULES)}")
    parser.add_argument("--codec", help=f"for every state: one of {', '.join(codecs.CODECS)}")
    parser.add_argument("--block", type=int, help="elements in a block of the codec (default: 2, where it may be)")
    parser.add_argument("--weights", help="codec of the weights, such as bf16 or bf16_rem16")
    parser.add_argument("--reads", default="fresh", help="fresh (default) or stored: what the weights move by")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--against", metavar="RULE", help="another rule, side by side")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--lr", type=float, help="learning rate (default: the rule's own)")
    args = parser.parse_args(argv)
    try:
        if args.steps < 1:
            raise ValueError(f"trace: --steps must be >= 1, got {args.steps}")
        subjects = [subject(stem, args) for stem in (args.rule, args.against) if stem]
    except ValueError as error:
        print(f"refopt trace: {error}", file=sys.stderr)
        return 2
    runs = [steps(opt, p, args.steps) for opt, p in subjects]
    if args.json:
        for (opt, _), run in zip(subjects, runs, strict=True):
            _print_json(run, {"rule": opt.rule.stem} if args.against else {})
        return 0
    for opt, _ in subjects:
        print(f"{opt.rule.title}: {opt.rule.source}\n" + "  ".join(f"{k}={v}" for k, v in opt.hyper.items()))
    for both in zip(*runs, strict=True):
        print(f"\nstep t={both[0][0]}")
        sides = [lines for _, lines in both]
        print("\n".join(_side_by_side(*sides) if args.against else map(shown, sides[0])))
    return 0


def _print_json(run: Iterator[tuple[int, list[Line]]], further: dict[str, str]) -> None:
    for t, lines in run:
        for line in lines:
            row = line._asdict()
            del row["cuts"]
            print(json.dumps({"t": t} | further | row | {"value": _plain(line.value)}))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return value if value is None or isinstance(value, str) else np.asarray(value).tolist()
