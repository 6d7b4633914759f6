"""A run of the target, written down once: what went into each step and what came out. All comparisons read it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refopt.conform.measure import Step, bf16
from refopt.conform.settings import Data, Setting, plant
from refopt.conform.target import Coded, Target
from refopt.spec import Array, Rule

TS = (1, 2, 3, 4, 5, 6)
LATE = (1000, 20001)
"""Two steps far on, where corrections have faded; for targets whose count of steps can be set."""


class Taken(NamedTuple):
    """One step of one tensor; without `before` it started from states that nobody could read. `after` has the states
    that are stored as they are: what a codec keeps of the others is another level's matter."""

    k: int
    t: int
    p: Array
    g: Array
    before: dict[str, Array] | None
    after_p: Array
    after: dict[str, Array]
    codes: dict[str, Coded] = {}  # noqa: RUF012  (nobody writes into it)


class Run(NamedTuple):
    """Steps of a target. `mode` says where each step began.

    forced: weights and states were the reference's; read: they were the target's own, decoded; free: only the weights
    could be read, so results are compared over the whole run.
    """

    mode: str
    dtype: str
    steps: list[Taken]
    note: str = ""


def oracle(rule: Rule, hyper: dict[str, Any], tensor: int = 0) -> Step:
    """The reference's step of one tensor."""
    further = {"tensor": tensor, "seed": 0} if rule.random else {}
    full = rule.check("conform", hyper)

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        with np.errstate(all="ignore"):
            return rule.update(p, g, state, t=t, **further, **full)

    return step


def begun(rule: Rule, hyper: dict[str, Any], p: Array) -> dict[str, Array]:
    """The reference's first states."""
    return rule.init(p, **rule.check("conform", hyper))


def visible(x: Array, dtype: str) -> Array:
    """Weights as the target can hold them."""
    return bf16(x) if dtype == "bfloat16" else x


def record(target: Target, rule: Rule, setting: Setting, some: Data, dtype: str = "float32") -> Run:
    """Run the target, teacher-forced if it can be; else reading its own states; else freely."""
    note = ""
    for walk in (forced, read):
        try:
            return walk(target, rule, setting, some, dtype)
        except Unable as why:
            note = note or str(why)
    return free(target, rule, setting, some, dtype, TS)._replace(note=note)


class Unable(Exception):
    """Why states could not be put in, or read."""


def forced(target: Target, rule: Rule, setting: Setting, some: Data, dtype: str) -> Run:
    """Each step starts from the reference's weights and states, put into the target's."""
    ps = [visible(p, dtype) for p in some.params]
    target.start(rule, ps, setting.hyper, dtype)
    states = [begun(rule, setting.all, p) for p in ps]
    steps: list[Taken] = []
    for t in (*TS, *LATE):
        if t in LATE and (not target.jumps or rule.random or rule.stem == "galore"):
            break
        gs = [visible(plant(rule, setting.all, g, s, t), dtype) for g, s in zip(some.grads(t), states)]
        for k, (p, s) in enumerate(zip(ps, states)) if t > 1 else ():
            put(target, k, p, s, t)
        target.step([g.copy() for g in gs])
        after = target.params()
        for k, (p, g, s) in enumerate(zip(ps, gs, states)):
            steps.append(Taken(k, t, p, g, s, after[k], target.state(k)))
            new, states[k] = oracle(rule, setting.all, k)(p, g, s, t)
            ps[k] = visible(new, dtype)
    return Run("forced", dtype, steps)


def put(target: Target, k: int, p: Array, s: dict[str, Array], t: int) -> None:
    """Force parameter k, and see that it took; raises Unable."""
    if not target.force(k, p, s, t - 1):
        raise Unable("its states cannot be set")
    have = target.state(k)
    if not np.array_equal(target.params()[k], p, equal_nan=True):
        raise Unable("its weights cannot be set")
    for n in have.keys() & s.keys():
        if not np.array_equal(have[n].reshape(s[n].shape), s[n], equal_nan=True):
            raise Unable(f"its state {n} does not hold what is put in")


def read(target: Target, rule: Rule, setting: Setting, some: Data, dtype: str) -> Run:
    """Each step starts from what the target holds; the reference takes the same."""
    ps = [visible(p, dtype) for p in some.params]
    target.start(rule, ps, setting.hyper, dtype)
    states = [begun(rule, setting.all, p) for p in ps]
    steps: list[Taken] = []
    for t in TS:
        gs = [visible(plant(rule, setting.all, g, s, t), dtype) for g, s in zip(some.grads(t), states)]
        target.step([g.copy() for g in gs])
        after = target.params()
        for k, (p, g) in enumerate(zip(ps, gs)):
            have = shaped(target.state(k), states[k])
            coded = target.coded(k)
            plain = {n: x for n, x in have.items() if n not in coded}
            steps.append(Taken(k, t, p, g, states[k], after[k], plain, coded))
            if states[k] and not have:
                raise Unable("its states cannot be read")
            states[k] = oracle(rule, setting.all, k)(p, g, states[k], t)[1] | have
        ps = after
    return Run("read", dtype, steps)


def shaped(have: dict[str, Array], like: dict[str, Array]) -> dict[str, Array]:
    """States in the shapes of the reference's."""
    return {n: x.reshape(like[n].shape) if n in like and x.size == like[n].size else x for n, x in have.items()}


def free(target: Target, rule: Rule, setting: Setting, some: Data, dtype: str, ts: Any) -> Run:
    """From the first weights on, untouched."""
    ps = [visible(p, dtype) for p in some.params]
    target.start(rule, ps, setting.hyper, dtype)
    steps: list[Taken] = []
    for t in ts:
        gs = [visible(g, dtype) for g in some.grads(t)]
        target.step([g.copy() for g in gs])
        after = target.params()
        steps += [Taken(k, t, p, g, None, after[k], target.state(k)) for k, (p, g) in enumerate(zip(ps, gs))]
        ps = after
    return Run("free", dtype, steps)
