"""bf16_kahan: its four lines as ml_dtypes computes them, and sums that plain bfloat16 loses."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.strategies import arrays, f32, follow, runs

half = ml_dtypes.bfloat16


def as_half(words: Any) -> Any:
    return np.asarray(words, np.uint16).view(half)


@given(
    x=arrays([(129,)], low=-3, high=1), steps=st.lists(st.floats(-9, 0), min_size=3, max_size=3), seed=st.integers(0)
)
def test_each_line_is_that_of_ml_dtypes(ref: ModuleType, x: Any, steps: Any, seed: int) -> None:
    """Its arithmetic: bfloat16 operands, a float32 operation, one rounding."""
    codec, rng = ref.codecs.bf16_kahan, np.random.default_rng(seed)
    box = codec.encode(x)
    p, c = x.astype(half), (x - x.astype(half).astype(f32)).astype(half)
    same_bits(box.comp, c.view(np.uint16), "first comp")
    for size in steps:
        target = (p.astype(f32) + 10**size * rng.standard_normal(x.shape)).astype(f32)
        box = codec.encode(target, old=box)
        c = (c.astype(f32) + (target - p.astype(f32))).astype(half)
        o, p = p, p + c
        c = c + (o - p)
        same_bits(box.codes, p.view(np.uint16), "p")
        same_bits(box.comp, c.view(np.uint16), "comp")
        same_bits(box.decode(), p.astype(f32), "decoded")


@given(seed=st.integers(0, 2**32 - 1), size=st.floats(-6, -1), drift=st.booleans())
def test_a_long_sum_keeps_what_bfloat16_drops(ref: ModuleType, seed: int, size: float, drift: bool) -> None:
    """p + comp against the exact sum: each step rounds a compensation of at most a unit of p, and the update."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0.5, 2, 32).astype(f32)
    box = ref.codecs.bf16_kahan.encode(start)
    total = start.astype(float)
    for _ in range(300):
        u = (10**size * (rng.random(32) if drift else rng.standard_normal(32))).astype(f32)
        p = box.decode()
        box = ref.codecs.bf16_kahan.encode(p + u, old=box)
        total += (p + u).astype(float) - p
    kept = as_half(box.codes).astype(float) + as_half(box.comp).astype(float)
    largest = np.abs(total).max() + 300 * 10**size
    assert np.abs(kept - total).max() <= 300 * 2.0**-8 * (2.0**-7 * largest + 5 * 10**size)
    assert (np.abs(as_half(box.codes).astype(float) - total) <= 2.0**-7 * np.abs(total) + np.abs(kept - total)).all()


def test_a_thousand_small_steps_arrive(ref: ModuleType) -> None:
    opt, p = ref.Optimizer("sgd", {"p": "bf16_kahan"}, lr=1e-4), np.ones(1, f32)
    p, state = follow(opt, p, [np.ones(1, f32)] * 1000)
    comp = as_half(state[0]["p"].comp).astype(float)
    assert round(float(p[0] + comp[0]), 5) == 0.90056
    plain, _ = follow(ref.Optimizer("sgd", {"p": "bf16"}, lr=1e-4), np.ones(1, f32), [np.ones(1, f32)] * 1000)
    assert plain[0] == 1


def test_a_small_decay_is_compensated_too(ref: ModuleType) -> None:
    """lr wd = 1e-4 a step and no gradient: (1 - 1e-4)^1000 of p, within a unit in the last place."""
    opt = ref.Optimizer("lion", {"p": "bf16_kahan"}, lr=1e-3, wd=0.1)
    p = np.full(4, 1.5, f32)
    q, _ = follow(opt, p, [np.zeros(4, f32)] * 1000)
    assert np.abs(q / p - 0.99990**1000).max() < 2.0**-7


@given(run=runs(shapes=[(31,)], low=-3, high=3))
def test_the_rule_steps_the_weights_that_are_seen(ref: ModuleType, run: Any) -> None:
    """Not those with the compensation added: then the sum would be compensated twice."""
    p, grads = run
    opt, plain = ref.Optimizer("adamw", {"p": "bf16_kahan"}), ref.Optimizer("adamw")
    q, state = follow(opt, [p], [[grads[0]]])
    box = state[0]["p"]
    old = ref.Box(box.codec, p.shape, {"codes": ref.codecs.bf16.encode(q[0]).codes, **box.arrays})
    target, _ = plain.step(q, [grads[1]], [{n: s for n, s in state[0].items() if n != "p"}])
    want = box.codec.encode(target[0], old=old)
    (got,), state = opt.step(q, [grads[1]], state)
    same_bits(got, want.decode(), "p")
    same_bits(state[0]["p"].comp, want.comp, "comp")


def test_the_first_rounding_error_is_kept(ref: ModuleType) -> None:
    """Weights that are not yet bfloat16 lose no more than bfloat16 of their own error."""
    x = np.random.default_rng(0).standard_normal(1000).astype(f32)
    box = ref.codecs.bf16_kahan.encode(x)
    kept = as_half(box.codes).astype(float) + as_half(box.comp).astype(float)
    assert (np.abs(kept - x) <= 2.0**-17 * np.abs(x)).all() and (kept != x).any()
