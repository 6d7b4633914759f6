"""int8_linear: half a level of error, the same codes again on re-encoding, mirrored for mirrored signs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.bits import same_bits, unsigned_zero
from tests.strategies import arrays, f32

both = pytest.mark.parametrize("signed", [True, False])
STATE = arrays([(31,), (129,), (3, 40)])


@both
@given(x=STATE)
def test_the_error_is_half_a_level(ref: ModuleType, signed: bool, x: Any) -> None:
    x = x if signed else np.abs(x)
    codec = ref.codecs.int8_linear(block=32, signed=signed)
    box = codec.encode(x)
    half = np.repeat(box.scales.reshape(-1), np.diff(codec.bounds(x.shape))).reshape(x.shape) / 2
    error = np.abs(box.decode().astype(float) - x)
    assert (error <= half * (1 + 2.0**-15)).all()


@both
@given(x=STATE)
def test_what_was_decoded_encodes_to_the_same_bits(ref: ModuleType, signed: bool, x: Any) -> None:
    codec = ref.codecs.int8_linear(block=32, signed=signed)
    once = codec.encode(x if signed else np.abs(x))
    twice = codec.encode(once.decode())
    same_bits(twice.codes, once.codes, "codes")
    same_bits(twice.decode(), once.decode(), "decoded")


@given(x=STATE)
def test_flipping_signs_flips_codes(ref: ModuleType, x: Any) -> None:
    one, other = (ref.codecs.int8_linear.encode(v, block=32) for v in (x, -x))
    same_bits(other.codes, -one.codes, "codes")
    same_bits(other.scales, one.scales, "scales")
    same_bits(unsigned_zero(-other.decode()), unsigned_zero(one.decode()), "decoded")


@pytest.mark.parametrize(("signed", "levels"), [(True, 127), (False, 255)])
def test_every_code_comes_back(ref: ModuleType, signed: bool, levels: int) -> None:
    codes = np.arange(-levels if signed else 0, levels + 1)
    for scale in f32([1.0, 0.3, 7e-20, 3e30]):
        x = codes.astype(f32) * scale
        assert (ref.codecs.int8_linear.encode(x, block=512, signed=signed).codes == codes).all()


@pytest.mark.parametrize(("signed", "levels"), [(True, 127), (False, 255)])
def test_ties_go_to_the_even_code(ref: ModuleType, signed: bool, levels: int) -> None:
    """x with x * levels exactly between two codes, in a block whose largest element is 1."""
    k = np.arange(levels)
    x = ((k + 0.5) / levels).astype(f32)
    tie = x * f32(levels) == k + f32(0.5)
    assert tie.sum() > levels // 2
    codes = ref.codecs.int8_linear.encode(np.append(x[tie], f32(1)), block=512, signed=signed).codes[:-1]
    assert (codes == k[tie] + k[tie] % 2).all()


def test_both_extremes_take_the_end_codes(ref: ModuleType) -> None:
    """Over every mantissa of an extreme (4,096 of them): never 126, never beyond 127."""
    size = np.arange(2**23, 2**24, 2**11).astype(f32)
    x = np.stack([size, -size], 1).reshape(-1)
    assert (ref.codecs.int8_linear.encode(x, block=2).codes.reshape(-1, 2) == [127, -127]).all()


def test_the_scale_is_divided_once(ref: ModuleType) -> None:
    """absmax / 127, not absmax * fl(1/127), which differs in the last bit for many."""
    size = np.arange(2**23, 2**24, 2**13).astype(f32)
    assert (size / f32(127) != size * (f32(1) / f32(127))).any()
    same_bits(ref.codecs.int8_linear.encode(size, block=1).scales, size / f32(127), "scales")


def test_a_negative_element_of_an_unsigned_block_is_clamped(ref: ModuleType) -> None:
    assert ref.codecs.int8_linear.encode(f32([2.0, -1.0]), signed=False).codes.tolist() == [255, 0]


def test_the_last_float_before_infinity_decodes_to_infinity(ref: ModuleType) -> None:
    """127 times a scale that was rounded up; the only block whose extreme is lost."""
    with np.errstate(over="ignore"):
        assert ref.codecs.int8_linear.encode(f32([np.finfo(f32).max])).decode()[0] == np.inf


def test_a_block_is_multiplied_by_one_reciprocal(ref: ModuleType) -> None:
    """y = x * fl32(1 / absmax): near ties a division of each element gives other codes."""
    rng = np.random.default_rng(0)
    a = rng.uniform(1, 2, 20000).astype(f32)
    x = (a * ((rng.integers(0, 127, a.size) + 0.5) / 127)).astype(f32)
    product, quotient = (np.rint(y * f32(127)) for y in (x * (f32(1) / a), x / a))
    differ = product != quotient
    assert differ.sum() > 100
    codes = ref.codecs.int8_linear.encode(np.stack([a, x], 1)[differ].reshape(-1), block=2).codes
    assert (codes[1::2] == product[differ]).all()
