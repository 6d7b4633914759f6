"""What every place must keep: the bits of the resident step, and its own word about what it moves."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.bits import parts, same_bits, same_state
from tests.cases import RuleCase
from tests.strategies import assignments, f32, follow, records

SIZES = [1, 7, 10**9]
"""Blocks a page: one, a prime, more than there are."""

PLACES = ["resident", "paged", "host", "disk"]


def placed(ref: ModuleType, stem: str, size: int, path: Path | str) -> Any:
    """A place with pages of `size` blocks, in so far as it has pages, and files under `path`."""
    place = ref.places.PLACES[stem]
    given = {"page_blocks": size, "path": path}
    return place(**{name: given[name] for name in given if name in place.options})


def some_codecs(ref: ModuleType, case: RuleCase, data: Any) -> dict[str, Any]:
    """A drawn codec for every state that takes one, and for the weights."""
    takes = {s.name for s in ref.rules.RULES[case.stem].states if s.dtype == f32}
    drawn = data.draw(assignments(tuple(s for s in case.states if s in takes)))
    return records(ref, drawn) | {"p": data.draw(st.sampled_from(["f32", "bf16"]))}


def same_run(ref: ModuleType, case: RuleCase, place: Any, run: Any, codecs: Any, **changed: Any) -> None:
    """A run in `place` has the bits of the resident one: weights and states."""
    p, grads = run
    one, state = follow(case.optimizer(ref, codecs, **changed), [p], [[g] for g in grads])
    other, moved = follow(case.optimizer(ref, codecs, place, **changed), [p], [[g] for g in grads])
    same_bits(other[0], one[0], "p")
    same_state(moved[0], state[0])


def observed(opt: Any, params: list[Any], grads: list[Any]) -> tuple[list[Any], Any]:
    """Every move that a second step makes, and the state after it."""
    params, state = opt.step(params, grads, opt.init(params))
    seen: list[Any] = []
    opt.watch = seen.append
    _, state = opt.step(params, grads, state)
    return seen, state


def keeps_its_schedule(ref: ModuleType, case: RuleCase, place: Any, shapes: list[Any], codecs: Any) -> None:
    """What the record says will move is what moves, to the byte and in order; and all of the state does."""
    rng = np.random.default_rng(3)
    params = [rng.standard_normal(shape).astype(f32) for shape in shapes]
    opt = case.optimizer(ref, codecs, place)
    seen, state = observed(opt, params, params)
    assert seen == opt.schedule(params)
    held = sum(a.nbytes for s in state for n, x in s.items() if n != "t" for a in parts(x).values())
    for link in [place.links[end] for end in ("in", "out") if end in place.links]:
        assert sum(m.bytes for m in seen if m.way == link) == held, f"{link}: not every state byte moved once"
