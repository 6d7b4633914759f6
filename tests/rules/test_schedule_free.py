"""Schedule-Free: gradients between a base and its average, which is rebuilt and never kept."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, unsigned_zero
from tests.strategies import f32, follow, runs

HYPER = {"lr": 0.02, "beta1": 0.8, "beta2": 0.97, "eps": 1e-3, "wd": 0.3}


def module(ref: ModuleType) -> Any:
    return importlib.import_module(f"{ref.__name__}.rules.schedule_free")


def three_sequences(p: Any, grads: Any, *, r: float = 0, power: float = 2, warmup: int = 0, **h: Any) -> Any:
    """(x, y, z) after each step as the paper has them, in float64: x is kept, y is their mixture."""
    x = z = y = p.astype(np.float64)
    v, total, top, out = np.zeros_like(z), 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        g = g.astype(np.float64)
        v = h["beta2"] * v + (1 - h["beta2"]) * g * g
        rate = h["lr"] * min(1, t / warmup) if warmup else h["lr"]
        z = z - rate * (g / (np.sqrt(v / (1 - h["beta2"] ** t)) + h["eps"]) + h["wd"] * y)
        top = max(top, rate)
        weight = t**r * top**power
        total += weight
        x = x + weight / total * (z - x)
        y = (1 - h["beta1"]) * z + h["beta1"] * x
        out.append((x, y, z))
    return out


OPTIONS = [{}, {"warmup": 5}, {"r": 1.5}, {"lr_power": 0.5, "warmup": 3}, {"lr_power": 0.0, "warmup": 7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_papers_three_sequences(ref: ModuleType, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    p, grads = rng.standard_normal(40).astype(f32), rng.standard_normal((12, 40)).astype(f32)
    words = {"power" if k == "lr_power" else k: x for k, x in options.items()}
    opt, q = ref.Optimizer("schedule_free", **HYPER, **options), [p]
    state = opt.init(q)
    for g, (x, y, z) in zip(grads, three_sequences(p, grads, **HYPER, **words), strict=True):
        q, state = opt.step(q, [g], state)
        np.testing.assert_allclose(q[0], y, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(state[0]["z"], z, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(module(ref).averaged(q[0], state[0], 0.8), x, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", [{}, {"warmup": 5, "r": 1.0}, {"lr_power": 1.0, "warmup": 3}], ids=str)
def test_fifty_steps_agree_with_the_authors_package(ref: ModuleType, options: dict[str, Any], foreach: bool) -> None:
    """schedulefree 1.4: earlier releases fold the correction of v into the rate, which changes the weights c."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("schedulefree")
    rng = np.random.default_rng(8)
    p = (rng.choice([-1, 1], 500) * rng.uniform(1, 3, 500)).astype(f32)
    grads = [(rng.standard_normal(500) * 10 ** rng.uniform(-4, 0)).astype(f32) for _ in range(50)]
    weight = torch.nn.Parameter(torch.from_numpy(p.copy()))
    other = theirs.AdamWScheduleFree(
        [weight], lr=0.003, betas=(0.8, 0.97), eps=1e-7, weight_decay=0.11, r=options.get("r", 0.0), foreach=foreach,
        warmup_steps=options.get("warmup", 0), weight_lr_power=options.get("lr_power", 2.0),
    )  # fmt: skip
    other.train()
    for g in grads:
        weight.grad = torch.from_numpy(g.copy())
        other.step()
    opt = ref.Optimizer("schedule_free", lr=0.003, betas=(0.8, 0.97), eps=1e-7, weight_decay=0.11, **options)
    got, state = follow(opt, [p], [[g] for g in grads])
    np.testing.assert_allclose(got[0], weight.detach().numpy(), rtol=3e-6)
    np.testing.assert_allclose(state[0]["z"], other.state[weight]["z"].numpy(), rtol=3e-6)
    other.eval()
    np.testing.assert_allclose(module(ref).averaged(got[0], state[0], 0.8), weight.detach().numpy(), rtol=5e-6)


@given(run=runs(low=-3, high=3), beta1=st.sampled_from([0.5, 0.9, 0.99]))
def test_there_and_back_is_the_identity_to_rounding(ref: ModuleType, run: Any, beta1: float) -> None:
    p, grads = run
    got, state = follow(ref.Optimizer("schedule_free", beta1=beta1), [p], [[g] for g in grads])
    x = module(ref).averaged(got[0], state[0], beta1)
    back = module(ref).live(x, state[0], beta1)
    np.testing.assert_allclose(back, got[0], rtol=1e-5, atol=1e-6)


@given(run=runs(steps=1, low=-3, high=3))
def test_after_the_first_step_all_three_are_one(ref: ModuleType, run: Any) -> None:
    """c = 1 at t = 1: the average is the base itself, and so is their mixture."""
    p, grads = run
    got, state = follow(ref.Optimizer("schedule_free", **HYPER), [p], [[g] for g in grads])
    same_bits(unsigned_zero(got[0]), unsigned_zero(state[0]["z"]), "z")
    same_bits(unsigned_zero(module(ref).averaged(got[0], state[0], 0.8)), unsigned_zero(got[0]), "x")


def test_with_beta1_near_one_gradients_are_taken_at_the_average(ref: ModuleType) -> None:
    rng = np.random.default_rng(1)
    p, grads = rng.standard_normal(20).astype(f32), rng.standard_normal((30, 20)).astype(f32)
    got, state = follow(ref.Optimizer("schedule_free", lr=0.01, beta1=0.9999), [p], [[g] for g in grads])
    far = np.abs(got[0] - state[0]["z"]).max()
    assert np.abs(got[0] - module(ref).averaged(got[0], state[0], 0.9999)).max() < 1e-3 * far


def test_decay_is_taken_at_the_live_weights(ref: ModuleType) -> None:
    """y = 4, z = 2, no gradient: the step is wd y = 1, not wd z; v keeps clean of it."""
    state = {"z": f32([2.0]), "v": f32([0.0]), "weight_sum": np.float64(0.0), "lr_max": np.float64(0.0)}
    p, new = ref.rules.schedule_free.update(f32([4.0]), f32([0.0]), state, t=1, lr=0.5, wd=0.25)
    assert (p[0], new["z"][0], new["v"][0]) == (1.5, 1.5, 0.0)


def test_a_lower_rate_keeps_the_weight_of_the_highest(ref: ModuleType) -> None:
    """w goes by the largest rate so far: after a drop of lr c is 1/2, not 1/5."""
    opt, p, g = ref.Optimizer("schedule_free", lr=0.2, wd=0.0), [f32([1.0])], [f32([1.0])]
    p, state = opt.step(p, g, opt.init(p))
    p, state = opt.step(p, g, state, lr=0.1)
    assert float(state[0]["lr_max"]) == 0.2
    assert float(state[0]["weight_sum"]) == pytest.approx(2 * 0.04)


@given(run=runs(shapes=[(2,), (31,), (129,)]), seed=st.integers(0, 2**32 - 1))
def test_each_element_goes_alone(ref: ModuleType, run: Any, seed: int) -> None:
    """Permuting elements permutes the result, and two halves step as the whole does."""
    p, grads = run
    order, cut = np.random.default_rng(seed).permutation(p.size), p.size // 2
    opt = ref.Optimizer("schedule_free", **HYPER, warmup=2)
    one, _ = follow(opt, [p], [[g] for g in grads])
    other, _ = follow(opt, [p[order]], [[g[order]] for g in grads])
    same_bits(other[0], one[0][order], "p")
    halves, _ = follow(opt, [p[:cut], p[cut:]], [[g[:cut], g[cut:]] for g in grads])
    same_bits(np.concatenate(halves), one[0], "p")


@given(run=runs(low=-6), k=st.integers(-6, 6))
def test_the_gradients_unit_does_not_matter(ref: ModuleType, run: Any, k: int) -> None:
    p, grads = run
    one, _ = follow(ref.Optimizer("schedule_free", **HYPER), [p], [[g] for g in grads])
    scaled = ref.Optimizer("schedule_free", **(HYPER | {"eps": 1e-3 * 2.0**k}))
    other, _ = follow(scaled, [p], [[g * f32(2.0**k)] for g in grads])
    same_bits(other[0], one[0], "p")


def test_a_rate_of_zero_moves_nothing(ref: ModuleType) -> None:
    p, g = f32([1.0, -2.0]), f32([3.0, 0.5])
    moved, state = follow(ref.Optimizer("schedule_free", lr=0.0, wd=0.1), [p], [[g], [g]])
    same_bits(moved[0], p, "p")
    same_bits(state[0]["z"], p, "z")


def test_the_bytes_are_eight_a_parameter_and_sixteen(ref: ModuleType) -> None:
    state = ref.rules.schedule_free.init(np.zeros((3, 5), f32))
    assert sum(x.nbytes for x in state.values()) == 15 * 8 + 16


def test_a_codec_for_all_states_leaves_the_base_whole(ref: ModuleType) -> None:
    opt = ref.Optimizer("schedule_free", "dynamic8")
    assert {n: c.stem for n, c in opt.codecs.items() if n in ("z", "v")} == {"z": "f32", "v": "dynamic8"}


@pytest.mark.parametrize("bad", [{"warmup": -1}, {"warmup": 2.5}, {"beta1": 1.0}, {"eps": -1}, {"wd": -0.1}])
def test_what_has_no_meaning_is_refused_by_name(ref: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"schedule_free.*{next(iter(bad))} must be"):
        ref.Optimizer("schedule_free", **bad)


def test_without_beta1_there_is_no_average_to_rebuild(ref: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"schedule_free.averaged: beta1 must be > 0, got 0\.0"):
        module(ref).averaged(f32([1.0]), {"z": f32([1.0])}, 0.0)
