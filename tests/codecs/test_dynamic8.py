"""dynamic8: the published tables, the nearest value, ties toward zero, and the extreme that shrinks."""

from __future__ import annotations

import hashlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
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


def midpoints_of(c: Any) -> Any:
    return (c[:-1] + c[1:]) * f32(0.5)


@both
@pytest.mark.parametrize("ties", ["zero", "lower", "even", "upper"])
@pytest.mark.parametrize("compat", [None, "bitsandbytes"])
def test_each_rule_for_ties_takes_the_code_that_it_says(ref: ModuleType, signed: bool, ties: str, compat: Any) -> None:
    """All 255 midpoints; a float to either side the rules agree, each at the nearest value."""
    codec = ref.codecs.dynamic8(signed=signed, ties=ties, compat=compat, block=2**20)
    c = ref.Box(codec, (256,), {"codes": np.arange(256, dtype=np.uint8), "scales": np.ones(1, f32)}).decode()
    mid, k = midpoints_of(c), np.arange(255)
    want = {"zero": np.where(mid < 0, k + 1, k), "lower": k, "even": k + k % 2, "upper": k + 1}[ties]
    if compat and signed:  # between -5.5e-7 and 0 the sign bit decides
        want = np.where(k == 126, 126, want)

    def codes(y: Any) -> Any:
        return codec.encode(np.append(y, f32(1))).codes[:-1]

    assert (codes(mid) == want).all()
    beside = k != 126 if compat and signed else k >= 0
    assert (codes(np.nextafter(mid, f32(-2))) == k)[beside].all()
    assert (codes(np.nextafter(mid, f32(2))) == k + 1)[beside].all()


@both
@given(x=arrays([(129,), (3, 40)], low=-9, high=3))
def test_the_rule_named_zero_is_the_default(ref: ModuleType, signed: bool, x: Any) -> None:
    x = x if signed else np.abs(x)
    one, other = ref.codecs.dynamic8.encode(x, signed=signed), ref.codecs.dynamic8.encode(x, signed=signed, ties="zero")
    same_bits(one.codes, other.codes, "codes")
    general = ref.codecs.dynamic8.pack.__globals__["nearest"]
    y = x.reshape(-1) / np.maximum(np.abs(x).max(), f32(1e-20))
    whole = ref.codecs.dynamic8.encode(np.append(y, f32(1)), signed=signed, block=2**20).codes[:-1]
    assert (general(y, table(ref, signed), "zero") == whole).all()


THEIR_HASHES = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}


def their_table(ref: ModuleType, signed: bool) -> Any:
    codec = ref.codecs.dynamic8(signed=signed, compat="bitsandbytes")
    return ref.Box(codec, (256,), {"codes": np.arange(256, dtype=np.uint8), "scales": np.ones(1, f32)}).decode()


@both
def test_the_table_of_bitsandbytes_is_what_torch_computes(ref: ModuleType, signed: bool) -> None:
    got = their_table(ref, signed)
    assert hashlib.sha256(got.astype("<f4").tobytes()).hexdigest() == THEIR_HASHES[signed]
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        cells = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += cells + [-c for c in cells if signed]
    same_bits(got, torch.tensor(values).sort().values.numpy(), "table")


@both
def test_their_table_is_a_unit_or_two_from_the_fractions(ref: ModuleType, signed: bool) -> None:
    off = np.abs(their_table(ref, signed).view(np.int32) - table(ref, signed).view(np.int32))
    assert ((off > 0).sum(), off.max()) == ((72, 1) if signed else (100, 2))


def test_a_code_of_bitsandbytes_has_the_sign_bit_of_its_element(ref: ModuleType) -> None:
    x = f32([1.0, 1e-8, -1e-8, 0.0, -0.0, -1.0])
    box = ref.codecs.dynamic8.encode(x, compat="bitsandbytes")
    assert box.codes.tolist() == [255, 127, 126, 127, 126, 0]
    assert ref.codecs.dynamic8.encode(x).codes.tolist() == [255, 127, 127, 127, 127, 0]
    assert ref.codecs.dynamic8.encode(np.abs(x), signed=False, compat="bitsandbytes").codes[1:5].tolist() == [0] * 4


def test_a_dead_block_of_bitsandbytes_keeps_its_zero(ref: ModuleType) -> None:
    """Code 127 and scale 0; the sign of -0 goes."""
    box = ref.codecs.dynamic8.encode(f32([-0.0, -1e-40, 1e-40]), compat="bitsandbytes")
    assert box.codes.tolist() == [127] * 3 and box.scales.tolist() == [0]


def test_a_state_by_another_rule_is_refused_by_name(ref: ModuleType) -> None:
    p = np.ones(4, f32)
    opt = ref.Optimizer("lion", ref.codecs.dynamic8(compat="bitsandbytes", ties="even"))
    state = ref.Optimizer("lion", "dynamic8").init(p)
    with pytest.raises(ref.StateError, match=r"dynamic8\(block=256\).*dynamic8\(block=256, ties='even', compat='bits"):
        opt.step(p, p, state)
    assert state[0]["t"] == 0 and opt.init(p)[0]["m"].codec.mode["ties"] == "even"
