"""The scalar forms of block codecs, compiled for the host, against the oracle: the same codes, scales and values.

The points are those of tests/kernels/test_codec_functors.py: both sides of every place where a code changes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.codec_points import (
    BLOCK,
    FORMS,
    CodecForm,
    blocks_of_fractions,
    blocks_of_magnitudes,
    live,
    packed,
    random_blocks,
)

numba = pytest.importorskip("numba")
from refopt_cuda.kernels.arith import host  # noqa: E402

f32: Any = np.float32
Array = np.ndarray
SCALES = f32([0.0, 2.0**-100, 1e-20, 0.37, 1.0, 3e5, 1e36, 3.4028235e38, np.nan])
SCALE_WORDS = np.uint16([0, 1, 0x0200, 0x03FF, 0x0400, 0x3555, 0x3C00, 0x7BFF, 0x7E00, 0x7FC0])
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


@cache
def loops(name: str) -> Any:
    """(encode, decode) of rows of elements, compiled: a scale a row, one code an entry."""
    form = next(f for f in FORMS if f.name == name)
    block = form.module.make(host(), **form.options)
    scale, code, value, zero = block

    @numba.njit(error_model="numpy")
    def encode(rows, magnitudes, codes, scales):
        for i in range(rows.shape[0]):
            stored, factor, coded = scale(magnitudes[i])
            scales[i] = stored
            for j in range(rows.shape[1]):
                codes[i, j] = code(rows[i, j], factor) if coded else zero

    @numba.njit(error_model="numpy")
    def decode(codes, scales, x):
        for i in range(codes.shape[0]):
            for j in range(codes.shape[1]):
                x[i, j] = value(codes[i, j], scales[i])

    return encode, decode


def words_of_scales(form: CodecForm, count: int) -> Array:
    """Where scales go: float32, or the words of 16-bit ones."""
    return np.zeros(count, f32 if form.module.scale_dtype(**form.options).itemsize == 4 else np.uint16)


def decoded(form: CodecForm, codes: Array, scales: Array) -> Array:
    x = np.zeros(codes.shape, f32)
    loops(form.name)[1](codes, scales, x)
    return x


def check(form: CodecForm, rows: Array) -> None:
    """Scales, codes and decoded values of blocks of 64."""
    want = form.record().encode(rows.reshape(-1))
    codes, scales = np.zeros(rows.shape, form.module.dtype(**form.options)), words_of_scales(form, len(rows))
    loops(form.name)[0](rows, live(rows)[0], codes, scales)
    same_bits(scales.view(want.scales.dtype), want.scales, f"{form.name}: scales")
    same_bits((packed(codes) if form.per_byte == 2 else codes).reshape(-1), want.codes, f"{form.name}: codes")
    same_bits(decoded(form, codes, scales).reshape(-1), want.decode(), f"{form.name}: values")


@every_form
def test_every_fraction_of_the_largest_gets_the_oracles_code(form):
    check(form, blocks_of_fractions(form))


@every_form
def test_a_block_of_any_size_gets_the_oracles_scale_and_codes(form):
    check(form, blocks_of_magnitudes(form))


@every_form
@given(
    seed=st.integers(0, 2**32 - 1),
    low=st.floats(-45, 38),
    width=st.floats(0, 12),
    special=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_a_block_of_any_numbers_gets_the_oracles_codes_and_scale(form, seed, low, width, special):
    check(form, random_blocks(seed, low, min(low + width, 38.5), special))


@every_form
def test_every_code_decodes_to_the_oracles_value(form):
    count = 256 // form.per_byte**4  # 256 bytes, or 16 codes
    codes = np.resize(np.arange(count), (4, BLOCK)).astype(np.uint8).view(form.module.dtype(**form.options))
    for s in SCALE_WORDS if words_of_scales(form, 1).itemsize == 2 else SCALES:
        if form.options.get("scale") == "f16" and s == 0x7FC0:
            continue  # a NaN of the other format
        scales = words_of_scales(form, len(codes))
        scales[:] = s
        stored = packed(codes) if form.per_byte == 2 else codes
        want = form.box(np.ascontiguousarray(stored).reshape(-1), scales).decode()
        same_bits(decoded(form, codes, scales).reshape(-1), want, f"{form.name} times {s}")


@every_form
def test_the_arrays_are_those_of_the_oracles_record(form):
    box = form.record().encode(np.ones(BLOCK, f32))
    assert form.module.dtype(**form.options) == box.codes.dtype
    assert form.module.scale_dtype(**form.options) == box.scales.dtype
    assert box.codes.size * form.per_byte == BLOCK


@every_form
def test_the_first_of_each_option_is_the_default(form):
    if all(choices[0] == form.options[name] for name, choices in form.module.OPTIONS.items()):
        assert form.module.dtype() == form.module.dtype(**form.options)
        for mine, default in zip(form.module.tables(**form.options), form.module.tables(), strict=True):
            same_bits(mine, default, form.name)
