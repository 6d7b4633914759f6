"""The formats of weights, as CUDA functors built for the host and as Numba forms, against the oracle word for word."""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refopt import codecs as oracle
from refopt import rng
from refopt.spec import Box
from refopt_cuda import random
from refopt_cuda.codecs import WEIGHTS, Form, forms
from refopt_cuda.kernels.arith import host
from tests.bits import same_bits
from tests.kernels.functors import compiled

f32: Any = np.float32
Array = np.ndarray
FORMS = [form for stem in WEIGHTS for form in forms(stem)]
BESIDE = {"bf16_rem16": "rem", "bf16_kahan": "comp", "bf16_ecc": "error"}
LOWS = np.uint32([0, 1, 2, 0x3FFF, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xBEEF, 0xFFFE, 0xFFFF])


@pytest.fixture(scope="module")
def library(gxx, tmp_path_factory) -> ctypes.CDLL:
    from pathlib import Path

    return compiled(gxx, Path(__file__).with_name("weights.cpp"), tmp_path_factory.mktemp("weights"))


def record(form: Form) -> Any:
    return oracle.CODECS[form.stem](**form.options)


def beside_dtype(form: Form) -> np.dtype | None:
    return form.module.rest_dtype(**form.options)


def box(form: Form, words: Array, rest: Array) -> Box:
    arrays = {"codes": words}
    if form.stem in BESIDE:
        arrays[BESIDE[form.stem]] = rest
    return Box(record(form), words.shape, arrays)


class Functors:
    """The .cuh functors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def open(self, form: Form, words: Array, rest: Array) -> Array:
        x = np.empty(words.size, f32)
        self._call(f"{form.name}_open", words, self._wide(rest), x)
        return x

    def close(self, form: Form, x: Array, r: Array, words: Array, rest: Array) -> tuple[Array, Array]:
        words, wide = words.copy(), self._wide(rest)
        self._call(f"{form.name}_close", x, r, words, wide)
        return words, wide.astype(np.uint8).view(np.int8) if rest.itemsize == 1 else wide.view(rest.dtype)

    @staticmethod
    def _wide(rest: Array) -> Array:
        return rest.view(f"u{rest.itemsize}").astype(np.uint16)

    def _call(self, name: str, *arrays: Array) -> None:
        function = getattr(self.library, name)
        function.restype = None
        function(ctypes.c_int64(arrays[0].size), *(ctypes.c_void_p(a.ctypes.data) for a in arrays))


class Twins:
    """The Numba forms on the host."""

    def __init__(self) -> None:
        self.made = {form: form.make(host()) for form in FORMS}

    def open(self, form: Form, words: Array, rest: Array) -> Array:
        one, x = self.made[form].open, np.empty(words.size, f32)

        @numba.njit
        def run(words, rest, x):
            for i in range(x.size):
                x[i] = one(words[i], rest[i])

        run(words, rest, x)
        return x

    def close(self, form: Form, x: Array, r: Array, words: Array, rest: Array) -> tuple[Array, Array]:
        one, words, rest = self.made[form].close, words.copy(), rest.copy()

        @numba.njit
        def run(x, r, words, rest):
            for i in range(x.size):
                words[i], rest[i] = one(x[i], words[i], rest[i], r[i])

        run(x, r, words, rest)
        return words, rest


@pytest.fixture(scope="module", params=["functors", "twins"])
def ours(request) -> Any:
    return Twins() if request.param == "twins" else Functors(request.getfixturevalue("library"))


def rests(form: Form, n: int, seed: int) -> Array:
    dtype = beside_dtype(form) or np.dtype(np.uint16)
    return np.random.default_rng(seed).integers(0, 256**dtype.itemsize, n).astype(f"u{dtype.itemsize}").view(dtype)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_word_opens_to_the_oracles_weight(ours, form):
    words = np.repeat(np.arange(65536, dtype=np.uint16), 5)
    rest = rests(form, words.size, 1)
    rest[::5], rest[1::5] = 0, np.iinfo(rest.dtype).min
    rest[2::5] = np.iinfo(rest.dtype).max
    if form.stem == "bf16_ecc":  # the lowest number is never written
        rest[rest == np.iinfo(rest.dtype).min] = -1
    with np.errstate(all="ignore"):
        want = box(form, words, rest).decode()
    same_bits(ours.open(form, words, rest), want, form.name)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_numbers_of_every_magnitude_are_stored_as_the_oracle_stores_them(ours, form):
    x = ((np.arange(65536, dtype=np.uint32) << 16)[:, None] | LOWS).reshape(-1).view(f32)
    made = np.random.default_rng(2)
    r = made.integers(0, 65536, x.size).astype(np.uint16)
    near = (x.view(np.uint32) >> 16).astype(np.uint16) + made.integers(-2, 3, x.size).astype(np.uint16)  # a step away
    words = np.where(made.random(x.size) < 0.5, near, made.integers(0, 65536, x.size)).astype(np.uint16)
    check(ours, form, x, r, words, rests(form, x.size, 3))


@pytest.mark.parametrize("x", f32([1.00390625, -1.003, 3.14159265, 1e-40, 3.4e38, 0.0]))
def test_every_random_number_rounds_as_the_oracle_rounds(ours, x):
    form, r = forms("bf16_sr")[0], np.arange(65536, dtype=np.uint16)
    check(ours, form, np.full(65536, x, f32), r, np.zeros(65536, np.uint16), np.zeros(65536, np.uint16))


@given(seed=st.integers(0, 2**32), low=st.integers(0, 255), span=st.integers(0, 40))
def test_a_step_from_any_weight_carries_the_oracles_compensation(ours, seed, low, span):
    made, n = np.random.default_rng(seed), 400
    words = (
        made.integers(0, 2, n) << 15 | made.integers(low, min(low + span, 255) + 1, n) << 7 | made.integers(0, 128, n)
    ).astype(np.uint16)
    rest = rests(forms("bf16_kahan")[0], n, seed)
    with np.errstate(all="ignore"):
        x = f32(oracle.bf16.unpack({"codes": words}, None, None) * f32(1 + 1e-3 * made.standard_normal(n)))  # type: ignore[arg-type]
    check(ours, forms("bf16_kahan")[0], x, np.zeros(n, np.uint16), words, rest)


def check(ours: Any, form: Form, x: Array, r: Array, words: Array, rest: Array) -> None:
    given_ = {"random": r, "old": box(form, words, rest)}
    with np.errstate(all="ignore"):
        want = record(form).encode(x, **{name: given_[name] for name in record(form).needs})
    got, beside = ours.close(form, x, r, words, rest)
    same_bits(number(got), number(want.codes), f"{form.name}: words")  # NaN is one value
    if form.stem == "bf16_kahan":
        same_bits(number(beside), number(want.comp), f"{form.name}: comp")
    elif form.stem in BESIDE:
        same_bits(beside, want.arrays[BESIDE[form.stem]], f"{form.name}: beside")


def number(words: Array) -> Array:
    return (words.astype(np.uint32) << 16).view(f32)


@given(seed=st.integers(0, 2**40), t=st.integers(1, 10**6), tensor=st.integers(0, 10**4), first=st.integers(0, 2**34))
def test_random_bits_are_the_oracles(library, seed, t, tensor, first):
    first -= first % 8
    want = rng.r16(rng.key(seed, t, tensor), first, 64)
    word, one, eight = random.step_word(seed, t), np.empty(64, np.uint16), np.empty(64, np.uint16)
    library.random_bits(
        ctypes.c_int64(64), ctypes.c_uint64(word), ctypes.c_uint32(tensor), ctypes.c_int64(first),
        ctypes.c_void_p(one.ctypes.data), ctypes.c_void_p(eight.ctypes.data),
    )  # fmt: skip
    same_bits(one, want, "one at a time")
    same_bits(eight, want, "eight at a time")
    same_bits(twin_bits(np.uint64(word), tensor, first, 64), want, "in Numba")


KEY, R16 = random.make(numba.njit)


@numba.njit
def twin_bits(word, tensor, first, n):
    key, out = KEY(word, tensor), np.empty(n, np.uint16)
    for i in range(n):
        out[i] = R16(key, first + i)
    return out


def test_random_bits_are_the_published_ones():
    made = twin_bits(np.uint64(random.step_word(42, 7)), 3, 0, 8)
    assert made.tolist() == [8785, 58430, 11770, 27368, 46213, 13794, 41071, 44491]
