"""fp8_expand: its equations in 50 digits, errors divided by the power, zeros, and blocks of equal magnitudes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, unsigned_zero
from tests.strategies import arrays, f32

STATE = arrays([(129,), (3, 40)], low=-12, high=6)
E4M3: Any = ml_dtypes.float8_e4m3fn


def bits(codes: Any) -> Any:
    return np.asarray(codes, np.uint8).view(E4M3).astype(float)


@given(x=arrays([(1,), (6,)], low=-12, high=6, kinds=["plain", "zeros"]))
def test_the_code_is_the_definition_in_fifty_digits(ref: ModuleType, x: Any) -> None:
    """c, k, s to a last place; codes within half a step of the exact number; decoded within a last place or few."""
    box = ref.codecs.fp8_expand.encode(x)
    mpmath.mp.dps = 50
    sizes = [mpmath.mpf(float(abs(v))) for v in x if v]
    if not sizes:
        assert not box.codes.any() and not box.decode().any()
        return
    ratio = max(sizes) / min(sizes)
    k = mpmath.mpf(1)
    if ratio > mpmath.mpf(2) ** mpmath.mpf("0.0625"):
        k = mpmath.floor(16 * mpmath.log(mpmath.mpf(448) ** 2 / 2, 2) / mpmath.log(ratio, 2)) / 16
        k = min(max(k, mpmath.mpf(1) / 16), mpmath.mpf(16))
    assert box.power[0] == float(k)
    c = mpmath.sqrt(max(sizes)) * mpmath.sqrt(min(sizes))
    assert abs(box.centre[0] / float(c) - 1) < 2.0**-23
    s = (max(sizes) / mpmath.mpf(float(box.centre[0]))) ** k / 448
    assert abs(box.scales[0] / float(s) - 1) < 2.0**-23
    for v, q, out in zip(x.tolist(), bits(box.codes).tolist(), box.decode().tolist(), strict=True):
        z = (abs(mpmath.mpf(v)) / mpmath.mpf(float(box.centre[0]))) ** k / mpmath.mpf(float(box.scales[0])) if v else 0
        assert abs(abs(q) - float(z)) <= max(float(z) * 2.0**-4, 2.0**-10) * (1 + 1e-5)
        want = (abs(mpmath.mpf(q)) * mpmath.mpf(float(box.scales[0]))) ** (1 / k) * mpmath.mpf(float(box.centre[0]))
        want = float(want) if q else 0.0
        assert abs(out - np.copysign(want, v)) <= 2.0**-23 * want


@given(x=STATE)
def test_the_error_of_e4m3_is_divided_by_the_power(ref: ModuleType, x: Any) -> None:
    """2^-4 / k of each element, to first order; below k = 1 that is more than fp8's own."""
    codec = ref.codecs.fp8_expand(block=32)
    box, out = codec.encode(x), codec.encode(x).decode().astype(float)
    k = np.repeat(box.power.reshape(-1), np.diff(codec.bounds(x.shape))).reshape(x.shape)
    q = np.abs(bits(box.codes))
    normal = (q >= 2.0**-6) & (np.abs(x) >= 2.0**-100)
    worst = (1 - 2.0**-4) ** -(1 / k.astype(float)) - 1
    assert (np.abs(out - x)[normal] <= (worst * 1.07 + 1e-6)[normal] * np.abs(x)[normal]).all()


@pytest.mark.parametrize("binades", [0.5, 1, 2, 4, 8])
def test_a_narrow_block_is_stored_better_than_by_fp8(ref: ModuleType, binades: float) -> None:
    x = np.exp2(np.random.default_rng(0).uniform(-binades, 0, 4096)).astype(f32)
    plain, wide = (np.sqrt(np.mean((c.encode(x, block=128).decode() / x - 1) ** 2)) for c in self_and_fp8(ref))
    assert wide < plain / 1.5


def self_and_fp8(ref: ModuleType) -> Any:
    return ref.codecs.fp8, ref.codecs.fp8_expand


@given(x=arrays([(129,), (3, 40)], low=-20, high=10, kinds=["plain", "zeros", "outlier"]))
def test_nothing_but_zero_becomes_zero(ref: ModuleType, x: Any) -> None:
    """The least takes 2/448 of the largest word or more; fp8 itself loses what spans more than 18 binades."""
    out = ref.codecs.fp8_expand.encode(x).decode()
    assert ((out == 0) == (x == 0)).all()


@given(size=st.floats(-28, 30), n=st.integers(1, 40), zeros=st.booleans())
def test_equal_magnitudes_come_back(ref: ModuleType, size: float, n: int, zeros: bool) -> None:
    """max / min = 1 would make the power infinite; and a zero beside them stays zero."""
    x = np.full(n, 10.0**size, f32)
    x[::3] *= -1
    x = np.append(x, f32([0.0] * zeros))
    box = ref.codecs.fp8_expand.encode(x)
    assert box.power[0] == 1
    np.testing.assert_allclose(box.decode(), x, rtol=2e-7)


def test_the_power_is_bounded_on_both_sides(ref: ModuleType) -> None:
    at = [1.0, 2 ** (1 / 16), 1.05, 1.5, 3.0, 448.0, 448.0**2 / 2, 1e30]
    k = [float(ref.codecs.fp8_expand.encode(f32([1.0, 1 / r])).power[0]) for r in at]
    assert k[0] == 1 and k[2] == k[3] == 16 and all(a >= b for a, b in zip(k[2:-1], k[3:], strict=True))
    assert k[6] in (0.9375, 1.0) and k[7] == np.floor(16 * np.log2(448**2 / 2) / np.log2(1e30)) / 16
    widest = ref.codecs.fp8_expand.encode(f32([3e38, 1e-45]))
    assert widest.power[0] == 1 / 16 and np.isfinite(widest.decode()).all()


def test_one_tiny_element_squeezes_its_block(ref: ModuleType) -> None:
    x = np.random.default_rng(0).uniform(0.5, 1, 128).astype(f32)
    alone = np.abs(ref.codecs.fp8_expand.encode(x).decode() / x - 1).max()
    x[5] = 1e-30
    beside = np.abs(ref.codecs.fp8_expand.encode(x).decode() / x - 1).max()
    assert alone < 0.01 and beside > 0.1


@given(x=STATE)
def test_flipping_signs_flips_the_top_bits(ref: ModuleType, x: Any) -> None:
    one, other = ref.codecs.fp8_expand.encode(x), ref.codecs.fp8_expand.encode(-x)
    same_bits(unsigned_zero(-other.decode()), unsigned_zero(one.decode()), "decoded")
    for name in ("scales", "power", "centre"):
        same_bits(other.arrays[name], one.arrays[name], name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_zero_of_a_bad_block_is_nan(ref: ModuleType, bad: float) -> None:
    """Though its code is 0, and 0 decodes to 0 everywhere else."""
    box = ref.codecs.fp8_expand.encode(f32([1.0, 0.0, bad]))
    assert np.isnan(box.decode()).all() and not box.codes.any()


def test_the_bytes_are_one_an_element_and_twelve_a_block(ref: ModuleType) -> None:
    assert ref.codecs.fp8_expand.nbytes((1024, 1024)) * 8 == 2**20 * 8.75
    assert ref.codecs.fp8_expand.encode(np.ones((3, 130), f32)).nbytes == 390 + 6 * 12
