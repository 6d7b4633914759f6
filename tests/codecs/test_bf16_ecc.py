"""bf16_ecc: its definition in fractions, half a step of error, and sixteen bits that are nearly all of float32."""

from __future__ import annotations

from fractions import Fraction
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, unsigned_zero
from tests.golden.exact import nearest
from tests.strategies import arrays, f32, follow, runs

LOW = np.arange(65536, dtype=np.uint32)
HIGH = [0x0000, 0x007F, 0x0080, 0x00FF, 0x3F7F, 0x3F80, 0x4049, 0x7F7E]
LEVELS = {8: 127, 16: 32767}
both = pytest.mark.parametrize("bits", [8, 16])


def half_unit(p: Any) -> Any:
    """Half the gap above |p| in bfloat16: from frexp, in float64."""
    p = np.abs(np.asarray(p, float))
    return 2.0 ** (np.where(p < 2.0**-126, -126, np.frexp(p)[1] - 1) - 8)


def words(high: int) -> Any:
    return (np.uint32(high) << 16 | LOW).view(f32)


@both
@pytest.mark.parametrize("high", HIGH, ids=hex)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_error_is_half_a_step(ref: ModuleType, bits: int, high: int, sign: int) -> None:
    """All lower halves of a word, ends of binades and subnormals among them; and what float32 rounds at the end."""
    x = words(high) * f32(sign)
    box = ref.codecs.bf16_ecc.encode(x, bits=bits)
    p = x.astype(ml_dtypes.bfloat16)
    same_bits(box.codes, p.view(np.uint16), "codes")
    error, h = np.abs(box.decode().astype(float) - x), half_unit(p)
    assert (error <= h / (2 * LEVELS[bits]) * (1 + 2.0**-20) + np.spacing(np.abs(x))).all()
    if bits == 8:
        assert (error <= h / 254).all()


@both
@pytest.mark.parametrize("high", HIGH, ids=hex)
def test_every_lower_half_is_the_definition_in_fractions(ref: ModuleType, bits: int, high: int) -> None:
    x = words(high)[:: 257 if bits == 16 else 97]
    box = ref.codecs.bf16_ecc.encode(x, bits=bits)
    n, one = LEVELS[bits], nearest(Fraction(1, LEVELS[bits]))
    for v, q, got in zip(x.tolist(), box.error.tolist(), box.decode().tolist(), strict=True):
        p = nearest(Fraction(v), 8)
        h = Fraction(float(half_unit(float(p))))
        want = round(nearest((Fraction(v) - p) / h * n))
        assert q == want, v
        assert got == nearest(p + nearest(nearest(q * one) * h)), v


def test_the_ends_of_a_unit_take_the_end_codes(ref: ModuleType) -> None:
    """Ties, where the error is a whole half unit: one up, one down."""
    box = ref.codecs.bf16_ecc.encode(np.array([0x3F808000, 0x3F818000, 0xBF818000], np.uint32).view(f32))
    assert box.error.tolist() == [127, -127, 127]


@given(seed=st.integers(0, 2**32 - 1))
def test_sixteen_bits_lose_a_unit_of_float32_at_most(ref: ModuleType, seed: int) -> None:
    """And that rarely: of words drawn evenly, fewer than one in a hundred."""
    x = np.random.default_rng(seed).integers(0, 0x7F7F0000, 20000, np.uint32).view(f32)
    box = ref.codecs.bf16_ecc.encode(x, bits=16)
    off = np.abs(box.decode().view(np.int32) - x.view(np.int32))
    assert off.max() == 1 and (off != 0).mean() < 0.01 and box.error.dtype == np.int16


@both
@pytest.mark.parametrize("x", [np.finfo(f32).max, np.inf, -np.inf, np.nan])
def test_beyond_bfloat16_nothing_is_kept(ref: ModuleType, bits: int, x: float) -> None:
    with np.errstate(all="raise"):
        box = ref.codecs.bf16_ecc.encode(f32([x]), bits=bits)
    assert box.error[0] == 0 and not np.isfinite(box.decode()[0])


@both
@given(x=arrays([(129,)], low=-44, high=37))
def test_flipping_signs_flips_results(ref: ModuleType, bits: int, x: Any) -> None:
    codec = ref.codecs.bf16_ecc(bits=bits)
    one, other = codec.encode(x), codec.encode(-x)
    same_bits(other.error, -one.error, "error")
    same_bits(unsigned_zero(-other.decode()), unsigned_zero(one.decode()), "decoded")


@both
@given(run=runs(shapes=[(31,)], low=-3, high=2))
def test_the_rule_steps_the_weights_that_both_arrays_make(ref: ModuleType, bits: int, run: Any) -> None:
    p, grads = run
    opt, plain = ref.Optimizer("adamw", {"p": ref.codecs.bf16_ecc(bits=bits)}), ref.Optimizer("adamw")
    q, state = follow(opt, [p], [[grads[0]]])
    box = state[0]["p"]
    whole = ref.Box(box.codec, p.shape, {"codes": ref.codecs.bf16.encode(q[0]).codes, **box.arrays}).decode()
    (want,), _ = plain.step([whole], [grads[1]], [{n: s for n, s in state[0].items() if n != "p"}])
    (got,), state = opt.step(q, [grads[1]], state)
    coded = box.codec.encode(want)
    same_bits(got, ref.codecs.bf16.encode(want).decode(), "p")
    same_bits(state[0]["p"].error, coded.error, "error")


def test_eight_bits_follow_a_thousand_small_steps(ref: ModuleType) -> None:
    p, g = np.ones(1, f32), np.ones(1, f32)
    q, _ = follow(ref.Optimizer("sgd", {"p": "bf16_ecc"}, lr=1e-4), p, [g] * 1000)
    assert abs(q[0] - 0.9) < 0.01


def test_the_bits_are_eight_or_sixteen(ref: ModuleType) -> None:
    assert [ref.codecs.bf16_ecc(bits=b).nbytes((10,)) for b in (8, 16)] == [30, 40]
    with pytest.raises(ValueError, match=r"codecs.bf16_ecc: bits must be 8 or 16, got 12"):
        ref.codecs.bf16_ecc(bits=12)


def test_a_state_of_other_bits_is_refused(ref: ModuleType) -> None:
    opt, p = ref.Optimizer("sgd", {"p": "bf16_ecc"}), np.ones(3, f32)
    _, state = follow(ref.Optimizer("sgd", {"p": ref.codecs.bf16_ecc(bits=16)}), p, [p])
    with pytest.raises(ref.StateError, match="bf16_ecc"):
        opt.step(p, p, state)
