"""What an Optimizer is made of, from what its caller named: records by name, a codec for each role, one block list."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refopt import codecs as _codecs
from refopt.spec import Codec, Rule, State

f32 = np.float32


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
            raise ValueError(f"Optimizer: {s.name} takes either sign, and {called(out[s.name])} stores none")
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


def called(codec: Codec) -> str:
    """A codec with what tells it from others of its stem."""
    usual = _codecs.CODECS.get(codec.stem, codec)
    told = {"block": codec.block} if codec.scope == "block" else {}
    told |= {o: getattr(codec, o) for o in ("signed", "layout") if getattr(codec, o) != getattr(usual, o)}
    told |= {o: value for o, value in codec.mode.items() if value != usual.mode.get(o)}
    return f"{codec.stem}({', '.join(f'{o}={value!r}' for o, value in told.items())})" if told else codec.stem
