"""double: the base's codes, scales within a per cent, exact where they are equal, and one NaN for all."""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, unsigned_zero
from tests.golden import exact
from tests.strategies import arrays, f32

bases = pytest.mark.parametrize("base", ["nf4", "fp4"])
WEIGHTS = arrays([(31,), (129,), (3, 40), (700,)], low=-3, high=0)


@bases
@given(x=WEIGHTS)
def test_codes_are_the_base_s_and_scales_its_own_coded_once_more(ref: ModuleType, base: str, x: Any) -> None:
    """Written out: mean, difference, dynamic8 in blocks of 256, and back."""
    box, first = ref.codecs.double.encode(x, base=base, block=32), ref.codecs.CODECS[base].encode(x, block=32)
    same_bits(box.codes, first.codes, "codes")
    offset = f32(math.fsum(first.scales.tolist()) / first.scales.size)
    second = ref.codecs.dynamic8.encode(first.scales - offset, block=256)
    assert box.offset == offset and box.offset.shape == ()
    same_bits(box.scales, second.codes, "scales")
    same_bits(box.scales2, second.scales, "scales2")
    codec = ref.codecs.CODECS[base](block=32)
    whole = ref.Box(codec, x.shape, {"codes": first.codes, "scales": second.decode() + offset})
    same_bits(box.decode(), whole.decode(), "decoded")


@given(x=arrays([(6,)], low=-3, high=0, kinds=["plain"]))
def test_few_scales_are_their_definition_in_fractions(ref: ModuleType, x: Any) -> None:
    """Six blocks of one weight and 31 zeros: their scales are the weights' magnitudes."""
    w = np.zeros((6, 32), f32)
    w[:, 0] = x
    box = ref.codecs.double.encode(w, block=32)
    a = [Fraction(float(abs(v))) for v in x]
    offset = exact.Single(sum(a) / 6)
    codes, scale, decoded = exact.dynamic8([exact.Single(v) - offset for v in a], True)
    assert (box.offset, box.scales2[0]) == (float(offset.x), float(scale.x))
    assert box.scales.tolist() == codes
    want = [math.copysign(1, v) * float((d + offset).x) for v, d in zip(x.tolist(), decoded, strict=True)]
    assert box.decode()[:, 0].tolist() == want


@bases
@given(x=arrays([()], low=-20, high=20, kinds=["plain"]), n=st.integers(1, 3000))
def test_equal_scales_are_exact(ref: ModuleType, base: str, x: Any, n: int) -> None:
    """Their mean is one of them, and nothing is left to code."""
    w = np.random.default_rng(n).uniform(-0.9, 0.9, n).astype(f32) * np.abs(x)
    w[::64] = x
    double, single = ref.codecs.double.encode(w, base=base), ref.codecs.CODECS[base].encode(w)
    assert (double.scales == 127).all() and not double.scales2.any() and double.offset == np.abs(x)
    same_bits(double.decode(), single.decode(), "decoded")


@given(seed=st.integers(0, 2**32 - 1))
def test_a_scale_is_off_by_half_a_cell_of_the_largest_difference(ref: ModuleType, seed: int) -> None:
    """0.0071 of what the group's scales differ from their mean: of normal weights about one per cent of a scale."""
    w = np.random.default_rng(seed).standard_normal((64, 1024)).astype(f32)
    box = ref.codecs.double.encode(w)
    one, other = box.decode(), ref.codecs.nf4.encode(w).decode()
    largest = np.repeat(box.scales2, 256 * 64).reshape(w.shape)
    assert (np.abs(one - other) <= 0.0071 * largest).all() and (one != other).any()
    assert np.median(np.abs(one - other) / np.abs(w).max()) < 0.005


@bases
@given(x=arrays([(129,), (3, 40)], low=-3, high=0, kinds=["zeros", "all zero"]))
def test_zeros_stay_zeros(ref: ModuleType, base: str, x: Any) -> None:
    x = x.copy()
    x.reshape(-1)[:32] = 0
    out = ref.codecs.double.encode(x, base=base, block=32).decode()
    assert (unsigned_zero(out)[x == 0] == 0).all()


def test_a_very_small_block_may_lose_its_signs(ref: ModuleType) -> None:
    """Its scale less the mean is near -mean, and coded with an error larger than itself."""
    w = np.ones((256, 64), f32) * np.linspace(0.5, 1.5, 256, dtype=f32)[:, None]
    w[0] = 1e-6
    w[1] = 2.2
    out = ref.codecs.double.encode(w).decode()
    assert (out[0] < 0).all() or (out[0] > 1e-4).all()


def test_one_nan_is_in_the_mean_of_all(ref: ModuleType) -> None:
    x = np.ones(1000, f32)
    x[70] = np.nan
    assert np.isnan(ref.codecs.double.encode(x).decode()).all()
    with pytest.raises(ref.NonFiniteError, match=r"block 1 \(elements 64 to 127\) holds NaN or Inf"):
        ref.codecs.double.encode(x, nonfinite="raise")


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (64,), (65,), (64 * 256,), (64 * 256 + 1,), (3, 700), (0, 16)], ids=str
)
def test_the_bytes_are_those_of_both_levels(ref: ModuleType, shape: tuple[int, ...]) -> None:
    n = math.prod(shape)
    count = -(-n // 64)
    want = -(-n // 2) + count + 4 * -(-count // 256) + 4
    box = ref.codecs.double.encode(np.ones(shape, f32))
    assert ref.codecs.double.nbytes(shape) == want == box.nbytes
    same_bits(box.decode(), np.ones(shape, f32), "decoded")


def test_a_large_tensor_takes_four_bits_and_an_eighth(ref: ModuleType) -> None:
    n = 4096 * 11008
    assert (ref.codecs.double.nbytes((4096, 11008)) - 4) * 8 / n == 4.126953125


def test_blocks_are_those_of_the_base(ref: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"codecs.double: block must be one of 32, 64.*got 100"):
        ref.codecs.double(block=100)
    with pytest.raises(ValueError, match=r"codecs.double: base must be 'nf4' or 'fp4', got 'int4'"):
        ref.codecs.double(base="int4")


def test_the_mean_is_the_canonical_sum_of_more_scales_than_a_chunk(ref: ModuleType) -> None:
    w = np.random.default_rng(0).standard_normal((70000, 32)).astype(f32)
    box = ref.codecs.double.encode(w, block=32)
    assert box.offset == ref.reduce.mean(np.abs(w).max(1))
