"""Adam-mini: AdamW with one second moment a block."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.rules.adaptive import largest_update
from tests.strategies import f32, follow, runs

HYPER = {"lr": 0.02, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "wd": 0.4}
BLOCKS: list[dict[str, Any]] = [
    {"blocks": "rows"},
    {"blocks": "heads", "heads": 3},
    {"blocks": "whole"},
    {"blocks": "elementwise"},
]
SHAPES = [(6, 5), (3, 40), (9, 2, 17)]
FEW = [(6, 5), (3, 7), (9, 2, 3)]
every_kind = pytest.mark.parametrize("kind", BLOCKS, ids=lambda k: k["blocks"])


def cut(x: Any, kind: dict[str, Any]) -> list[Any]:
    """The blocks of a tensor, as views."""
    if kind["blocks"] == "elementwise":
        return [x[i : i + 1] for x in [x.reshape(-1)] for i in range(x.size)]
    return {"rows": list(x), "heads": np.split(x, 3) if len(x) % 3 == 0 else [], "whole": [x]}[kind["blocks"]]


def stated(p: Any, grads: Any, kind: dict[str, Any]) -> Any:
    """The rule once more, block by block in float64."""
    p, h = p.astype(float), HYPER
    m = [np.zeros(b.shape) for b in cut(p, kind)]
    v = [0.0] * len(m)
    for t, g in enumerate(grads, 1):
        for b, (w, gb) in enumerate(zip(cut(p, kind), cut(g.astype(float), kind), strict=True)):
            v[b] = h["beta2"] * v[b] + (1 - h["beta2"]) * math.fsum(x**2 for x in gb.reshape(-1)) / gb.size
            m[b] = h["beta1"] * m[b] + (1 - h["beta1"]) * gb
            d = math.sqrt(v[b] / (1 - h["beta2"] ** t)) + h["eps"]
            w[...] = w * (1 - h["lr"] * h["wd"]) - h["lr"] * m[b] / (1 - h["beta1"] ** t) / d
    return p


@every_kind
@given(run=runs(steps=4, shapes=SHAPES, low=-9))
def test_it_is_its_equations_block_by_block(ref: ModuleType, kind: dict[str, Any], run: Any) -> None:
    p, grads = run
    moved, _ = follow(ref.Optimizer("adam_mini", **HYPER, **kind), p, grads)
    np.testing.assert_allclose(moved, stated(p, grads, kind), rtol=2e-6, atol=1e-7)


@every_kind
@given(run=runs(shapes=FEW))
def test_a_block_is_a_tensor_of_its_own(ref: ModuleType, kind: dict[str, Any], run: Any) -> None:
    p, grads = run
    one, state = follow(ref.Optimizer("adam_mini", **HYPER, **kind), [p], [[g] for g in grads])
    alone = ref.Optimizer("adam_mini", **HYPER, blocks="whole")
    parts, states = follow(alone, cut(p, kind), [cut(g, kind) for g in grads])
    for got, want in zip(cut(one[0], kind), parts, strict=True):
        same_bits(np.ascontiguousarray(got), want, "p")
    same_bits(state[0]["v"].reshape(-1), np.array([s["v"] for s in states]), "v")


@given(run=runs(steps=5, shapes=SHAPES))
def test_blocks_of_one_weight_are_adamw(ref: ModuleType, run: Any) -> None:
    """To rounding: lr (m / bc1 / d) for (lr / bc1) (m / d). The second moment is the same bits."""
    p, grads = run
    one, a = follow(ref.Optimizer("adam_mini", blocks="elementwise", **HYPER), [p], [[g] for g in grads])
    other, b = follow(ref.Optimizer("adamw", **HYPER), [p], [[g] for g in grads])
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6, atol=1e-7)
    same_bits(a[0]["v"], b[0]["v"], "v")


@every_kind
@given(run=runs(steps=5, shapes=SHAPES), size=st.floats(1e-6, 1e3))
def test_gradients_of_one_size_make_it_adamw(ref: ModuleType, kind: dict[str, Any], run: Any, size: float) -> None:
    p, grads = run
    grads = [np.where(g < 0, f32(-size), f32(size)) for g in grads]
    one, _ = follow(ref.Optimizer("adam_mini", **HYPER, **kind), p, grads)
    other, _ = follow(ref.Optimizer("adamw", **HYPER), p, grads)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def block_mean(ref: ModuleType) -> Any:
    """A codec that keeps the mean of each row."""

    def pack(x: Any, bounds: Any, codec: Any, shape: Any) -> Any:
        rows = x.astype(float).reshape(shape[0] or 1, -1)
        kept = np.zeros(sum(shape), f32)
        kept[: shape[0]] = rows.sum(1)[: shape[0]] / max(1, rows.shape[1])
        return {"codes": kept}

    def unpack(arrays: Any, bounds: Any, codec: Any, shape: Any) -> Any:
        return np.repeat(arrays["codes"][: shape[0]], math.prod(shape) // shape[0])

    part = ref.spec.Part("codes", f32, "axis")
    return ref.spec.Codec("block_mean", "block means", "", "tensor", (part,), pack, unpack, needs=("shape",))


@given(run=runs(steps=6, shapes=SHAPES))
def test_the_second_moment_is_adams_through_a_block_mean_codec(ref: ModuleType, run: Any) -> None:
    """AdamW that reads v as its codec kept it."""
    p, grads = run
    opt = ref.Optimizer("adamw", {"v": block_mean(ref)}, reads="stored", **HYPER)
    assert not opt.init([p])[0]["v"].decode().any()
    one, a = follow(opt, [p], [[g] for g in grads])
    other, b = follow(ref.Optimizer("adam_mini", **HYPER), [p], [[g] for g in grads])
    np.testing.assert_allclose(a[0]["v"].codes[: len(p)], b[0]["v"], rtol=1e-6)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6, atol=1e-7)


@every_kind
@given(run=runs(shapes=SHAPES, low=-6), k=st.integers(-6, 6))
def test_the_gradients_unit_does_not_matter(ref: ModuleType, kind: dict[str, Any], run: Any, k: int) -> None:
    p, grads = run
    one, _ = follow(ref.Optimizer("adam_mini", **HYPER, **kind), p, grads)
    scaled = HYPER | {"eps": HYPER["eps"] * 2.0**k}
    other, _ = follow(ref.Optimizer("adam_mini", **scaled, **kind), p, [g * f32(2.0**k) for g in grads])
    same_bits(other, one, "p")


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.8, 0.97)])
@given(seed=st.integers(0, 2**32 - 1))
def test_a_blocks_mean_square_step_is_bounded_as_adams(ref: ModuleType, beta1: float, beta2: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rule, zero = ref.rules.adam_mini, np.zeros((4, 30), f32)
    state = rule.init(zero)
    for t in range(1, 41):
        g = (rng.choice([-1, 1], zero.shape) * 10 ** rng.uniform(-6, 0, zero.shape)).astype(f32)
        p, state = rule.update(zero, g, state, t=t, lr=1.0, beta1=beta1, beta2=beta2, eps=0.0)
        rms = np.sqrt((p.astype(float) ** 2).mean(1))
        assert (rms <= largest_update(t, beta1, beta2) * (1 + 2e-5)).all()


def test_eps_stands_outside_the_root_after_the_correction(ref: ModuleType) -> None:
    """With g = eps the first step is half of lr."""
    p, _ = ref.rules.adam_mini.update(
        np.zeros((1, 3), f32), np.full((1, 3), 1e-8, f32), ref.rules.adam_mini.init(np.zeros((1, 3))), t=1, lr=1.0
    )
    np.testing.assert_allclose(p, -0.5, rtol=1e-5)


def test_a_dead_row_stays(ref: ModuleType) -> None:
    p, g = np.ones((2, 3), f32), f32([[0, 0, 0], [1, 2, 3]])
    (moved,), state = follow(ref.Optimizer("adam_mini"), [p], [[g], [g]])
    same_bits(moved[0], p[0], "dead row")
    assert state[0]["v"][0] == 0 < state[0]["v"][1]


@pytest.mark.parametrize(("kind", "count"), list(zip(BLOCKS, (6, 3, 1, 60), strict=True)))
def test_bytes_are_four_a_weight_and_four_a_block(ref: ModuleType, kind: dict[str, Any], count: int) -> None:
    state = ref.rules.adam_mini.init(np.zeros((6, 10), f32), **kind)
    assert sum(x.nbytes for x in state.values()) == 4 * 60 + 4 * count


def first_v(ref: ModuleType, g: Any, **kind: Any) -> Any:
    return ref.rules.adam_mini.update(g, g, ref.rules.adam_mini.init(g, **kind), t=1, beta2=0.0, **kind)[1]["v"]


@pytest.mark.parametrize("kind", [{"blocks": "heads"}, {"blocks": "whole"}])
def test_sums_go_row_by_row_where_rows_are_long(ref: ModuleType, kind: dict[str, Any]) -> None:
    """1 + 2^-24 is a tie of float32; seven 2^-54, summed among themselves, break it, but added one by one are lost."""
    g = np.zeros((8, 256), f32)
    g[0, :2], g[1:, 0] = (1, 2.0**-12), 2.0**-27
    assert first_v(ref, g, **kind).item() == (1 + 2.0**-23) / 2048


@pytest.mark.parametrize("kind", [{"blocks": "rows"}, {"blocks": "whole"}])
def test_a_square_beyond_float32_counts_while_the_mean_is_within(ref: ModuleType, kind: dict[str, Any]) -> None:
    v = first_v(ref, f32([[2e19, 0, 0, 0]]), **kind)
    np.testing.assert_allclose(v.reshape(-1), 1e38, rtol=1e-6)


REFUSED = [
    ({"blocks": "columns"}, (4, 3), "ValueError", "blocks must be one of 'rows', 'heads', 'whole', 'elementwise'"),
    ({"heads": 2}, (4, 3), "ValueError", "heads must be 1 with blocks='rows', got 2"),
    ({"blocks": "heads", "heads": 0}, (4, 3), "ValueError", "heads must be .*>= 1, got 0"),
    ({"blocks": "heads", "heads": 1.5}, (4, 3), "ValueError", "heads must be a whole number, got 1.5"),
    ({"blocks": "heads", "heads": 3}, (4, 3), "ValueError", r"params\[0\] has shape \(4, 3\); 3 heads do not divide"),
    ({"blocks": "heads"}, (4,), "ShapeError", r"params\[0\] has shape \(4,\); blocks='heads' needs two axes"),
    ({}, (4,), "ShapeError", r"params\[0\] has shape \(4,\); blocks='rows' needs two axes or more"),
]


@pytest.mark.parametrize(("hyper", "shape", "error", "words"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    ref: ModuleType, hyper: dict[str, Any], shape: tuple[int, ...], error: str, words: str
) -> None:
    with pytest.raises(ref.ShapeError if error == "ShapeError" else ValueError, match=words):
        ref.Optimizer("adam_mini", **hyper).init(np.zeros(shape, f32))
