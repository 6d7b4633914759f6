"""CAME: Adafactor's update, a momentum of it, and confidence where the two agree."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.strategies import f32, follow, runs

MATRICES = [(5, 3), (3, 40), (2, 3, 17), (1, 7)]


def rms(x: Any) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in x.reshape(-1)) / x.size)


def rank_1(R: list[float], C: list[float]) -> Any:
    return np.array([[r * c / (sum(R) / len(R)) for c in C] for r in R])


def means(x: Any) -> tuple[list[float], list[float]]:
    rows, columns = x.shape
    return [math.fsum(r) / columns for r in x.tolist()], [math.fsum(c) / rows for c in x.T.tolist()]


def mixed(beta: float, old: list[float], new: list[float]) -> list[float]:
    return [beta * a + (1 - beta) * b for a, b in zip(old, new, strict=True)]


def stated(p: Any, grads: Any, lr: float, b: Any, eps: Any, clip: float, wd: float) -> Any:
    """The rule once more, in float64."""
    p, m = p.astype(float), np.zeros(p.shape)
    R, C = [0.0] * p.shape[0], [0.0] * p.shape[1]
    Rr, Cr = R, C
    for g in grads:
        rows, columns = means(g.astype(float) ** 2 + eps[0])
        R, C = mixed(b[1], R, rows), mixed(b[1], C, columns)
        U = g / np.sqrt(rank_1(R, C))
        U = U / max(1.0, rms(U) / clip)
        m = b[0] * m + (1 - b[0]) * U
        rows, columns = means((U - m) ** 2 + eps[1])
        Rr, Cr = mixed(b[2], Rr, rows), mixed(b[2], Cr, columns)
        p = p - lr * wd * p - lr * m / np.sqrt(rank_1(Rr, Cr))
    return p


@pytest.mark.parametrize("clip", [0.6, 1.0, 50.0])
@given(run=runs(steps=4, shapes=[(5, 3), (1, 7), (4, 1)], low=-6, high=3, kinds=["plain"]))
def test_it_is_its_equations_in_float64(ref: ModuleType, clip: float, run: Any) -> None:
    p, grads = run
    hyper = {"lr": 0.01, "beta1": 0.8, "beta2": 0.9, "beta3": 0.95, "eps1": 1e-12, "eps2": 1e-6, "wd": 3.0}
    moved, _ = follow(ref.Optimizer("came", clip=clip, **hyper), p, grads)
    want = stated(p, grads, 0.01, (0.8, 0.9, 0.95), (1e-12, 1e-6), clip, 3.0)
    np.testing.assert_allclose(moved, want, rtol=4e-6, atol=4e-6 * np.abs(p - want).max())


def bare(ref: ModuleType, grads: Any, **hyper: Any) -> tuple[Any, Any]:
    """The weights from zero with lr 1, and the last state."""
    (p,), state = follow(ref.Optimizer("came", lr=1.0, **hyper), [np.zeros_like(grads[0])], [[g] for g in grads])
    return p, state[0]


@given(run=runs(steps=1, shapes=[*MATRICES, (31,)]), clip=st.sampled_from([0.3, 1.0, 2.5]))
def test_the_update_is_no_larger_than_clip(ref: ModuleType, run: Any, clip: float) -> None:
    """With beta1 = 0 the momentum is the update."""
    assert rms(bare(ref, run[1], clip=clip, beta1=0.0)[1]["m"]) <= clip * (1 + 1e-6)


def test_without_bias_correction_early_updates_are_cut(ref: ModuleType) -> None:
    """g / sqrt((1 - beta2) g^2) is 31.6 at t=1, and 31.6 is what a wide clip lets through."""
    g = np.full((3, 4), 0.02, f32)
    np.testing.assert_allclose(bare(ref, [g], beta1=0.0)[1]["m"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(bare(ref, [g], beta1=0.0, clip=99.0)[1]["m"], 1000**0.5, rtol=1e-5)


@given(run=runs(steps=3, shapes=MATRICES, low=-6))
def test_where_update_and_momentum_agree_the_instability_is_eps2(ref: ModuleType, run: Any) -> None:
    """beta1 = 0: m is U, so e is eps2 everywhere and W = U / sqrt((1 - beta3^t) eps2)."""
    p, state = bare(ref, run[1][:1], beta1=0.0, beta3=0.75, eps2=1e-4)
    np.testing.assert_allclose(p, -state["m"] / math.sqrt(0.25 * 1e-4), rtol=1e-5)
    _, state = bare(ref, run[1], beta1=0.0, beta3=0.75, eps2=1e-4)
    for name in ("Rr", "Cr"):
        np.testing.assert_allclose(state[name], 1e-4 * (1 - 0.75**3), rtol=1e-6)


def test_instability_is_measured_after_the_update_has_entered_the_momentum(ref: ModuleType) -> None:
    """First step: U = 1, m = .25, e = .75^2 (against the old m it would be 1)."""
    _, state = bare(ref, [np.ones((2, 2), f32)], beta1=0.75, beta3=0.5)
    np.testing.assert_allclose(state["Rr"], 0.5 * 0.75**2, rtol=1e-6)


def test_steady_rows_move_farther_than_those_that_flip(ref: ModuleType) -> None:
    g = np.ones((2, 3), f32)
    flip = f32([[1], [-1]]) * g
    p, _ = bare(ref, [g, flip, g, flip], beta3=0.5)
    assert (np.abs(p[0]) > 3 * np.abs(p[1])).all()


def test_a_vector_moves_by_its_momentum(ref: ModuleType) -> None:
    p, state = bare(ref, [f32([0.5, -2, 3])])
    same_bits(p, -state["m"], "p")
    assert set(state) == {"t", "V", "m"}


@given(run=runs(shapes=[(5, 3), (2, 3, 17), (31,)], low=-3, high=3, kinds=["plain"]), k=st.integers(-12, 12))
def test_the_gradients_unit_does_not_matter_without_eps1(ref: ModuleType, run: Any, k: int) -> None:
    p, grads = run
    opt = ref.Optimizer("came", eps1=0.0, wd=0.1)
    one, _ = follow(opt, p, grads)
    other, _ = follow(opt, p, [g * f32(2.0**k) for g in grads])
    same_bits(other, one, "p")


@given(run=runs(shapes=[(2, 3, 17), (2, 1, 5, 3)], low=-3, high=3))
def test_matrices_of_a_stack_have_factors_of_their_own(ref: ModuleType, run: Any) -> None:
    p, state = bare(ref, run[1], clip=1e30)
    for i in np.ndindex(p.shape[:-2]):
        one_p, one = bare(ref, [g[i] for g in run[1]], clip=1e30)
        same_bits(p[i], one_p, "p")
        for name in ("R", "C", "Rr", "Cr"):
            same_bits(state[name][i], one[name], name)


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_a_gradient_of_zeros_moves_nothing(ref: ModuleType, shape: Any) -> None:
    p = np.ones(shape, f32)
    moved, _ = follow(ref.Optimizer("came"), p, [np.zeros(shape, f32)] * 2)
    same_bits(moved, p, "p")


def test_decay_is_decoupled_and_comes_first(ref: ModuleType) -> None:
    g = np.ones((1, 1), f32)
    (moved,), state = follow(ref.Optimizer("came", lr=0.5, wd=1.5), [4 * g], [[g]])
    _, same = bare(ref, [g])
    same_bits(state[0]["m"], same["m"], "m")
    step = (0.1 / math.sqrt(1e-4 * (0.9**2 + 1e-16))) * 0.5
    np.testing.assert_allclose(moved, 4 * 0.25 - step, rtol=1e-5)


def test_a_matrix_keeps_a_momentum_and_two_pairs_of_edges(ref: ModuleType) -> None:
    state = ref.rules.came.init(np.zeros((64, 48), f32))
    assert sum(x.nbytes for x in state.values()) == 4 * 64 * 48 + 8 * (64 + 48)


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"lr": -1.0}, "lr must be > 0, got -1.0"),
        ({"clip": 0.0}, "clip must be > 0, got 0.0"),
        ({"beta3": 1.0}, "beta3 must be .*, got 1.0"),
        ({"eps2": -1.0}, "eps2 must be .*, got -1.0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(ref: ModuleType, hyper: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"Optimizer\('came'\): {words}"):
        ref.Optimizer("came", **hyper)
