"""Gradient transformations as optax has them, by stand-ins with its names; optax itself where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from refopt import conform
from refopt.conform import OptaxTarget

f32 = np.float32


class Transformation(NamedTuple):
    init: Callable[[Any], Any]
    update: Callable[..., Any]


class ScaleByAdamState(NamedTuple):
    count: Any
    mu: Any
    nu: Any


class EmptyState(NamedTuple):
    """A transformation that keeps nothing."""


def adamw(learning_rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-4,
          corrected: bool = True) -> Transformation:  # fmt: skip
    """AdamW as a chain of three: a state of three parts, one of them with a count."""

    def init(p: Any) -> Any:
        return ScaleByAdamState(np.zeros((), np.int32), np.zeros_like(p), np.zeros_like(p)), EmptyState(), EmptyState()

    def update(g: Any, state: Any, p: Any) -> Any:
        t = int(state[0].count) + 1
        m, v = f32(b1) * state[0].mu + f32(1 - b1) * g, f32(b2) * state[0].nu + f32(1 - b2) * (g * g)
        c1, c2 = (1 - b1**t, (1 - b2**t) ** 0.5) if corrected else (1.0, 1.0)
        u = (m / f32(c1)) / (np.sqrt(v) / f32(c2) + f32(eps)) + f32(weight_decay) * p
        return f32(-learning_rate) * u, (ScaleByAdamState(np.full((), t, np.int32), m, v), *state[1:])

    return Transformation(init, update)


def sgd(learning_rate: float, momentum: float = 0.0, nesterov: bool = False) -> Transformation:
    """Without weight decay, as optax's; with a buffer in a dict."""

    def update(g: Any, state: Any, p: Any) -> Any:
        if not momentum:
            return f32(-learning_rate) * g, state
        trace = f32(momentum) * state["trace"] + g
        return f32(-learning_rate) * (g + f32(momentum) * trace if nesterov else trace), {"trace": trace}

    return Transformation(lambda p: {"trace": np.zeros_like(p)} if momentum else {}, update)


def spoils(learning_rate: float, momentum: float = 0.0) -> Transformation:
    def update(g: Any, state: Any, p: Any) -> Any:
        g *= f32(0.5)
        return f32(-learning_rate) * g, state

    return Transformation(lambda p: (), update)


def by_name(name: str, claim: str, **options: Any) -> conform.Report:
    return conform.run(f"tests.conform.test_optax:{name}", claim, **options)


def test_a_transformation_is_forced_saved_and_measured_as_any_other() -> None:
    report = by_name("adamw", "adamw")
    assert report.ok, report.text()
    assert {f.level for f in report.findings if f.status == "pass"} == {"L0", "L1", "L2", "L5", "L6", "L7"}
    (rule,) = report.of("L1")
    assert rule.data["mode"] == "forced"
    assert [f.data["have"] for f in report.of("L7")] == [[8 * n for n in (6144, 4257, 31, 256)]]


def test_options_reach_the_function_and_its_dialect_is_named() -> None:
    report = by_name("adamw", "adamw", corrected=False)
    assert "no-bias-correction" in {f.id for f in report.of("L1")}


def test_one_that_leaves_decay_to_others_is_asked_without_it() -> None:
    report = by_name("sgd", "sgd")
    assert report.ok, report.text()
    assert {f.setting for f in report.of("L1")} == {f"{x}-without-wd" for x in ("momentum", "plain", "nesterov")}
    assert "no weight decay" in report.findings[0].text


def test_a_transformation_that_writes_into_its_gradient_is_told() -> None:
    assert "gradient-changed" in conform.run(OptaxTarget(spoils), "sgd", only=["L0"]).ids


def with_defaults(learning_rate: float = 0.1, momentum: float = 0.0) -> Transformation:
    """As some of optax.contrib: nothing has to be given."""
    return sgd(learning_rate, momentum)


def factory(name: str = "adamw") -> conform.Target:
    """A function with defaults that makes a target is none of optax's."""
    return OptaxTarget({"adamw": adamw}[name])


def test_a_function_is_known_by_what_it_needs_or_makes() -> None:
    assert by_name("with_defaults", "sgd", only=["L1"]).ok
    assert by_name("factory", "adamw", only=["L1"]).ok


def test_optax_itself_is_stepped() -> None:
    optax = pytest.importorskip("optax", reason="JAX is no dependency of the tests")
    report = conform.run(OptaxTarget(optax.adamw), "adamw", only=["L1", "L2", "L5", "L7"])
    assert report.ids == {"corrections-f32"}, report.text()
