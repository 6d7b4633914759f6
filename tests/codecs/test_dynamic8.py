"""dynamic8: the published tables, the nearest value, ties toward zero, and the extreme that shrinks."""

from __future__ import annotations

import hashlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.bits import same_bits
from tests.golden import exact
from tests.strategies import arrays, f32

HASHES = {
    True: "035c4114538df2a03bbcb4d8a39b9325d26d84a00cf6cf29018d1a6608ab14c4",
    False: "02a9b523750e21348029626da435f2adadb851b687d86349cd20752f9255de26",
}
both = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def table(ref: ModuleType, signed: bool) -> Any:
    """The 256 values, as decoding gives them."""
    codec = ref.codecs.dynamic8(signed=signed)
    return ref.Box(codec, (256,), {"codes": np.arange(256, dtype=np.uint8), "scales": np.ones(1, f32)}).decode()


def encode(ref: ModuleType, x: Any, signed: bool) -> Any:
    """Codes of x in one block whose largest element is 1, which is left out."""
    return (
        ref.codecs.dynamic8.encode(np.append(f32(1), x).astype(f32), block=2**20, signed=signed).codes[1:].astype(int)
    )


@both
def test_the_table_is_the_published_one(ref: ModuleType, signed: bool) -> None:
    assert hashlib.sha256(table(ref, signed).astype("<f4").tobytes()).hexdigest() == HASHES[signed]


@both
def test_the_table_is_its_fractions_rounded_once(ref: ModuleType, signed: bool) -> None:
    assert table(ref, signed).tolist() == [float(exact.nearest(c)) for c in exact.cells(signed)]


def test_the_signed_table_has_a_zero_a_one_and_no_minus_one(ref: ModuleType) -> None:
    c = table(ref, True)
    assert len(set(c.tolist())) == 256 and (np.diff(c) > 0).all()
    assert (c[127], c[255], c[0]) == (0, 1, f32(-1271 / 1280))
    assert c[128:132].tolist() == f32([5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5]).tolist()
    assert (-c[:127][::-1] == c[128:255]).all()


def test_the_unsigned_table_runs_from_zero_to_one(ref: ModuleType) -> None:
    c = table(ref, False)
    assert len(set(c.tolist())) == 256 and (np.diff(c) > 0).all() and (c[0], c[255]) == (0, 1)
    assert c[1:5].tolist() == f32([3.25e-7, 7.75e-7, 2.125e-6, 4.375e-6]).tolist()


@both
def test_every_code_comes_back_beside_a_positive_extreme(ref: ModuleType, signed: bool) -> None:
    for size in (1.0, 0.3, 7e-20, 3e30):
        x = table(ref, signed) * f32(size)
        assert ref.codecs.dynamic8.encode(x, signed=signed).codes.tolist() == list(range(256))


@both
@given(x=arrays([(129,)], low=-9, high=0, kinds=["plain", "zeros"]))
def test_the_code_is_the_nearest_value(ref: ModuleType, signed: bool, x: Any) -> None:
    """Against all 256 distances; at the rounding of a midpoint (2^-24) either neighbour is near enough."""
    x = np.clip(x if signed else np.abs(x), -1, 1)
    c = table(ref, signed).astype(float)
    near = np.abs(c - x[:, None].astype(float))
    taken = near[np.arange(x.size), encode(ref, x, signed)]
    assert (taken <= near.min(1) + 2.0**-24 * np.abs(x)).all()


@both
def test_ties_go_toward_zero(ref: ModuleType, signed: bool) -> None:
    """Every midpoint of the table takes the code nearer to zero; the next float up takes the other."""
    c = table(ref, signed)
    up = c[127:] if signed else c
    mid, zero = (up[:-1] + up[1:]) * f32(0.5), 127 if signed else 0
    k = np.arange(mid.size)
    assert (encode(ref, mid, signed) == zero + k).all()
    assert (encode(ref, np.nextafter(mid, f32(2)), signed) == zero + k + 1).all()
    if signed:
        assert (encode(ref, -mid, True) == 127 - k).all()
        assert (encode(ref, -np.nextafter(mid, f32(2)), True) == np.maximum(126 - k, 0)).all()


@pytest.mark.parametrize(
    ("signed", "bounds"),
    [(True, [0.062, 0.11, 0.18, 0.28, 0.47, 0.71]), (False, [0.033, 0.062, 0.11, 0.18, 0.28, 0.47])],
    ids=["signed", "unsigned"],
)
def test_the_relative_error_grows_by_decade(ref: ModuleType, signed: bool, bounds: list[float]) -> None:
    for decade, bound in enumerate(bounds):
        y = np.geomspace(10.0 ** -(decade + 1), 10.0**-decade * 0.999, 4000).astype(f32)
        y = np.concatenate([y, -y]) if signed else y
        worst = (np.abs(table(ref, signed)[encode(ref, y, signed)] - y) / np.abs(y)).max()
        assert 0.9 * bound < worst <= bound + 0.006, f"decade {decade}: {worst}"


@pytest.mark.parametrize(("signed", "bound"), [(True, 0.00704), (False, 0.00353)], ids=["signed", "unsigned"])
def test_the_absolute_error_is_bounded(ref: ModuleType, signed: bool, bound: float) -> None:
    y = np.linspace(-1 if signed else 0, 1, 20001).astype(f32)
    assert np.abs(table(ref, signed)[encode(ref, y, signed)] - y).max() <= bound


@pytest.mark.parametrize(("signed", "least"), [(True, 2.75e-7), (False, 1.625e-7)], ids=["signed", "unsigned"])
def test_what_is_too_small_becomes_zero(ref: ModuleType, signed: bool, least: float) -> None:
    zero = 127 if signed else 0
    assert encode(ref, f32([least * 0.999, least * 1.001]), signed).tolist() == [zero, zero + 1]


def test_a_negative_extreme_shrinks_at_every_encoding(ref: ModuleType) -> None:
    """There is no -1 in the table: encoding what was decoded is not idempotent."""
    x = np.append(np.zeros(9, f32), f32(-1))
    for _ in range(30):
        x = ref.codecs.dynamic8.encode(x).decode()
    assert x[-1] == pytest.approx(-((1271 / 1280) ** 30), rel=1e-5)
    assert 0.80 < -x[-1] < 0.82


@given(x=arrays([(31,), (129,)]))
def test_beside_a_positive_extreme_encoding_is_idempotent(ref: ModuleType, x: Any) -> None:
    x = np.append(x, np.abs(x).max() * f32(2))
    once = ref.codecs.dynamic8.encode(x, block=512)
    twice = ref.codecs.dynamic8.encode(once.decode(), block=512)
    same_bits(twice.codes, once.codes, "codes")
    same_bits(twice.scales, once.scales, "scales")


def test_flipping_signs_does_not_flip_every_code(ref: ModuleType) -> None:
    """The claim that linear codecs make, and this one cannot: its ends differ."""
    x = f32([1.0, 0.5])
    one, other = (ref.codecs.dynamic8.encode(v).decode() for v in (x, -x))
    assert one[0] == 1 and other[0] == f32(-1271 / 1280) and one[1] == -other[1]


def test_a_negative_element_of_an_unsigned_block_is_clamped(ref: ModuleType) -> None:
    assert ref.codecs.dynamic8.encode(f32([2.0, -1.0]), signed=False).codes.tolist() == [255, 0]
