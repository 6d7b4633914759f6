"""The functors of block codecs against the oracle, on the host and on a GPU: the same codes, scales and values.

Fractions are exhaustive over the upper half of a float32 and on both sides of every place where a code changes.
"""

from __future__ import annotations

import re
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
    boundaries,
    live,
    nibbles,
    random_blocks,
)
from tests.kernels.codec_functors import Device, Functors, Host, text

f32: Any = np.float32
Array = np.ndarray
SCALES = f32([0.0, 2.0**-100, 1e-20, 0.37, 1.0, 3e5, 1e36, 3.4028235e38, np.nan])
SCALE_WORDS = np.uint16([0, 1, 0x0200, 0x03FF, 0x0400, 0x3555, 0x3C00, 0x7BFF])
QUIET = {"f16": 0x7E00, "bf16": 0x7FC0}
CODES = {"fp8_e4m3": 254, "fp8_e5m2": 248, "q4_signed": 16, "q4_unsigned": 16, "nf4": 16, "fp4": 16}
CODES |= {"compand8_signed_f16": 255, "compand8_signed_bf16": 255}
CODES |= {"compand8_unsigned_f16": 256, "compand8_unsigned_bf16": 256}
"""How many codes are written at all."""
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
sixteen_bit = pytest.mark.parametrize("form", [f for f in FORMS if "scale" in f.options], ids=lambda form: form.name)


@pytest.fixture(
    scope="module", params=[pytest.param("host", marks=pytest.mark.gxx), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def functors(request, tmp_path_factory) -> Functors:
    if request.param == "gpu":
        return Device()
    return Host(request.getfixturevalue("gxx"), tmp_path_factory.mktemp("codecs"))


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def stored_scales(functors: Functors, form: CodecForm, rows: Array) -> tuple[Array, Array, Array]:
    """(scales as they are stored, factors, whether a row is coded), as a kernel makes them."""
    a, coded = live(rows)
    scale = np.where(a < 0x7F800000, f32(0), f32(np.nan))
    scale[coded] = functors.scale(form, a[coded].view(f32))
    coded &= scale > 0
    constants = functors.constants(form)
    factor = np.where(coded, f32(1) / (scale if constants["FACTOR_OF_SCALE"] else a.view(f32)), f32(0))
    if constants["SCALE_BITS"] == 16:
        scale = functors.narrow(form, scale).view(form.module.scale_dtype(**form.options))
    return scale, factor, coded


def check(functors: Functors, form: CodecForm, rows: Array) -> None:
    """Scales, codes and decoded values of blocks of 64."""
    want = form.record().encode(rows.reshape(-1))
    scale, factor, coded = stored_scales(functors, form, rows)
    same_bits(scale, want.scales, f"{form.name}: scales")
    bytes_ = np.full((len(rows), BLOCK // form.per_byte), functors.constants(form)["ZERO"] & 255, np.uint8)
    bytes_[coded] = functors.encode(form, rows[coded], factor[coded])
    same_bits(bytes_.reshape(-1), want.codes.view(np.uint8), f"{form.name}: codes")
    wide = functors.widen(form, scale.view(np.uint16)) if scale.dtype.itemsize == 2 else scale
    same_bits(functors.decode(form, bytes_, wide).reshape(-1), want.decode(), f"{form.name}: values")


@every_form
def test_every_fraction_of_the_largest_gets_the_oracles_code(functors, form):
    rows = blocks_of_fractions(form)
    check(functors, form, rows)
    codes = form.record().encode(rows.reshape(-1)).codes.view(np.uint8)
    assert len(np.unique(nibbles(codes) if form.per_byte == 2 else codes)) == CODES[form.name]
    assert boundaries(form.name).size == CODES[form.name] - (2 if form.stem == "fp8" else 1)  # -0 is a code of its own


@every_form
def test_a_block_of_any_size_gets_the_oracles_scale_and_codes(functors, form):
    check(functors, form, blocks_of_magnitudes(form))


@every_form
@given(
    seed=st.integers(0, 2**32 - 1),
    low=st.floats(-45, 38),
    width=st.floats(0, 12),
    special=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_a_block_of_any_numbers_gets_the_oracles_codes_and_scale(functors, form, seed, low, width, special):
    check(functors, form, random_blocks(seed, low, min(low + width, 38.5), special))


@every_form
def test_every_byte_decodes_to_the_oracles_values(functors, form):
    codes = np.concatenate([np.roll(np.arange(256), k) for k in range(4)]).astype(np.uint8)  # in every place of a word
    codes = codes.reshape(-1, BLOCK // form.per_byte)
    words = form.module.scale_dtype(**form.options).itemsize == 2
    for s in [*SCALE_WORDS, QUIET[form.options["scale"]]] if words else SCALES:
        scales = np.full(len(codes), s, np.uint16 if words else f32)
        want = form.box(codes.reshape(-1), scales).decode()
        wide = functors.widen(form, scales) if words else scales
        same_bits(functors.decode(form, codes, wide).reshape(-1), want, f"{form.name} times {s}")


@every_form
def test_a_word_of_zeros_is_what_zeros_encode_to(functors, form):
    zeros = np.zeros((1, 32 // form.module.BITS), f32)
    code = functors.encode(form, zeros, f32([1])).view(np.uint32)
    assert code.item() == functors.constants(form)["ZERO"]


@every_form
def test_the_constants_are_those_of_the_python_form(functors, form):
    constants = functors.constants(form)
    values, words = form.module.tables(**form.options)
    assert (values.dtype, words.dtype) == (f32, np.uint32)
    assert (constants["ROWS"], constants["WORDS"]) == (values.size, words.size)
    assert constants["BITS"] == form.module.BITS and constants["SCALED"] == 1
    assert constants["SCALE_BITS"] == 8 * form.module.scale_dtype(**form.options).itemsize


@sixteen_bit
def test_every_scale_word_is_widened_exactly_and_narrowed_to_itself(functors, form):
    every = np.arange(1 << 16, dtype=np.uint16)
    f16 = form.options["scale"] == "f16"
    want = every.view(np.float16).astype(f32) if f16 else (every.astype(np.uint32) << 16).view(f32)
    same_bits(functors.widen(form, every), want, "widened")
    finite = every[: 0x7C00 if f16 else 0x7F80]
    same_bits(functors.narrow(form, want[: finite.size]), finite, "narrowed")


@sixteen_bit
def test_scales_are_narrowed_to_the_nearest_and_at_most_the_largest(functors, form):
    f16 = form.options["scale"] == "f16"
    last, shift = (0x7BFF, 13) if f16 else (0x7F7F, 16)
    every = np.arange(last + 1, dtype=np.uint32)
    here = every.astype(np.uint16).view(np.float16).astype(f32) if f16 else (every << 16).view(f32)
    ties = np.append((here[:-1].astype(np.float64) + here[1:]) / 2, float(here[-1])).astype(f32)
    x = (np.append(here, ties).view(np.uint32).astype(np.int64)[:, None] + np.arange(-2, 3)).clip(0, 0x7F7FFFFF)
    x = np.append(x.reshape(-1), 0x7F7FFFFF).astype(np.uint32).view(f32)
    if f16:
        want = np.minimum(x.astype(np.float16).view(np.uint16), last)
    else:
        bits = x.view(np.uint32)
        want = np.minimum(bits + 0x7FFF + (bits >> shift & 1) >> shift, last)
    same_bits(functors.narrow(form, x), want.astype(np.uint16), "narrowed")
    assert functors.narrow(form, f32([np.nan])).item() == QUIET[form.options["scale"]]


@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_the_functors_compile_and_their_arithmetic_does_not_obey_the_flags(architecture):
    from tests.kernels.test_nvrtc import ARCHITECTURES, UNUSED, compile_text, foreign

    if architecture not in ARCHITECTURES:
        pytest.skip(f"this NVRTC does not compile for sm_{architecture}")
    ptx, log = compile_text(text(), architecture)
    assert set(re.findall(r"(?:warning|error) #(\d+)", log)) <= {UNUSED}, log
    named = re.compile(r"mul\.rn\.sat\.f32|cvt\.rn\.satfinite\.e[45]m[32]x2\.f32")
    assert not [line for line in foreign(ptx, False) if not named.match(line)]
    assert ".f64" not in ptx
    assert ("e4m3x2" in ptx) == ("e5m2x2" in ptx) == (architecture >= 89), "the hardware converts since Ada"
    assert ptx.count(".entry") == 6 * len(FORMS)
