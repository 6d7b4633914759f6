"""SGD: the first step is not dampened, nesterov looks ahead, the learning rate stands outside the buffer."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.bits import same_bits
from tests.strategies import f32, follow, runs


def path(ref: ModuleType, g: float, steps: int, **hyper: Any) -> list[float]:
    """Where a weight that starts at 0 stands after each step of one constant gradient."""
    opt, p, out = ref.Optimizer("sgd", lr=1.0, **hyper), np.zeros(1, f32), []
    state = opt.init(p)
    for _ in range(steps):
        p, state = opt.step(p, np.full(1, g, f32), state)
        out.append(round(float(p[0]), 5))
    return out


def test_dampening_starts_at_the_second_step(ref: ModuleType) -> None:
    assert path(ref, 1.0, 2, momentum=0.9, dampening=0.5) == [-1.0, -2.4]


def test_nesterov_steps_along_g_plus_mu_buf(ref: ModuleType) -> None:
    assert path(ref, 1.0, 2, momentum=0.9, nesterov=True) == [-1.9, -4.61]


def test_without_nesterov_the_step_is_the_buffer(ref: ModuleType) -> None:
    assert path(ref, 1.0, 3, momentum=0.9) == [-1.0, -2.9, -5.61]


@given(run=runs())
def test_without_momentum_it_is_p_minus_lr_g_and_keeps_nothing(ref: ModuleType, run: Any) -> None:
    p, grads = run
    got, state = follow(ref.Optimizer("sgd", lr=0.03), [p], [[g] for g in grads])
    for g in grads:
        p = p - f32(0.03) * g
    same_bits(got[0], p, "p")
    assert state == [{"t": 3}]


def test_a_constant_gradient_fills_the_buffer_geometrically(ref: ModuleType) -> None:
    g = f32([0.3, -2.0])
    opt = ref.Optimizer("sgd", momentum=0.9)
    _, state = follow(opt, [np.zeros(2, f32)], [[g]] * 25)
    assert state[0]["buf"] == pytest.approx(g * (1 - 0.9**25) / (1 - 0.9), rel=1e-5)


def test_a_change_of_learning_rate_rescales_history(ref: ModuleType) -> None:
    """lr multiplies the buffer when it is used, not the gradient when it goes in."""
    p, g = np.zeros(1, f32), np.ones(1, f32)
    _, state = follow(ref.Optimizer("sgd", lr=1.0, momentum=0.5), [p], [[g]])
    (moved,), _ = ref.Optimizer("sgd", lr=10.0, momentum=0.5).step([p], [g], state)
    assert moved[0] == -15.0


def test_decay_goes_through_the_buffer(ref: ModuleType) -> None:
    p, zero = f32([2.0]), np.zeros(1, f32)
    moved, state = follow(ref.Optimizer("sgd", lr=0.5, momentum=0.5, wd=0.25), [p], [[zero], [zero]])
    assert state[0]["buf"].tolist() == [0.25 + 0.25 * 1.75]
    assert moved[0].tolist() == [2.0 - 0.5 * 0.5 - 0.5 * 0.6875]


def test_with_lr_inside_a_change_of_learning_rate_leaves_history_alone(ref: ModuleType) -> None:
    """Steps of 1, then of 0.5 + 10: what the buffer holds was multiplied by the rate of its own time."""
    p, g = np.zeros(1, f32), np.ones(1, f32)
    opt = ref.Optimizer("sgd", lr=1.0, momentum=0.5, lr_at="inside")
    p, state = opt.step([p], [g], opt.init([p]))
    (moved,), state = opt.step(p, [g], state, lr=10.0)
    assert (moved[0], state[0]["buf"][0]) == (-11.5, 10.5)


@given(run=runs())
def test_with_one_learning_rate_its_place_changes_rounding_alone(ref: ModuleType, run: Any) -> None:
    """A power of two: not even that."""
    p, grads = run
    hyper = {"lr": 0.125, "momentum": 0.8, "nesterov": True, "wd": 0.5}
    one, _ = follow(ref.Optimizer("sgd", **hyper), p, grads)
    other, _ = follow(ref.Optimizer("sgd", lr_at="inside", **hyper), p, grads)
    same_bits(other, one, "p")


def test_decoupled_decay_shrinks_the_weight_and_stays_out_of_the_buffer(ref: ModuleType) -> None:
    p, zero = f32([4.0]), np.zeros(1, f32)
    opt = ref.Optimizer("sgd", lr=0.5, momentum=0.5, wd=0.25, decay="decoupled")
    moved, state = follow(opt, [p], [[zero], [zero]])
    assert moved[0].tolist() == [4.0 * 0.875**2]
    assert state[0]["buf"].tolist() == [0.0]


@pytest.mark.parametrize("bad", [{"lr_at": "within"}, {"decay": "L2"}, {"momentum": 1.0}])
def test_what_has_no_meaning_is_refused_by_name(ref: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"sgd.*{next(iter(bad))} must be"):
        ref.Optimizer("sgd", **bad)
