"""bf16_sr: every one of the 65,536 chances, the exact mean, words that never move, and published words."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.strategies import arrays, f32

CHANCES = np.arange(65536, dtype=np.uint16)
WORDS = np.arange(65536, dtype=np.uint32)


def rounded(ref: ModuleType, x: Any, random: Any) -> Any:
    return ref.codecs.bf16_sr.encode(np.asarray(x, f32), random=random)


def neighbours(x: float) -> tuple[float, float]:
    """The bfloat16 numbers next to x toward and away from zero, found by ml_dtypes."""
    near = np.asarray(x, ml_dtypes.bfloat16)
    if float(near) == x:
        return x, x
    inward = abs(float(near)) > abs(x)
    other = np.nextafter(near, ml_dtypes.bfloat16(0 if inward else np.copysign(np.inf, x)))
    return (float(other), float(near)) if inward else (float(near), float(other))


@given(x=arrays([()], low=-44, high=37, kinds=["plain"]))
def test_the_mean_over_all_chances_is_the_number_itself(ref: ModuleType, x: Any) -> None:
    """Exactly: the sum of 65,536 bfloat16 neighbours is 65,536 x, in whole units of the smaller one."""
    out = rounded(ref, np.full(65536, x), CHANCES).decode().astype(float)
    low, high = neighbours(float(x))
    assert set(out.tolist()) <= {low, high}
    assert out[0] == low
    assert (out == high).sum() * (high - low) == 65536 * (float(x) - low) or low == high


@given(x=arrays([(129,)], low=-44, high=37), seed=st.integers(0, 2**32 - 1))
def test_flipping_signs_flips_results(ref: ModuleType, x: Any, seed: int) -> None:
    random = np.random.default_rng(seed).integers(0, 65536, x.shape, np.uint16)
    same_bits(rounded(ref, -x, random).decode(), -rounded(ref, x, random).decode(), "decoded")


@pytest.mark.parametrize("chance", [0, 1, 0x7FFF, 0x8000, 0xFFFF], ids=hex)
def test_what_bfloat16_holds_never_moves(ref: ModuleType, chance: int) -> None:
    """All 65,536 words, infinities among them; NaN becomes the quiet NaN of its sign."""
    x = (WORDS << 16).view(f32)
    codes = rounded(ref, x, np.full(65536, chance, np.uint16)).codes
    number = ~np.isnan(x)
    assert (codes[number] == WORDS[number]).all()
    assert (codes[~number] == np.where(np.signbit(x[~number]), 0xFFC0, 0x7FC0)).all()


@pytest.mark.parametrize("low", [1, 0x7FFF, 0x8000, 0xFFFF], ids=hex)
def test_no_nan_becomes_a_number_and_no_number_a_nan(ref: ModuleType, low: int) -> None:
    x = ((WORDS << 16) | np.uint32(low)).view(f32)
    for chance in (0, 0xFFFF):
        out = rounded(ref, x, np.full(65536, chance, np.uint16)).decode()
        assert (np.isnan(out) == np.isnan(x)).all()


def test_the_largest_floats_may_become_infinite(ref: ModuleType) -> None:
    x = np.full(2, np.finfo(f32).max)
    assert rounded(ref, x, np.array([0, 1], np.uint16)).decode().tolist() == [float.fromhex("0x1.fep127"), np.inf]


def test_the_published_words_come_from_the_published_bits(ref: ModuleType) -> None:
    random = ref.rng.r16(ref.rng.key(seed=42, step=7, tensor=3), 0, 4)
    assert random.tolist() == [8785, 58430, 11770, 27368]
    box = rounded(ref, [1, 1.00390625, -1.003, 3.14159265], random)
    assert [f"{c:04x}" for c in box.codes.tolist()] == ["3f80", "3f81", "bf80", "4049"]


def test_a_weight_drifts_where_rounding_to_nearest_leaves_it(ref: ModuleType) -> None:
    """1,000 steps of 1e-4 away from 1: nearest stays at 1, chance arrives near 0.9 on average."""
    p, g = np.ones(256, f32), np.ones(256, f32)
    ends = {}
    for stem in ("bf16", "bf16_sr"):
        opt = ref.Optimizer("sgd", {"p": stem}, lr=1e-4)
        q, state = p, opt.init(p)
        for _ in range(1000):
            q, state = opt.step(q, g, state)
        ends[stem] = q
    assert (ends["bf16"] == 1).all()
    assert abs(ends["bf16_sr"].mean() - 0.9) < 2e-3 and ends["bf16_sr"].std() > 0


def test_each_tensor_step_and_seed_draws_bits_of_its_own(ref: ModuleType) -> None:
    p, g = np.full(64, 1.001, f32), np.zeros(64, f32)

    def ends(seed: int) -> list[Any]:
        opt = ref.Optimizer("sgd", {"p": "bf16_sr"}, seed=seed)
        first, state = opt.step([p, p], [g, g], opt.init([p, p]))
        second, _ = opt.step([p, p], [g, g], state)
        return [*first, *second]

    drawn = [e.tobytes() for seed in (0, 1) for e in ends(seed)]
    assert len(set(drawn)) == len(drawn) and ends(0)[0].tobytes() == drawn[0]


@pytest.mark.parametrize("random", [None, np.zeros(3, np.uint16), np.zeros(2, np.int64)], ids=["none", "size", "dtype"])
def test_without_bits_of_the_right_kind_nothing_is_rounded(ref: ModuleType, random: Any) -> None:
    with pytest.raises(TypeError, match=r"codecs.bf16_sr.encode: random must be uint16 bits, one an element, got"):
        rounded(ref, [1.0, 2.0], random)
