"""QLoRA's reference: the layer begins as its base, gradients are those of finite differences, frozen stays frozen."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 20), st.sampled_from([(), (3,), (2, 3)]), st.integers(0, 2**20))
f32, f64 = np.float32, np.float64


def layer(drawn: Any, dtype: Any = f32, dropped: bool = False) -> dict[str, Any]:
    """Weights, adapters that have been trained, tokens and a gradient, all different from their defaults."""
    out, into, tokens, seed = drawn
    draw = np.random.default_rng(seed)
    r = int(draw.integers(1, min(out, into) + 1))
    shapes = {"x": (*tokens, into), "W": (out, into), "A": (r, into), "B": (out, r), "dy": (*tokens, out)}
    made: dict[str, Any] = {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    made["mask"] = (2.0 * (draw.random(made["x"].shape) < 0.5)).astype(dtype) if dropped else None
    return made | {"s": float(draw.uniform(0.2, 3))}


def outputs(ref: ModuleType, made: dict[str, Any], **other: Any) -> Any:
    now = {k: v for k, v in made.items() if k != "dy"} | other
    return ref.qlora.forward(**now)


@given(drawn=SHAPES)
def test_a_layer_begins_as_its_base(ref: ModuleType, drawn: Any) -> None:
    """B is zero: the output is the base's, and A has no gradient yet, but B has."""
    made = layer(drawn)
    A, B = ref.qlora.init(made["W"].shape, len(made["A"]), seed=drawn[3])
    assert A.dtype == B.dtype == f32 and not B.any()
    assert A.any() and np.abs(A).max() <= 1 / math.sqrt(A.shape[1])
    assert np.array_equal(outputs(ref, made, A=A, B=B), made["x"] @ made["W"].T)
    _, dA, dB = ref.qlora.backward(**made | {"A": A, "B": B})
    assert not dA.any() and (dB.any() or not made["x"].any())


def test_a_starts_evenly_over_its_range(ref: ModuleType) -> None:
    A, _ = ref.qlora.init((64, 100), 64, seed=1)
    assert abs(A.mean()) < 3e-3 and abs(A.std() * math.sqrt(300) - 1) < 0.02
    assert not np.array_equal(A, ref.qlora.init((64, 100), 64, seed=2)[0])


@pytest.mark.parametrize("dropped", [False, True])
@given(drawn=SHAPES)
def test_gradients_are_finite_differences(ref: ModuleType, dropped: bool, drawn: Any) -> None:
    """The loss is sum(y dy) in float64: linear in each argument, so that a central difference is exact but for
    rounding."""
    made = layer(drawn, f64, dropped)
    grads = dict(zip(("x", "A", "B"), ref.qlora.backward(**made), strict=True))
    for name, got in grads.items():
        assert got.shape == made[name].shape and got.dtype == f64
        for at in np.ndindex(made[name].shape):
            step = np.zeros_like(made[name])
            step[at] = 0.5
            up, down = (np.sum(made["dy"] * outputs(ref, made, **{name: made[name] + sign * step})) for sign in (1, -1))
            assert got[at] == pytest.approx(up - down, rel=1e-9, abs=1e-9), (name, at)


@pytest.mark.parametrize("codec", ["nf4", "fp4", "double"])
@given(drawn=SHAPES)
def test_frozen_weights_are_decoded_rounded_and_never_written(ref: ModuleType, codec: str, drawn: Any) -> None:
    """The box acts as the bfloat16 numbers that it stands for, in both passes, and its bytes stay."""
    made = layer(drawn)
    box = ref.qlora.store(made["W"], codec)
    before = {k: v.copy() for k, v in box.arrays.items()}
    dense = ref.codecs.bf16.encode(box.decode()).decode()
    for W in (box, dense):
        y, grads = outputs(ref, made, W=W), ref.qlora.backward(**made | {"W": W})
        if W is box:
            kept = y, *grads
    for got, want in zip(kept, (y, *grads), strict=True):
        same_bits(got, want, codec)
    for name, array in before.items():
        same_bits(box.arrays[name], array, name)


@given(drawn=SHAPES, c=st.sampled_from([0.25, 2.0, 64.0]))
def test_what_one_factor_gains_the_other_may_lose(ref: ModuleType, drawn: Any, c: float) -> None:
    """A c and B / c give the same output, bit for bit where c is a power of two; s is a factor of the correction."""
    made = layer(drawn)
    c = f32(c)
    same_bits(outputs(ref, made, A=made["A"] * c, B=made["B"] / c), outputs(ref, made), "y")
    base = made["x"] @ made["W"].T
    one, three = (outputs(ref, made, s=s) - base for s in (1.0, 3.0))
    assert np.allclose(three, 3 * one, rtol=1e-5, atol=1e-4)


@given(drawn=SHAPES)
def test_a_merged_layer_is_the_layer(ref: ModuleType, drawn: Any) -> None:
    """And its correction has the adapter's rank."""
    made = layer(drawn)
    merged = ref.qlora.merge(*(made[k] for k in "WABs"))
    assert np.allclose(made["x"] @ merged.T, outputs(ref, made), rtol=1e-4, atol=1e-4)
    exact = ref.qlora.merge(made["W"].astype(f64), made["A"].astype(f64), made["B"].astype(f64), made["s"])
    assert np.linalg.matrix_rank(exact - made["W"]) <= len(made["A"])


def test_a_merged_layer_stored_again_is_another(ref: ModuleType) -> None:
    """Requantising W + s B A loses part of it: the error is of the size of 4 bits, not of the correction."""
    made = layer((9, 20, (3,), 5))
    box = ref.qlora.store(made["W"], "nf4")
    small = 0.01 * made["B"]
    merged = ref.qlora.merge(box, made["A"], small, 1.0)
    again = ref.qlora.store(merged, "nf4")
    correction, lost = np.abs(small @ made["A"]).max(), np.abs(again.decode() - merged).max()
    assert lost > correction
    same_bits(ref.qlora.store(box.decode(), "nf4").codes, box.codes, "no adapter: nothing is lost")


@given(drawn=SHAPES)
def test_a_trace_is_the_step(ref: ModuleType, drawn: Any) -> None:
    made = layer(drawn, dropped=True) | {"W": ref.qlora.store(layer(drawn)["W"])}
    run, lines = ref.qlora.trace(**made), []
    while True:
        try:
            lines.append(next(run))
        except StopIteration as stop:
            y, grads = stop.value
            break
    same_bits(y, outputs(ref, made), "y")
    for got, want in zip(grads, ref.qlora.backward(**made), strict=True):
        same_bits(got, want, "gradient")
    assert [line.name for line in lines] == [*("W_hat x_A h y".split()), *("W_hat x_A h dB dh dA dx_A dx".split())]
    assert all(line.equation.startswith(f"{line.name} = ") and ":" in line.where for line in lines)


def test_the_scale_of_a_correction(ref: ModuleType) -> None:
    assert ref.qlora.scale(16, 64) == 0.25
    assert ref.qlora.scale(16, 64, stabilized=True) == 2.0


@given(p=st.floats(0, 0.9), seed=st.integers(0, 2**60), step=st.integers(1, 2**40))
def test_dropout_keeps_the_mean(ref: ModuleType, p: float, seed: int, step: int) -> None:
    mask = ref.qlora.dropout((40, 100), p, seed, step)
    assert set(np.unique(mask)) <= {f32(0), f32(1 / (1 - p))}
    assert abs((mask == 0).mean() - p) < 0.05
    if 0.1 < p:
        assert not np.array_equal(mask, ref.qlora.dropout((40, 100), p, seed, step + 1))


W, A, B = np.ones((4, 6), f32), np.ones((2, 6), f32), np.ones((4, 2), f32)
X = np.ones((3, 6), f32)
BAD: list[tuple[str, Any, str]] = [
    ("TypeError", lambda q: q.forward(X.astype(np.int32), W, A, B, 1), "x must be a float32 or float64 array"),
    ("TypeError", lambda q: q.forward(X, W.astype(np.float16), A, B, 1), "W must be a float32 or float64"),
    ("TypeError", lambda q: q.merge(W, [1], B, 1), "A must be a float32"),
    ("ShapeError", lambda q: q.forward(X[:, :5], W, A, B, 1), r"x must be of shape \(3, 6\), got \(3, 5\)"),
    ("ShapeError", lambda q: q.forward(X, W[0], A, B, 1), "W must be a matrix"),
    ("ShapeError", lambda q: q.forward(X, W, np.ones((5, 6), f32), B, 1), "r from 1 to 4"),
    ("ShapeError", lambda q: q.forward(X, W, A[:0], B[:, :0], 1), "r from 1 to 4"),
    ("ShapeError", lambda q: q.forward(X, W, A, B.T, 1), r"B must be of shape \(4, 2\)"),
    ("ShapeError", lambda q: q.backward(X, X, W, A, B, 1), r"dy must be of shape \(3, 4\)"),
    ("ShapeError", lambda q: q.forward(X, W, A, B, 1, X[0]), "mask must be of shape"),
    ("ShapeError", lambda q: q.store(W[0]), "must be a matrix"),
    ("ValueError", lambda q: q.store(W, "q4"), "codec must be one of nf4, fp4, double, got 'q4'"),
    ("ValueError", lambda q: q.store(W, block=63), "block must be one of"),
    ("ValueError", lambda q: q.init((4, 6), 0), "rank must be whole, 1 to 4"),
    ("ValueError", lambda q: q.init((4, 6), 5), "rank must be whole, 1 to 4"),
    ("ValueError", lambda q: q.init((4, 6), True), "rank must be whole"),
    ("ValueError", lambda q: q.scale(math.nan, 4), "alpha must be finite"),
    ("ValueError", lambda q: q.scale(1, 0), "rank must be >= 1"),
    ("ValueError", lambda q: q.dropout((2,), 1.0, 0, 1), "p must be >= 0 and < 1"),
]


@pytest.mark.parametrize(("kind", "call", "says"), BAD, ids=[b[2][:30] for b in BAD])
def test_bad_input_is_named(ref: ModuleType, kind: str, call: Any, says: str) -> None:
    error = {"TypeError": TypeError, "ValueError": ValueError}.get(kind) or getattr(ref, kind)
    with pytest.raises(error, match=says):
        call(ref.qlora)
