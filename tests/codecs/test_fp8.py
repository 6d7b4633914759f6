"""fp8: every word and every boundary as in ml_dtypes, saturation, signs, and what one scale for all loses."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, unsigned_zero
from tests.strategies import arrays, f32

PEER: dict[str, Any] = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
FINITE = {"e4m3": 0x7F, "e5m2": 0x7C}
"""How many words without a sign are finite."""

WORDS = np.arange(256, dtype=np.uint8)
formats = pytest.mark.parametrize("form", ["e4m3", "e5m2"])
scales = pytest.mark.parametrize("scale", ["block", "tensor"])


def decoded(ref: ModuleType, codes: Any, form: str) -> Any:
    codec = ref.codecs.fp8(format=form)
    return ref.Box(codec, codes.shape, {"codes": codes, "scales": np.ones(-(-codes.size // 256), f32)}).decode()


def encoded(ref: ModuleType, y: Any, form: str) -> Any:
    """Words of y largest: the block's extreme is 1."""
    y = np.append(np.asarray(y, f32), f32(1))
    return ref.codecs.fp8.encode(y, format=form, block=y.size).codes[:-1]


@formats
def test_every_word_decodes_as_in_ml_dtypes(ref: ModuleType, form: str) -> None:
    same_bits(decoded(ref, WORDS, form), WORDS.view(PEER[form]).astype(f32), "decoded")


@formats
def test_the_finite_numbers_are_as_many_as_the_format_has(ref: ModuleType, form: str) -> None:
    x = decoded(ref, WORDS, form)
    finite = x[np.isfinite(x)]
    assert len(set(finite.tolist())) == 2 * FINITE[form] - 1 == {"e4m3": 253, "e5m2": 247}[form]
    assert (finite.max(), finite[finite > 0].min()) == (LARGEST[form], 2.0 ** {"e4m3": -9, "e5m2": -16}[form])


@formats
def test_every_finite_word_comes_back(ref: ModuleType, form: str) -> None:
    x = decoded(ref, WORDS, form)
    for size in f32([1.0, 0.3, 7e-20, 3e30]):
        box = ref.codecs.fp8.encode((x * size)[np.isfinite(x)], format=form)
        assert (box.codes == WORDS[np.isfinite(x)]).all()
        again = ref.codecs.fp8.encode(box.decode(), format=form)
        same_bits(again.codes, box.codes, "codes")
        same_bits(again.decode(), box.decode(), "decoded")


@formats
def test_boundaries_between_words_are_those_of_ml_dtypes(ref: ModuleType, form: str) -> None:
    """Every midpoint, the nearest y on both sides, and the words themselves; ties to even."""
    c = decoded(ref, WORDS[: FINITE[form]], form)
    mid = (c[:-1] + c[1:]) / f32(2)
    y = np.concatenate([mid, c]) / f32(LARGEST[form])
    y = np.concatenate([y, np.nextafter(y, f32(1)), np.nextafter(y, f32(-1))])
    for v in (y, -y):
        want = (v * f32(LARGEST[form])).astype(PEER[form]).view(np.uint8)
        assert (encoded(ref, v, form) == want).all()
    y = y[: mid.size]
    tie = y * f32(LARGEST[form]) == mid
    assert tie.mean() > 0.8 and (encoded(ref, y[tie], form) & 1 == 0).all()


@formats
@given(x=arrays([(129,)], low=-7, high=0, kinds=["plain", "zeros"]))
def test_what_lies_between_takes_the_word_of_ml_dtypes(ref: ModuleType, form: str, x: Any) -> None:
    x = np.append(np.clip(x, -1, 1), f32(1))
    box = ref.codecs.fp8.encode(x, format=form)
    assert (box.codes == (x * f32(LARGEST[form])).astype(PEER[form]).view(np.uint8)).all()


@formats
@scales
@given(x=arrays([(31,), (129,), (3, 40)]))
def test_the_error_is_half_a_step_of_the_mantissa(ref: ModuleType, form: str, scale: str, x: Any) -> None:
    """2^-4 (2^-3 with two bits) of each element, or half the smallest step of its block."""
    codec = ref.codecs.fp8(format=form, scale=scale, block=32)
    box = codec.encode(x)
    bounds = codec.bounds(x.shape) if scale == "block" else np.array([0, x.size])
    s = np.repeat(box.scales.reshape(-1), np.diff(bounds)).reshape(x.shape).astype(float)
    error = np.abs(box.decode().astype(float) - x)
    relative, least = {"e4m3": (2.0**-4, 2.0**-10), "e5m2": (2.0**-3, 2.0**-17)}[form]
    assert (error <= np.maximum(relative * np.abs(x), least * s) * (1 + 2.0**-20)).all()


@formats
@scales
@given(x=arrays([(31,), (129,), (3, 40)]))
def test_flipping_signs_flips_the_top_bits(ref: ModuleType, form: str, scale: str, x: Any) -> None:
    """Bit for bit, zeros with their signs; but a dead block has none."""
    codec = ref.codecs.fp8(format=form, scale=scale, block=32)
    one, other = codec.encode(x), codec.encode(-x)
    same_bits(unsigned_zero(-other.decode()), unsigned_zero(one.decode()), "decoded")
    same_bits(other.scales, one.scales, "scales")
    alive = np.repeat(
        one.scales.reshape(-1) > 0, np.diff(codec.bounds(x.shape)) if scale == "block" else x.size
    ).reshape(x.shape)
    same_bits(other.codes, one.codes ^ np.where(alive, 0x80, 0).astype(np.uint8), "codes")


@formats
def test_both_extremes_take_the_largest_word(ref: ModuleType, form: str) -> None:
    """Over 4,096 mantissas of an extreme: never one below, never NaN."""
    size = np.arange(2**23, 2**24, 2**11).astype(f32)
    codes = ref.codecs.fp8.encode(np.stack([size, -size], 1).reshape(-1), format=form, block=2).codes
    last = FINITE[form] - 1
    assert (codes.reshape(-1, 2) == [last, last | 0x80]).all()


@formats
@pytest.mark.parametrize("size", [1.5 * 2.0**126, 1.99 * 2.0**127])
def test_an_extreme_that_rounds_above_one_saturates(ref: ModuleType, form: str, size: float) -> None:
    """1 / absmax is subnormal here and y may exceed 1; the next word would be NaN or infinite."""
    x = np.linspace(size, np.nextafter(f32(size), f32(0)), 50).astype(f32)
    box = ref.codecs.fp8.encode(np.append(x, f32(-size)), format=form, block=1)
    assert set((box.codes & 0x7F).tolist()) == {FINITE[form] - 1} and not np.isnan(box.decode()).any()


@formats
def test_the_scale_is_divided_once(ref: ModuleType, form: str) -> None:
    size = np.arange(2**23, 2**24, 2**13).astype(f32)
    same_bits(ref.codecs.fp8.encode(size, format=form, block=1).scales, size / f32(LARGEST[form]), "scales")


@given(x=arrays([(129,), (3, 40), (300,)]))
def test_one_scale_for_all_is_one_block_of_all(ref: ModuleType, x: Any) -> None:
    whole = ref.codecs.fp8.encode(x, scale="tensor")
    flat = ref.codecs.fp8.encode(x.reshape(-1), block=x.size)
    assert whole.scales.shape == () and whole.codec.scope == "tensor"
    same_bits(whole.codes.reshape(-1), flat.codes, "codes")
    same_bits(whole.scales, flat.scales[0], "scale")


def test_one_scale_for_all_loses_the_small_rows_of_a_second_moment(ref: ModuleType) -> None:
    """Seven decades between rows: a block keeps each, one scale makes the small ones zero."""
    v = (10.0 ** -np.arange(8)[:, None] * np.ones(64)).astype(f32)
    assert (ref.codecs.fp8.encode(v).decode() > 0).all()
    assert (ref.codecs.fp8.encode(v, scale="tensor").decode() == 0).any(1).sum() == 2


@pytest.mark.parametrize("place", ["resident", "paged"])
def test_a_tensor_with_one_scale_is_stepped_as_one_page(ref: ModuleType, place: str) -> None:
    rng = np.random.default_rng(3)
    p, *grads = rng.standard_normal((4, 3, 600)).astype(f32)
    codec = ref.codecs.fp8(scale="tensor")
    opt = ref.Optimizer("adamw", {"m": codec, "v": codec}, place)
    state, plain = opt.init([p]), ref.Optimizer("adamw")
    old = {"t": 0, "m": np.zeros_like(p), "v": np.zeros_like(p)}
    q = [p]
    for g in grads:
        want, (new,) = plain.step(q, [g], [old])
        q, state = opt.step(q, [g], state)
        same_bits(q[0], want[0], "p")
        for s in ("m", "v"):
            same_bits(state[0][s].codes, codec.encode(new[s]).codes, s)
        old = {"t": new["t"]} | {s: state[0][s].decode() for s in ("m", "v")}


@given(seed=st.integers(0, 2**32 - 1))
def test_a_nonnegative_state_needs_no_other_table(ref: ModuleType, seed: int) -> None:
    opt = ref.Optimizer("adam", "fp8")
    assert opt.codecs["v"] == opt.codecs["m"] == ref.codecs.fp8
    x = np.abs(np.random.default_rng(seed).standard_normal(64)).astype(f32)
    assert (ref.codecs.fp8.encode(x).codes < 0x80).all()


@pytest.mark.parametrize(("option", "value"), [("format", "e3m4"), ("scale", "row")])
def test_other_formats_and_scales_are_refused_by_name(ref: ModuleType, option: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"codecs.fp8: {option} must be '\w+' or '\w+', got '{value}'"):
        ref.codecs.fp8(**{option: value})
