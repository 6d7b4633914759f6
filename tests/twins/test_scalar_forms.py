"""The scalar forms one by one, exhaustively where the inputs are finite."""

from __future__ import annotations

import hashlib
import math

import ml_dtypes
import numpy as np
import pytest

from refopt import codecs as oracle_codecs
from refopt.codecs.dynamic8 import midpoints, table
from refopt.scalars import ipow as oracle_ipow
from refopt_cuda.codecs import CODECS, bf16, dynamic8
from refopt_cuda.rules import RULES
from refopt_cuda.scalars import ipow
from tests.twins.common import assert_same_bits

numba = pytest.importorskip("numba")
from refopt_cuda.kernels import half  # noqa: E402
from refopt_cuda.kernels.arith import host  # noqa: E402

TABLES = {
    False: "035c4114538df2a03bbcb4d8a39b9325d26d84a00cf6cf29018d1a6608ab14c4",
    True: "02a9b523750e21348029626da435f2adadb851b687d86349cd20752f9255de26",
}


def over(function, *arrays, dtype):
    """`function` applied to every element, in a compiled loop."""
    out = np.empty(arrays[0].size, dtype)

    @numba.njit
    def loop(a, out):
        for i in range(out.size):
            out[i] = function(a[i])

    loop(arrays[0], out)
    return out


def encoder(stem, signed):
    """The codes of numbers in a block whose factor is 1."""
    encode, one = CODECS[stem].make(host(), signed).encode, np.float32(1)
    return numba.njit(lambda y: encode(y, one))


@pytest.mark.parametrize("unsigned", [False, True])
def test_dynamic8_values_are_the_published_ones(unsigned):
    assert hashlib.sha256(dynamic8.codebook(unsigned).tobytes()).hexdigest() == TABLES[unsigned]
    assert_same_bits(dynamic8.codebook(unsigned), table(not unsigned), "table")


def hard_numbers(unsigned: bool) -> np.ndarray:
    """[0, 1] and a step above: every top half of a word with five low halves, every midpoint +-2 ulp."""
    tops = np.arange(0x3F80, dtype=np.uint32) << 16
    spread = (tops[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF], np.uint32)).reshape(-1)
    middle = midpoints(not unsigned).view(np.uint32)[:, None] + np.arange(-2, 3)
    edges = np.array([0x3F800000, 0x3F800001, 0x3F800002, 1, 0x007FFFFF], np.uint32)
    return np.concatenate([spread, middle.reshape(-1).astype(np.uint32), edges]).view(np.float32)


@pytest.mark.parametrize("unsigned", [False, True])
def test_dynamic8_encodes_to_the_nearest_code_everywhere(unsigned):
    y = hard_numbers(unsigned)
    code = encoder("dynamic8", not unsigned)
    count = np.searchsorted(midpoints(not unsigned), y, side="left")
    if unsigned:
        assert_same_bits(over(code, y, dtype=np.uint8), count.astype(np.uint8), "unsigned")
        assert not over(code, -y, dtype=np.uint8).any(), "negative values are clamped to 0"
    else:
        assert_same_bits(over(code, y, dtype=np.uint8), (127 + count).astype(np.uint8), "positive")
        assert_same_bits(over(code, -y, dtype=np.uint8), np.maximum(127 - count, 0).astype(np.uint8), "negative")


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("stem", ["dynamic8", "int8_linear"])
def test_scales_of_dead_smallest_largest_and_non_finite_blocks(stem, unsigned):
    edge = int(np.float32(2.0**-100).view(np.uint32))
    bits = np.array([0, 1, edge - 1, edge, edge + 1, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], np.uint32)
    scale = CODECS[stem].make(host(), not unsigned).scale
    record = oracle_codecs.CODECS[stem](block=1, signed=not unsigned)
    stored = over(numba.njit(lambda b: scale(b)[0]), bits, dtype=np.float32)
    assert_same_bits(stored, record.encode(bits.view(np.float32)).scales, "stored")
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / bits[3:7].view(np.float32)
    assert_same_bits(over(numba.njit(lambda b: scale(b)[1]), bits[3:7], dtype=np.float32), inverse, "inverse")
    coded = over(numba.njit(lambda b: scale(b)[2]), bits, dtype=np.bool_)
    assert coded.tolist() == [False] * 3 + [True] * 4 + [False] * 2


@pytest.mark.parametrize(("unsigned", "levels"), [(False, 127), (True, 255)])
def test_int8_linear_rounds_half_to_even(unsigned, levels):
    y = np.concatenate([np.linspace(-1, 1, 100001, dtype=np.float32), (np.arange(levels) + np.float32(0.5)) / levels])
    y = np.concatenate([y, np.nextafter(y, np.float32(2))]).astype(np.float32)
    y = np.abs(y) if unsigned else y
    code = encoder("int8_linear", not unsigned)
    dtype = np.uint8 if unsigned else np.int8
    assert_same_bits(over(code, y, dtype=dtype), np.rint(y * np.float32(levels)).astype(dtype), "codes")


@pytest.mark.parametrize(("form", "dtype"), [(half, np.float16), (bf16, ml_dtypes.bfloat16)])
def test_every_half_word_is_widened_exactly(form, dtype):
    every = np.arange(1 << 16, dtype=np.uint16)
    assert_same_bits(
        over(form.make(host()).load, every, dtype=np.float32), every.view(dtype).astype(np.float32), "load"
    )


@pytest.mark.parametrize(("form", "dtype"), [(half, np.float16), (bf16, ml_dtypes.bfloat16)])
def test_narrowing_is_right_around_every_half_word_and_every_tie(form, dtype):
    every = np.arange(0x7FFF, dtype=np.uint16)
    with np.errstate(all="ignore"):
        here, above = (w.view(dtype).astype(np.float64) for w in (every, every + np.uint16(1)))
        points = np.concatenate(
            [here, (here + above) / 2, [65519.996, 65520, 65536, 1e30, 3.4028235e38, np.inf, np.nan]]
        )
        x = points.astype(np.float32)
        bits = (x.view(np.uint32)[:, None].astype(np.int64) + np.arange(-2, 3)).clip(0, 0x7FFFFFFF).astype(np.uint32)
        x = bits.reshape(-1).view(np.float32)
        x = np.concatenate([x, -x])
        want = x.astype(dtype)
    assert_same_bits(over(form.make(host()).store, x, dtype=np.uint16).view(dtype), want, "store")


def test_powers_have_the_oracles_bits():
    steps = [*range(1, 3000), 9999, 65535, 65536, 123457, 999_999, 1_000_000]
    for beta in (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999):
        assert all(ipow(beta, t).hex() == oracle_ipow(beta, t).hex() for t in steps)


def test_powers_have_the_oracles_bits_at_each_of_a_million_steps():
    """0.999 to the t is 0 from 745,000 on; 0.9 from 7,100 on."""
    for beta, last in ((0.999, 1_000_000), (0.9, 10_000)):
        assert not any(ipow(beta, t) != oracle_ipow(beta, t) for t in range(1, last + 1))


@pytest.mark.parametrize("stem", ["adam", "adamw"])
def test_bias_corrections_round_once_from_float64(stem):
    for t in [*range(1, 2000), 10_007, 1_000_000]:
        s = dict(zip(RULES[stem].SCALARS, RULES[stem].scalars(t, lr=1e-3, beta1=0.9, beta2=0.999, wd=0.1), strict=True))
        assert s["step"] == np.float32(1e-3 / (1.0 - 0.9**t))
        assert s["ir2"] == np.float32(1.0 / math.sqrt(1.0 - 0.999**t))
    assert s["omb2"] == np.float32(1.0 - 0.999) != np.float32(1) - np.float32(0.999)


def test_ascent_is_a_negative_gradient_scale():
    for module in RULES.values():
        assert module.scalars(1, lr=0.1, gscale=0.25, maximize=True)[0] == -0.25
