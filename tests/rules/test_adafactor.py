"""Adafactor: a rank-1 second moment without bias, a clipped update, a step in proportion to the weights."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.rules import whole
from tests.strategies import arrays, f32, follow, runs

MATRICES = [(5, 3), (3, 40), (2, 3, 17), (1, 7)]
BARE: dict[str, Any] = {"lr": 1.0, "relative_step": False, "scale_parameter": False}
"""p moves by U itself."""


def unfactored(ref: ModuleType, grads: Any, **hyper: Any) -> tuple[Any, Any]:
    """U of every step, clipped, and the last state."""
    rule, zero, out = ref.rules.adafactor, np.zeros_like(grads[0]), []
    state = rule.init(zero)
    for t, g in enumerate(grads, 1):
        p, state = rule.update(zero, g, state, t=t, **(BARE | hyper))
        out.append(-p)
    return out, state


def rms(x: Any) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in x.reshape(-1)) / x.size)


def test_the_golden_run(ref: ModuleType) -> None:
    p, state = follow(ref.Optimizer("adafactor"), [whole.P], [[g] for g in whole.G])
    assert whole.hex_words(p[0]) == "3f7ad5b9 c00059cd 3efb90f3 3e799695 3c53ab40 bf7f97f4"
    assert whole.hex_words(state[0]["R"]) == "3f294f30 3e69ae58"
    assert whole.hex_words(state[0]["C"]) == "3f682a51 3e85a99c 3e2a6424"


def stated(p: Any, grads: Any, h: dict[str, Any]) -> Any:
    """The rule of transformers once more, in float64 and one element at a time."""
    h = {"eps1": 1e-30, "eps2": 1e-3, "clip": 1.0, "decay_rate": -0.8, "beta1": None, "wd": 0.0} | h
    p = p.astype(float)
    (rows, columns), m = p.shape, np.zeros(p.shape)
    R, C, at = [0.0] * rows, [0.0] * columns, [(i, j) for i in range(rows) for j in range(columns)]
    for t, g in enumerate(grads, 1):
        b2 = 1 - t ** h["decay_rate"]
        rho = min(1e-6 * t if h.get("warmup_init") else 1e-2, t**-0.5) if h.get("relative_step", True) else h["lr"]
        alpha = max(h["eps2"], rms(p)) * rho if h.get("scale_parameter", True) else rho
        q = {(i, j): float(g[i, j]) ** 2 + h["eps1"] for i, j in at}
        R = [b2 * R[i] + (1 - b2) * sum(q[i, j] for j in range(columns)) / columns for i in range(rows)]
        C = [b2 * C[j] + (1 - b2) * sum(q[i, j] for i in range(rows)) / rows for j in range(columns)]
        U = np.array([g[i, j] / math.sqrt(R[i] * C[j] / (sum(R) / rows)) for i, j in at]).reshape(p.shape)
        U = alpha * U / max(1.0, rms(U) / h["clip"])
        if h["beta1"] is not None:
            U = m = h["beta1"] * m + (1 - h["beta1"]) * U
        p = p - alpha * h["wd"] * p - U
    return p


HYPERS = [
    {},
    {"eps1": 1e-4, "eps2": 0.3, "clip": 0.7, "decay_rate": -0.5, "wd": 0.2},
    {"lr": 0.02, "relative_step": False, "beta1": 0.8, "wd": 0.1},
    {"lr": 0.02, "relative_step": False, "scale_parameter": False, "beta1": 0.0},
    {"warmup_init": True, "beta1": 0.9},
]


@pytest.mark.parametrize("hyper", HYPERS)
@given(run=runs(steps=4, shapes=[(5, 3), (1, 7), (4, 1)], low=-6, high=3, kinds=["plain", "outlier"]))
def test_it_is_its_equations_in_float64(ref: ModuleType, hyper: dict[str, Any], run: Any) -> None:
    p, grads = run
    moved, _ = follow(ref.Optimizer("adafactor", **hyper), p, grads)
    want = stated(p, grads, hyper)
    np.testing.assert_allclose(moved, want, rtol=2e-6, atol=2e-6 * np.abs(p - want).max())


@pytest.mark.parametrize(
    "hyper", [{}, {"lr": 0.004, "eps1": 1e-4, "eps2": 0.1, "clip": 1.2, "decay_rate": -0.6, "wd": 0.3}]
)
@pytest.mark.parametrize("shape", [(7, 30), (3, 4, 50), (300,)])
def test_fifty_steps_agree_with_torch(ref: ModuleType, shape: Any, hyper: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(11)
    p = (rng.choice([-1, 1], shape) * rng.uniform(1, 3, shape)).astype(f32)
    grads = [(rng.standard_normal(shape) * 10 ** rng.uniform(-9, 0)).astype(f32) for _ in range(50)]
    h = {"lr": 1e-2, "eps1": None, "eps2": 1e-3, "clip": 1.0, "decay_rate": -0.8, "wd": 0.0} | hyper
    weight = torch.nn.Parameter(torch.from_numpy(p.copy()))
    opt = torch.optim.Adafactor(
        [weight], lr=h["lr"], eps=(h["eps1"], h["eps2"]), d=h["clip"], beta2_decay=h["decay_rate"], weight_decay=h["wd"]
    )
    for g in grads:
        weight.grad = torch.from_numpy(g)
        opt.step()
    (got,), (state,) = follow(ref.Optimizer("adafactor", variant="torch", **hyper), [p], [[g] for g in grads])
    np.testing.assert_allclose(got, weight.detach().numpy(), rtol=3e-6)
    for s in ref.rules.adafactor.states[:3]:
        if s.name in state:
            np.testing.assert_allclose(state[s.name], opt.state[weight][s.torch].numpy().squeeze(), rtol=2e-6)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6), (11,)])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"warmup_init": True, "wd": 0.3, "beta1": 0.9},
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "wd": 0.1, "clip": 0.5},
        {"lr": 0.02, "relative_step": False, "beta1": 0.8, "decay_rate": -0.5},
    ],
    ids=str,
)
def test_fifty_steps_agree_with_transformers(ref: ModuleType, shape: Any, hyper: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.optimization", reason="transformers is not installed").Adafactor
    rng = np.random.default_rng(3)
    p, *grads = rng.standard_normal((51, *shape)).astype(f32)
    weight = torch.nn.Parameter(torch.from_numpy(p.copy()))
    words = {"wd": "weight_decay", "clip": "clip_threshold"}
    opt = theirs([weight], **{words.get(n, n): x for n, x in hyper.items()})
    for g in grads:
        weight.grad = torch.from_numpy(g)
        opt.step()
    (got,), _ = follow(ref.Optimizer("adafactor", **hyper), [p], [[g] for g in grads])
    np.testing.assert_allclose(got, weight.detach().numpy(), rtol=2e-5, atol=2e-6)


@given(run=runs(shapes=[*MATRICES, (31,)]), clip=st.sampled_from([0.3, 1.0, 2.5]))
def test_the_update_is_no_larger_than_clip(ref: ModuleType, run: Any, clip: float) -> None:
    for u in unfactored(ref, run[1], clip=clip)[0]:
        assert rms(u) <= clip * (1 + 1e-6)


def test_an_update_below_clip_is_left_alone(ref: ModuleType) -> None:
    """A gradient that shrinks to a tenth after t=1 gives |U| < 1: its size must be seen."""
    g = np.outer(f32([1, 2]), f32([3, 1, 2])).astype(f32)
    u, _ = unfactored(ref, [g, f32(0.1) * g])
    omb2 = 2.0**-0.8
    np.testing.assert_allclose(u[1], 0.1 / math.sqrt(1 - omb2 + omb2 * 0.01), rtol=1e-6)


@given(a=arrays([(6,)], -4, 3, ["plain"]), b=arrays([(9,)], -4, 3, ["plain"]))
def test_the_first_update_of_a_rank_1_gradient_is_its_sign(ref: ModuleType, a: Any, b: Any) -> None:
    g = np.outer(a, b).astype(f32)
    u, _ = unfactored(ref, [g])
    np.testing.assert_allclose(u[0], np.sign(g), rtol=2e-6)


@given(run=runs(steps=3, shapes=MATRICES, low=-6, high=3))
def test_the_factors_are_the_row_and_column_means_of_the_whole_moment(ref: ModuleType, run: Any) -> None:
    v = 0.0
    for t, g in enumerate(run[1], 1):
        v = v + t**-0.8 * (g.astype(float) ** 2 + 1e-30 - v)
    _, state = unfactored(ref, run[1])
    np.testing.assert_allclose(state["R"], np.mean(v, -1), rtol=1e-6)
    np.testing.assert_allclose(state["C"], np.mean(v, -2), rtol=1e-6)


@given(run=runs(shapes=[(5, 3), (2, 3, 17), (31,)], low=-3, high=3, kinds=["plain"]), k=st.integers(-12, 12))
def test_the_gradients_unit_does_not_matter_without_eps1(ref: ModuleType, run: Any, k: int) -> None:
    p, grads = run
    for hyper in ({}, {"beta1": 0.9}):
        opt = ref.Optimizer("adafactor", eps1=0.0, **hyper)
        one, _ = follow(opt, p, grads)
        other, _ = follow(opt, p, [g * f32(2.0**k) for g in grads])
        same_bits(other, one, "p")


@given(run=runs(shapes=[(5, 3), (3, 40)], low=-3, high=3))
def test_transposing_the_tensor_transposes_the_result(ref: ModuleType, run: Any) -> None:
    one, a = unfactored(ref, run[1])
    other, b = unfactored(ref, [g.T for g in run[1]])
    np.testing.assert_allclose(other[-1].T, one[-1], rtol=2e-5)
    np.testing.assert_allclose(a["R"], b["C"], rtol=1e-6)


@given(run=runs(shapes=[(2, 3, 17), (2, 1, 5, 3)], low=-3, high=3))
def test_matrices_of_a_stack_have_factors_of_their_own(ref: ModuleType, run: Any) -> None:
    """The clip alone sees the whole stack."""
    whole_u, state = unfactored(ref, run[1], clip=1e30)
    for i in np.ndindex(run[0].shape[:-2]):
        one_u, one = unfactored(ref, [g[i] for g in run[1]], clip=1e30)
        same_bits(state["R"][i], one["R"], "R")
        same_bits(state["C"][i], one["C"], "C")
        same_bits(whole_u[-1][i], one_u[-1], "U")


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
@pytest.mark.parametrize("variant", ["transformers", "torch"])
def test_a_gradient_of_zeros_moves_nothing(ref: ModuleType, shape: Any, variant: str) -> None:
    p = np.ones(shape, f32)
    moved, _ = follow(ref.Optimizer("adafactor", variant=variant), p, [np.zeros(shape, f32)] * 2)
    same_bits(moved, p, "p")


def test_tiny_gradients_tell_the_dialects_apart(ref: ModuleType) -> None:
    """|g| = 1e-10: whole steps in transformers, where eps1 = 1e-30 = 1e-15^2; next to none in torch."""
    g = f32(1e-10) * np.random.default_rng(1).choice([-1, 1], (6, 5)).astype(f32)
    p = np.ones(g.shape, f32)
    moved, _ = follow(ref.Optimizer("adafactor"), p, [g])
    np.testing.assert_allclose(p - moved, 0.01 * np.sign(g), rtol=1e-4)
    moved, _ = follow(ref.Optimizer("adafactor", variant="torch"), p, [g])
    np.testing.assert_allclose(p - moved, 0.01 * 1e-10 * 2.0**23 * np.sign(g), rtol=2e-2)
    u, _ = unfactored(ref, [f32(1e-7) * g])
    np.testing.assert_allclose(u[0], np.sign(g) * 1e-2, rtol=1e-3)


def test_the_step_is_in_proportion_to_the_weights_but_for_small_ones(ref: ModuleType) -> None:
    """The first update is a sign, so a step is alpha: 1e-2 max(eps2, RMS(p))."""
    g = np.ones((2, 2), f32)
    for size, want in ((8.0, 0.08), (0.5, 0.005), (1e-6, 1e-5)):
        p = np.full((2, 2), size, f32)
        (moved,), _ = follow(ref.Optimizer("adafactor"), [p], [[g]])
        np.testing.assert_allclose(p - moved, want, rtol=1e-4)


def test_alpha_is_measured_before_the_decay_and_decays_the_weights(ref: ModuleType) -> None:
    p, g = f32([[4.0, -4.0]]), f32([[1.0, 1.0]])
    (moved,), _ = follow(ref.Optimizer("adafactor", wd=5.0), [p], [[g]])
    alpha = 0.04
    np.testing.assert_allclose(moved, p * (1 - 5 * alpha) - alpha, rtol=1e-6)


def test_relative_steps_shrink_with_the_root_of_t_after_warming_up(ref: ModuleType) -> None:
    rule, p, g = ref.rules.adafactor, np.ones((1, 1), f32), np.ones((1, 1), f32)
    for t, warm, want in ((4, False, 1e-2), (40000, False, 0.005), (4, True, 4e-6), (40000, True, 0.005)):
        state = {"R": f32([1]), "C": f32([1])}
        moved, _ = rule.update(np.zeros_like(p), g, state, t=t, eps2=1.0, warmup_init=warm)
        np.testing.assert_allclose(-moved, want, rtol=1e-6)


def test_momentum_holds_updates_of_the_learning_rates_they_were_made_with(ref: ModuleType) -> None:
    """A change of lr does not rescale what is in m already."""
    opt = ref.Optimizer("adafactor", lr=0.25, beta1=0.5, relative_step=False, scale_parameter=False)
    p, g = np.zeros((1, 1), f32), np.ones((1, 1), f32)
    (p,), state = opt.step([p], [g], opt.init([p]))
    assert state[0]["m"] == p * -1 == 0.125
    (q,), _ = opt.step([p], [g], state, lr=1.0)
    np.testing.assert_allclose(p - q, 0.5 * 0.125 + 0.5, rtol=1e-6)


def test_a_weight_that_is_not_a_number_shows(ref: ModuleType) -> None:
    """max(eps2, RMS) propagates NaN: the whole tensor has no size to step by."""
    p, g = f32([[np.nan, 1], [1, 1]]), np.ones((2, 2), f32)
    (moved,), _ = follow(ref.Optimizer("adafactor"), [p], [[g]])
    assert np.isnan(moved).all()


def rank_1(ref: ModuleType) -> Any:
    """A codec that keeps row and column means of a matrix; zeros decode to zeros."""

    def pack(x: Any, bounds: Any, codec: Any, shape: Any) -> Any:
        x = x.reshape(shape if len(shape) == 2 else (1, -1)).astype(float)
        return {"codes": np.concatenate([x.sum(1) / max(1, x.shape[1]), x.sum(0) / x.shape[0]]).astype(f32)}

    def unpack(arrays: Any, bounds: Any, codec: Any, shape: Any) -> Any:
        rows, columns = np.split(arrays["codes"].astype(float), shape[:1])
        return (np.outer(rows, columns) / (rows.mean() or 1)).astype(f32).reshape(-1)

    part = ref.spec.Part("codes", f32, "axis")
    return ref.spec.Codec("rank_1", "rank 1", "", "tensor", (part,), pack, unpack, needs=("shape",))


@given(run=runs(steps=5, shapes=[(5, 3), (3, 40)], low=-3, high=3, kinds=["plain"]))
def test_the_second_moment_is_adams_through_a_rank_1_codec(ref: ModuleType, run: Any) -> None:
    """Adam that reads v as its codec kept it, with Adafactor's decay, moves by Adafactor's U, but for Adam's bias."""
    grads = run[1]
    zero = np.zeros_like(run[0])
    ours, last = unfactored(ref, grads, clip=1e30, eps1=0.0)
    opt = ref.Optimizer("adam", {"v": rank_1(ref)}, reads="stored", lr=1.0, beta1=0.0, eps=0.0)
    state = opt.init([zero])
    assert not state[0]["v"].decode().any()
    for t, (g, u) in enumerate(zip(grads, ours, strict=True), 1):
        b2 = 1 - float(t) ** -0.8
        (p,), state = opt.step([zero], [g], state, beta2=b2)
        np.testing.assert_allclose(-p / math.sqrt(1 - b2**t), u, rtol=2e-6)
    rank = np.outer(last["R"], last["C"]) / last["R"].astype(float).mean()
    np.testing.assert_allclose(state[0]["v"].decode(), rank, rtol=1e-6)


def test_a_matrix_keeps_its_edges_alone(ref: ModuleType) -> None:
    state = ref.rules.adafactor.init(np.zeros((4096, 64), f32))
    assert sum(x.nbytes for x in state.values()) == 4 * (4096 + 64)


REFUSED = [
    ({"lr": 1e-3}, "lr must be None with relative_step=True, got 0.001"),
    ({"relative_step": False}, "lr must be given with relative_step=False"),
    ({"relative_step": False, "lr": 0.1, "warmup_init": True}, "warmup_init needs relative_step=True"),
    ({"clip": 0.0}, "clip must be > 0, got 0.0"),
    ({"decay_rate": 0.1}, "decay_rate must be <= 0, got 0.1"),
    ({"beta1": 1.0}, "beta1 must be .*, got 1.0"),
    ({"eps1": -1e-30}, "eps1 must be .*>= 0"),
    ({"lr": -1.0, "relative_step": False}, "lr must be .*-1.0"),
    ({"variant": "fairseq"}, "variant must be one of 'transformers', 'torch', got 'fairseq'"),
    ({"variant": "torch", "beta1": 0.9}, "beta1 must be None with variant='torch', got 0.9"),
    ({"variant": "torch", "scale_parameter": False}, "scale_parameter must be True with variant='torch'"),
]


@pytest.mark.parametrize(("hyper", "words"), REFUSED)
def test_what_cannot_be_is_refused_by_name(ref: ModuleType, hyper: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"Optimizer\('adafactor'\): {words}"):
        ref.Optimizer("adafactor", **hyper)
