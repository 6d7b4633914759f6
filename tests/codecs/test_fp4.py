"""FP4: bit patterns out of the order of values, thresholds as published, signs that mirror, and minus zero."""

from __future__ import annotations

from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.bits import same_bits, unsigned_zero
from tests.codecs.test_every_codec import codes
from tests.golden.exact import nearest
from tests.strategies import arrays, f32

MAGNITUDES = {
    0b000: Fraction(0),
    0b001: Fraction(1, 192),
    0b010: Fraction(2, 3),
    0b011: Fraction(1),
    0b100: Fraction(1, 3),
    0b101: Fraction(1, 2),
    0b110: Fraction(1, 6),
    0b111: Fraction(1, 4),
}
THRESHOLDS = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
"""As bitsandbytes writes them."""
RANKS = [0, 1, 6, 7, 4, 5, 2, 3]


def table(ref: ModuleType) -> Any:
    """The sixteen values, as decoding gives them."""
    packed = np.array([2 * k << 4 | (2 * k + 1) for k in range(8)], np.uint8)
    return ref.Box(ref.codecs.fp4, (16,), {"codes": packed, "scales": np.ones(1, f32)}).decode()


def encoded(ref: ModuleType, y: Any) -> Any:
    """Codes of y, each in a block whose extreme is 1."""
    y = np.asarray(y, f32)
    x = np.zeros((y.size, 32), f32)
    x[:, 0], x[:, 1] = y, 1
    return codes(ref.codecs.fp4.encode(x, block=32)).reshape(-1, 32)[:, 0].astype(int)


def test_the_values_are_the_fractions_of_their_bits(ref: ModuleType) -> None:
    c = table(ref)
    assert c[:8].tolist() == [float(nearest(MAGNITUDES[k])) for k in range(8)]
    same_bits(c[8:], -c[:8], "negative half")


def test_every_code_comes_back(ref: ModuleType) -> None:
    c = table(ref)
    for size in f32([1.0, 0.3, 7e-20, 3e30]):
        want = [*range(8), 0, *range(9, 16)]  # -0 is written only for a negative number
        assert codes(ref.codecs.fp4.encode(c * size)).tolist() == want


@given(x=arrays([(129,)], low=-4, high=0, kinds=["plain", "zeros"]))
def test_the_code_is_the_nearest_value(ref: ModuleType, x: Any) -> None:
    x, c = np.clip(x, -1, 1), table(ref).astype(float)
    near = np.abs(c - x[:, None].astype(float))
    assert (near[np.arange(x.size), encoded(ref, x)] <= near.min(1) + 2.0**-24).all()


def test_ties_go_to_the_smaller_magnitude_at_the_published_thresholds(ref: ModuleType) -> None:
    up = np.sort(table(ref)[:8])
    mid = (up[:-1] + up[1:]) * f32(0.5)
    np.testing.assert_allclose(mid, THRESHOLDS, rtol=2e-6)
    assert encoded(ref, mid).tolist() == RANKS[:-1] and encoded(ref, np.nextafter(mid, f32(2))).tolist() == RANKS[1:]
    assert encoded(ref, -mid).tolist() == [r + 8 for r in RANKS[:-1]]


def test_a_negative_number_that_rounds_to_zero_is_minus_zero(ref: ModuleType) -> None:
    box = ref.codecs.fp4.encode(f32([1, -0.001, 0.001, 0.0, -0.0]))
    assert codes(box).tolist() == [3, 8, 0, 0, 0]
    assert np.signbit(box.decode()).tolist() == [False, True, False, False, False]
    assert not codes(ref.codecs.fp4.encode(f32([-1e-33, -0.0]))).any()


@given(x=arrays([(31,), (129,), (3, 40)], kinds=["plain", "outlier"]))
def test_flipping_signs_flips_the_top_bit(ref: ModuleType, x: Any) -> None:
    codec = ref.codecs.fp4
    one, other = codec.encode(x), codec.encode(-x)
    alive = np.repeat(one.scales > 0, np.diff(codec.bounds(x.shape)))
    assert (codes(other) == codes(one) ^ np.where(alive, 8, 0)).all()
    same_bits(other.scales, one.scales, "scales")


@given(x=arrays([(31,), (129,), (3, 40)]))
def test_the_error_is_half_the_widest_gap(ref: ModuleType, x: Any) -> None:
    codec = ref.codecs.fp4
    box = codec.encode(x)
    a = np.repeat(box.scales, np.diff(codec.bounds(x.shape))).reshape(x.shape).astype(float)
    assert (np.abs(box.decode().astype(float) - x) <= a / 6 * (1 + 2.0**-20) + 1e-30).all()


def test_what_was_decoded_encodes_to_the_same_values(ref: ModuleType) -> None:
    """But for minus zero, which is written for a negative number alone."""
    x = np.random.default_rng(0).standard_normal(4096).astype(f32)
    once = ref.codecs.fp4.encode(x)
    twice = ref.codecs.fp4.encode(once.decode())
    same_bits(unsigned_zero(twice.decode()), unsigned_zero(once.decode()), "decoded")


def test_bytes_hold_the_earlier_code_in_the_high_half(ref: ModuleType) -> None:
    box = ref.codecs.fp4.encode(f32([1, -0.5, 0.25]))
    assert [f"{b:02x}" for b in box.codes] == ["3d", "70"]
    assert ref.codecs.fp4.nbytes((1024, 1024)) * 8 == 2**20 * 4.5


def test_blocks_of_other_sizes_are_refused(ref: ModuleType) -> None:
    for block in (16, 48, 8192):
        with pytest.raises(ValueError, match=r"codecs.fp4: block must be one of 32, 64"):
            ref.codecs.fp4(block=block)
