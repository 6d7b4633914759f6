"""q4: the published levels, ties, half bytes, a second moment that is never zero, and scales of rows and columns."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations, product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.codecs.test_every_codec import codes
from tests.golden.exact import nearest
from tests.strategies import arrays, f32, follow

POSITIVE = [Fraction(n, d) for n, d in [(11, 2000), (13, 400), (31, 400), (17, 80), (7, 16), (53, 80), (71, 80)]]
LEVELS = {
    True: [*(-c for c in reversed(POSITIVE)), Fraction(0), *POSITIVE, Fraction(1)],
    False: [Fraction(k, 16) for k in range(1, 17)],
}
both = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
MATRICES = arrays([(5, 3), (3, 40), (2, 3, 17)])


def table(ref: ModuleType, signed: bool) -> Any:
    """The sixteen values, as decoding gives them."""
    codec = ref.codecs.q4(signed=signed)
    packed = np.array([2 * k << 4 | (2 * k + 1) for k in range(8)], np.uint8)
    return ref.Box(codec, (16,), {"codes": packed, "scales": np.ones(1, f32)}).decode()


def encoded(ref: ModuleType, y: Any, signed: bool) -> Any:
    """Codes of y in one block whose extreme is 1."""
    y = np.append(np.asarray(y, f32), f32(1))
    return codes(ref.codecs.q4.encode(y, signed=signed, block=y.size))[:-1].astype(int)


@both
def test_the_levels_are_the_published_fractions_rounded_once(ref: ModuleType, signed: bool) -> None:
    assert table(ref, signed).tolist() == [float(nearest(c)) for c in LEVELS[signed]]


@both
def test_every_code_comes_back_beside_a_positive_extreme(ref: ModuleType, signed: bool) -> None:
    for size in f32([1.0, 0.3, 7e-20, 3e30]):
        box = ref.codecs.q4.encode(table(ref, signed) * size, signed=signed)
        assert codes(box).tolist() == list(range(16))
        again = ref.codecs.q4.encode(box.decode(), signed=signed)
        same_bits(again.codes, box.codes, "codes")
        same_bits(again.decode(), box.decode(), "decoded")


@both
@given(x=arrays([(129,)], low=-4, high=0, kinds=["plain", "zeros"]))
def test_the_code_is_the_nearest_level(ref: ModuleType, signed: bool, x: Any) -> None:
    """Against all sixteen distances; at the rounding of a midpoint either neighbour is near enough."""
    x = np.clip(x if signed else np.abs(x), -1, 1)
    c = table(ref, signed).astype(float)
    near = np.abs(c - x[:, None].astype(float))
    taken = near[np.arange(x.size), encoded(ref, x, signed)]
    assert (taken <= near.min(1) + 2.0**-24 * np.abs(x)).all()


def test_ties_of_a_momentum_go_toward_zero(ref: ModuleType) -> None:
    c = table(ref, True)[7:]
    mid, k = (c[:-1] + c[1:]) * f32(0.5), np.arange(8)
    assert (encoded(ref, mid, True) == 7 + k).all() and (encoded(ref, -mid, True) == 7 - k).all()
    up = np.nextafter(mid, f32(2))
    assert (encoded(ref, up, True) == 8 + k).all() and (encoded(ref, -up, True) == np.maximum(6 - k, 0)).all()


def test_ties_of_a_second_moment_go_to_the_even_sixteenth(ref: ModuleType) -> None:
    y = f32([0, 0.5, 1.5, 2.5, 3.5, 14.5, 15.5]) / f32(16)
    assert (encoded(ref, y, False) + 1).tolist() == [1, 1, 2, 2, 4, 14, 16]


@given(x=arrays([(31,), (129,), (3, 40)], signed=False), rank1=st.booleans())
def test_a_second_moment_never_becomes_zero(ref: ModuleType, x: Any, rank1: bool) -> None:
    """But where the whole block is: at least a sixteenth of the scale, within a thirty-second above it."""
    codec = ref.codecs.q4(signed=False, scale="rank1" if rank1 else "block", block=32)
    box = codec.encode(x)
    s = scales_of(box).astype(float)
    out = box.decode().astype(float)
    assert (out[s == 0] == 0).all() and (out >= s / 16 * (1 - 2.0**-23)).all()
    assert (np.abs(out - x) <= s / 32 * (1 + 2.0**-20))[x >= s / 16].all()
    assert (out <= s * (1 + 2.0**-23)).all()


def scales_of(box: Any) -> Any:
    """The scale of each element: of its block, or the smallest of its slices' maxima, one element at a time."""
    if box.codec.scope == "block" or len(box.shape) < 2:
        return np.repeat(box.scales.reshape(-1), np.diff(box.codec.bounds(box.shape))).reshape(box.shape)
    starts = np.cumsum([0, *box.shape])
    s = np.zeros(box.shape, f32)
    for index in product(*map(range, box.shape)):
        s[index] = min(box.scales[starts[a] + i] for a, i in enumerate(index))
    return s


@both
@given(x=MATRICES)
def test_scales_of_slices_are_their_largest_magnitudes(ref: ModuleType, signed: bool, x: Any) -> None:
    """And an element's, their minimum, is at least itself: what SM3 keeps."""
    box = ref.codecs.q4.encode(x if signed else np.abs(x), signed=signed, scale="rank1")
    a = np.abs(x)
    want = [np.max(np.take(a, i, axis)) for axis, n in enumerate(x.shape) for i in range(n)]
    want = [0 if w < 2.0**-100 else w for w in want]
    assert box.scales.tolist() == want
    assert (scales_of(box) >= np.where(a < 2.0**-100, 0, a)).all()


@given(x=MATRICES)
def test_swapping_axes_swaps_codes(ref: ModuleType, x: Any) -> None:
    codec = ref.codecs.q4(signed=False, scale="rank1")
    out = codec.encode(np.abs(x)).decode()
    for order in permutations(range(x.ndim)):
        same_bits(codec.encode(np.abs(x).transpose(order)).decode(), out.transpose(order), f"axes {order}")


@both
@given(x=arrays([(), (31,), (300,)]))
def test_a_vector_has_no_slices_and_takes_blocks(ref: ModuleType, signed: bool, x: Any) -> None:
    x = x if signed else np.abs(x)
    one, other = (ref.codecs.q4.encode(x, signed=signed, scale=scale) for scale in ("rank1", "block"))
    same_bits(one.codes, other.codes, "codes")
    same_bits(one.scales, other.scales, "scales")
    same_bits(one.decode(), other.decode(), "decoded")


def test_a_large_column_spoils_every_block_and_no_slice_but_its_own(ref: ModuleType) -> None:
    v = np.random.default_rng(0).uniform(0.5, 1, (64, 128)).astype(f32)
    v[:, 5] *= 1e4
    off = {
        scale: np.abs(ref.codecs.q4.encode(v, signed=False, scale=scale).decode() / v - 1)
        for scale in ("block", "rank1")
    }
    assert np.median(off["block"]) > 100 and off["rank1"].max() < 0.07


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_element_spoils_its_slices_alone(ref: ModuleType, bad: float) -> None:
    x = np.ones((3, 20), f32)
    x[1, 4] = bad
    box = ref.codecs.q4.encode(x, scale="rank1")
    spoilt = np.zeros((3, 20), bool)
    spoilt[1], spoilt[:, 4] = True, True
    assert (np.isnan(box.decode()) == spoilt).all() and (box.decode()[~spoilt] == 1).all()
    assert (codes(box).reshape(3, 20)[spoilt] == 7).all()
    with pytest.raises(ref.NonFiniteError, match="slice 1 of the axes holds NaN or Inf"):
        ref.codecs.q4.encode(x, scale="rank1", nonfinite="raise")


@both
def test_a_zero_row_stays_zero(ref: ModuleType, signed: bool) -> None:
    x = np.ones((3, 20), f32)
    x[1], x[2, 0] = 1e-33, 0
    with np.errstate(all="raise"):
        box = ref.codecs.q4.encode(x, signed=signed, scale="rank1")
    out = box.decode()
    assert (codes(box)[20:41] == (7 if signed else 0)).all()
    assert (out[1] == 0).all() and (out[0] == 1).all() and out[2, 0] == (0 if signed else 1 / 16)


def test_a_negative_extreme_shrinks(ref: ModuleType) -> None:
    """There is no -1: it becomes -0.8875 of itself each time."""
    x = f32([-1.0, 0.25])
    for k in range(1, 4):
        x = ref.codecs.q4.encode(x).decode()
        assert x[0] == pytest.approx(-((71 / 80) ** k), rel=1e-6)


def test_two_codes_share_a_byte_and_every_block_begins_one(ref: ModuleType) -> None:
    """The earlier element is in the high half, in lpmm's order in the low one; what is left over is a zero."""
    x = table(ref, True)[[15, 1, 2, 15, 4]]
    assert [f"{b:02x}" for b in ref.codecs.q4.encode(x, block=3).codes] == ["f1", "27", "f4"]
    assert [f"{b:02x}" for b in ref.codecs.q4.encode(x, block=3, first="low").codes] == ["1f", "72", "4f"]
    v = table(ref, False)[[15, 1, 2]]
    assert [f"{b:02x}" for b in ref.codecs.q4.encode(v, signed=False).codes] == ["f1", "20"]
    assert [f"{b:02x}" for b in ref.codecs.q4.encode(v, signed=False, first="low").codes] == ["1f", "02"]


@pytest.mark.parametrize(
    ("options", "shape", "size"),
    [
        ({}, (1024, 1024), 2**19 + 4 * 2**13),
        ({}, (3, 129), 3 * (65 + 8)),
        ({"scale": "rank1"}, (1024, 1024), 2**19 + 4 * 2048),
        ({"scale": "rank1"}, (300,), 150 + 4 * 3),
        ({"scale": "rank1"}, (2, 3, 17), 54 + 4 * 22),
        ({"scale": "rank1"}, (3, 0), 12),
    ],
    ids=str,
)
def test_the_bytes_are_half_an_element_and_the_scales(ref: ModuleType, options: Any, shape: Any, size: int) -> None:
    codec = ref.codecs.q4(**options)
    assert codec.nbytes(shape) == size == codec.encode(np.ones(shape, f32)).nbytes


def test_a_negative_element_of_a_second_moment_is_clamped(ref: ModuleType) -> None:
    assert codes(ref.codecs.q4.encode(f32([2.0, -1.0]), signed=False)).tolist() == [15, 0]


@given(seed=st.integers(0, 2**32 - 1))
def test_a_run_with_scales_of_slices_is_decode_rule_encode(ref: ModuleType, seed: int) -> None:
    """Its tensors are stepped whole, paged or not."""
    p, *grads = np.random.default_rng(seed).standard_normal((4, 3, 40)).astype(f32)
    codecs = {"m": "q4", "v": ref.codecs.q4(scale="rank1")}
    opt, plain = ref.Optimizer("adamw", codecs, ref.places.paged(page_blocks=1)), ref.Optimizer("adamw")
    q, state, old = [p], opt.init([p]), {"t": 0, "m": np.zeros_like(p), "v": np.zeros_like(p)}
    for g in grads:
        want, (new,) = plain.step(q, [g], [old])
        q, state = opt.step(q, [g], state)
        same_bits(q[0], want[0], "p")
        for s in ("m", "v"):
            box = opt.codecs[s].encode(new[s])
            same_bits(state[0][s].codes, box.codes, f"{s} codes")
            same_bits(state[0][s].scales, box.scales, f"{s} scales")
        old = {"t": new["t"]} | {s: state[0][s].decode() for s in ("m", "v")}
    resident, _ = follow(ref.Optimizer("adamw", codecs), [p], [[g] for g in grads])
    same_bits(q[0], resident[0], "p")
