"""NF4: published constants, normal quantiles by scipy, ties, packing, and the errors that QLoRA counts on."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from scipy.stats import norm

from tests.bits import same_bits
from tests.codecs.test_every_codec import codes
from tests.strategies import arrays, f32

HEX = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)


def table(ref: ModuleType) -> Any:
    """The sixteen values, as decoding gives them."""
    packed = np.array([2 * k << 4 | (2 * k + 1) for k in range(8)], np.uint8)
    return ref.Box(ref.codecs.nf4, (16,), {"codes": packed, "scales": np.ones(1, f32)}).decode()


def encoded(ref: ModuleType, y: Any) -> Any:
    """Codes of y, each in a block whose extreme is 1."""
    y = np.asarray(y, f32)
    x = np.zeros((y.size, 32), f32)
    x[:, 0], x[:, 1] = y, 1
    return codes(ref.codecs.nf4.encode(x, block=32)).reshape(-1, 32)[:, 0].astype(int)


def test_the_values_are_the_published_constants(ref: ModuleType) -> None:
    assert " ".join(f"{w:08x}" for w in table(ref).view(np.uint32).tolist()) == HEX
    assert table(ref)[[1, 8]].tolist() == [-0.6961928009986877, 0.07958029955625534]


def test_the_values_are_normal_quantiles_to_six_units(ref: ModuleType) -> None:
    """By scipy, in float64: nine even steps above one half, eight below; not bit for bit, so constants are shipped."""
    above, below = np.linspace(0.9677083, 0.5, 9)[:8], np.linspace(0.9677083, 0.5, 8)[:7]
    want = np.sort(np.concatenate([norm.ppf(above), [0], -norm.ppf(below)])) / norm.ppf(0.9677083)
    off = np.abs(want.astype(f32).view(np.int32) - table(ref).view(np.int32))
    assert np.abs(want - table(ref)).max() < 1.1e-7 and off.max() == 6
    derived = ref.codecs.nf4.pack.__globals__["quantiles"]()
    np.testing.assert_allclose(derived, want, rtol=1e-13)


@given(x=arrays([(129,)], low=-4, high=0, kinds=["plain", "zeros"]))
def test_the_code_is_the_nearest_value(ref: ModuleType, x: Any) -> None:
    x, c = np.clip(x, -1, 1), table(ref).astype(float)
    near = np.abs(c - x[:, None].astype(float))
    assert (near[np.arange(x.size), encoded(ref, x)] <= near.min(1) + 2.0**-24).all()


def test_ties_go_to_the_lower_index(ref: ModuleType) -> None:
    c = table(ref)
    mid, k = (c[:-1] + c[1:]) * f32(0.5), np.arange(15)
    assert (encoded(ref, mid) == k).all() and (encoded(ref, np.nextafter(mid, f32(2))) == k + 1).all()


def test_the_published_block_and_its_bytes(ref: ModuleType) -> None:
    box = ref.codecs.nf4.encode(f32([0.3, -1.7, 0.001, 0, 1.2, -0.0004]))
    assert codes(box).tolist() == [9, 0, 7, 7, 14, 7]
    assert [f"{b:02x}" for b in box.codes] == ["90", "77", "e7"]


def test_a_left_over_half_is_a_zero_and_every_block_begins_a_byte(ref: ModuleType) -> None:
    x = np.zeros((2, 33), f32)
    x[:, 32] = 1
    rows = ref.codecs.nf4.encode(x, block=32, layout="rows")
    assert rows.codes.shape == (2, 17) and rows.codes[:, 16].tolist() == [0xF7, 0xF7]
    flat = ref.codecs.nf4.encode(x, block=32)
    assert flat.codes.shape == (33,) and flat.scales.shape == (3,)


def test_codes_come_back_also_from_bfloat16(ref: ModuleType) -> None:
    """Of weights that were decoded for a product in bfloat16: all scales' mantissas, all codes."""
    scales = np.arange(2**23, 2**24, 2**13).astype(f32)
    x = scales[:, None] * table(ref)
    x = np.concatenate([x, x], 1)
    box = ref.codecs.nf4.encode(x, block=32)
    same_bits(ref.codecs.nf4.encode(box.decode(), block=32).codes, box.codes, "codes")
    rounded = box.decode().astype(ml_dtypes.bfloat16).astype(f32)
    same_bits(ref.codecs.nf4.encode(rounded, block=32).codes, box.codes, "codes from bfloat16")


@given(x=arrays([(31,), (129,), (3, 40)]))
def test_the_error_is_half_the_widest_gap(ref: ModuleType, x: Any) -> None:
    """0.1519 absmax, below -0.696; extremes of either sign and zeros are exact."""
    codec = ref.codecs.nf4
    box, out = codec.encode(x), codec.encode(x).decode()
    a = np.repeat(box.scales, np.diff(codec.bounds(x.shape))).reshape(x.shape).astype(float)
    assert (np.abs(out.astype(float) - x) <= 0.15191 * a + 1e-30).all()
    assert (out[(np.abs(x) == a) | (x == 0)] == x[(np.abs(x) == a) | (x == 0)]).all()


def test_flipping_signs_does_not_mirror_codes(ref: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal(640).astype(f32)
    one, other = (codes(ref.codecs.nf4.encode(v)).astype(int) for v in (x, -x))
    assert (other != 14 - one).mean() > 0.3


def test_normal_weights_are_off_by_nine_per_cent(ref: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal(2**20).astype(f32)
    error = np.sqrt(np.mean((ref.codecs.nf4.encode(x).decode() - x) ** 2))
    assert 0.090 < error < 0.094


def test_each_value_is_used_about_as_often(ref: ModuleType) -> None:
    """What the quantiles are for; even steps would use the outer ones one time in several hundred."""
    x = np.random.default_rng(0).standard_normal(2**20).astype(f32)
    packed = ref.codecs.nf4.encode(x).codes
    share = np.bincount(np.concatenate([packed >> 4, packed & 15]), minlength=16) / x.size
    assert share.min() > 0.015 and share.max() < 0.1


def test_blocks_of_other_sizes_are_refused(ref: ModuleType) -> None:
    for block in (0, 48, 63, 8192):
        with pytest.raises(ValueError, match=r"codecs.nf4: block must be"):
            ref.codecs.nf4(block=block)
    assert ref.codecs.nf4(block=4096).nbytes((4096,)) == 2048 + 4
    assert ref.codecs.nf4.nbytes((1024, 1024)) * 8 == 2**20 * 4.5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_if_asked(ref: ModuleType, bad: float) -> None:
    x = np.ones(100, f32)
    x[70] = bad
    with pytest.raises(ref.NonFiniteError, match=r"block 1 \(elements 64 to 99\) holds NaN or Inf"):
        ref.codecs.nf4.encode(x, nonfinite="raise")
    with pytest.raises(TypeError, match=r"codecs.nf4.encode: x must be float32, got int64"):
        ref.codecs.nf4.encode(np.ones(3, np.int64))
