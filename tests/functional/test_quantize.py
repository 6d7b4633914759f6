"""`refopt_cuda.quantize` and `dequantize` on arrays of every library, beside the reference's codecs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import refopt_cuda as rc
from refopt import codecs
from refopt_cuda.codecs import forms
from tests.strategies import log_uniform

NAMES = [
    "int8_linear",
    "dynamic8",
    "fp8",
    "fp8.e5m2",
    "q4",
    "compand8",
    "compand8.bf16",
    "nf4",
    "fp4",
    "double",
    "double.fp4",
]
UNSIGNED = ["int8_linear.unsigned", "dynamic8.unsigned", "q4.unsigned", "compand8.unsigned"]
SHAPES = [(), (0,), (1,), (7,), (257,), (3, 16), (5, 40), (33, 255), (8, 264), (2, 3, 512), (70_001,)]
LIBRARIES = [
    "numpy",
    "torch",
    pytest.param("torch-cuda", marks=pytest.mark.gpu),
    pytest.param("cupy", marks=pytest.mark.gpu),
]


def record(name: str, block: int | None) -> Any:
    stem, _, word = name.partition(".")
    base = codecs.CODECS[stem]
    options: dict[str, Any] = {"block": block} if block else {}
    if word == "unsigned":
        options["signed"] = False
    elif word:
        options[{"double": "base", "fp8": "format", "compand8": "scale"}[stem]] = word
    return base(**options)


def given(x: np.ndarray, library: str) -> Any:
    if library == "numpy":
        return x
    if library == "cupy":
        import cupy

        return cupy.asarray(x)
    return torch.from_numpy(x).to("cuda" if library == "torch-cuda" else "cpu")


def taken(a: Any) -> np.ndarray:
    """Back in NumPy; bfloat16 as uint16 words."""
    if isinstance(a, torch.Tensor):
        a = a.cpu()
        return (a.view(torch.int16).numpy().view(np.uint16) if a.dtype == torch.bfloat16 else a.numpy()).copy()
    return a if isinstance(a, np.ndarray) else a.get()


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = np.asarray(log_uniform(rng, shape, -8, 3), np.float32)
    flat = x.reshape(-1)
    flat[rng.random(flat.size) < 0.1] = 0
    return x


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", NAMES + UNSIGNED)
def test_codes_scales_and_values_are_the_references(name: str, library: str) -> None:
    for k, shape in enumerate(SHAPES):
        x = numbers(shape, k)
        if name in UNSIGNED:
            x = np.asarray(np.abs(x))
        if x.size > 600 and "double" not in name:  # one NaN is in the mean of all scales
            x.reshape(-1)[5], x.reshape(-1)[600] = np.inf, np.nan
        agrees(name, None, x, library)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("name", "block"),
    [("dynamic8", 64), ("dynamic8", 2048), ("q4", 32), ("nf4", 256), ("fp4", 4096), ("int8_linear", 100)],
)
def test_blocks_of_any_size(name: str, block: int, library: str) -> None:
    for k, shape in enumerate(SHAPES):
        agrees(name, block, numbers(shape, 20 + k), library)


def agrees(name: str, block: int | None, x: np.ndarray, library: str) -> None:
    with np.errstate(all="ignore"):
        want = record(name, block).encode(x)
        values = want.decode()
    q = rc.quantize(given(x, library), name, block=block)
    for part, a in want.arrays.items():
        got = taken(q.arrays[part]).reshape(-1)
        same(
            got.view(np.asarray(a).dtype) if got.dtype.itemsize == a.dtype.itemsize else got,
            np.asarray(a).reshape(-1),
            f"{name} {x.shape}: {part}",
        )
    assert q.nbytes == want.nbytes
    same(taken(rc.dequantize(q)).reshape(-1), values.reshape(-1), f"{name} {x.shape}: values")


def same(got: np.ndarray, want: np.ndarray, what: str) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{what}: {got.dtype}{got.shape} for {want.dtype}{want.shape}"
    )
    differ = got.view(f"u{got.itemsize}") != want.view(f"u{want.itemsize}")
    if got.dtype.kind == "f":
        differ &= ~(np.isnan(got) & np.isnan(want))
    elif what.endswith("scales") and got.dtype == np.uint16:
        differ &= ~((got & 0x7FFF) > 0x7F80) | ~((want & 0x7FFF) > 0x7F80)
    assert not differ.any(), f"{what}: {differ.sum()} of {got.size} differ, first at {int(np.flatnonzero(differ)[0])}"


@pytest.mark.parametrize("library", LIBRARIES[1:])
@pytest.mark.parametrize("number", ["float16", "bfloat16"])
def test_other_formats_are_widened_exactly_and_rounded_once(number: str, library: str) -> None:
    x = numbers((40, 264), 3)
    narrow = codecs.bf16.encode(x).codes if number == "bfloat16" else x.astype(np.float16)
    wide = (narrow.astype(np.uint32) << 16).view(np.float32) if number == "bfloat16" else narrow.astype(np.float32)
    if number == "bfloat16" and "torch" in library:
        there = torch.from_numpy(narrow.view(np.int16)).view(torch.bfloat16).to("cuda" if "cuda" in library else "cpu")
    else:
        there = given(narrow, library)
    with np.errstate(over="ignore"):
        values = codecs.dynamic8.encode(wide).decode()
        want = codecs.bf16.encode(values).codes if number == "bfloat16" else values.astype(np.float16)
    q = rc.quantize(there)
    back = taken(rc.dequantize(q))
    assert (back.view(np.uint16) == want.view(np.uint16)).all()
    same(taken(rc.dequantize(q, "float32")), values, "float32")


def test_out_is_written_into_and_returned() -> None:
    x = numbers((4, 64), 1)
    out = np.full((4, 64), 7, np.float32)
    assert rc.dequantize(rc.quantize(x, "nf4"), out=out) is out
    same(out, codecs.nf4.encode(x).decode(), "out")


BAD = [
    ({"x": np.zeros(3)}, TypeError, "x must be float32, float16 or bfloat16, got float64"),
    ({"x": [1.0]}, TypeError, "x must be an array of NumPy, CuPy or torch or have DLPack, got list"),
    ({"x": np.zeros((4, 4), np.float32).T[1:]}, ValueError, "x must be row-major"),
    ({"codec": "dynamic9"}, ValueError, "no codec 'dynamic9'; there are int8_linear, "),
    ({"codec": "bf16"}, ValueError, "bf16 is a number format: convert the array"),
    ({"codec": "double.q4"}, ValueError, "double quantization is of nf4 or fp4"),
    ({"codec": 8}, TypeError, "codec must be a name, got 8"),
    ({"block": 0}, ValueError, "block must be a whole number >= 1, got 0"),
    ({"codec": "nf4", "block": 63}, ValueError, "block must be a whole even number >= 1, got 63"),
]


@pytest.mark.parametrize(("words", "error", "message"), BAD, ids=lambda x: str(x)[:20])
def test_what_cannot_be_quantized_is_named(words: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^quantize: .*{message}"):
        rc.quantize(**{"x": np.zeros(3, np.float32), **words})


def test_what_cannot_be_dequantized_is_named() -> None:
    q = rc.quantize(np.ones((2, 32), np.float32), "q4")
    with pytest.raises(ValueError, match=r"^dequantize: out must be of shape \(2, 32\)"):
        rc.dequantize(q, out=np.ones(64, np.float32))
    with pytest.raises(ValueError, match=r"^dequantize: dtype must be .* got 'int8'"):
        rc.dequantize(q, "int8")
    with pytest.raises(TypeError, match=r"^dequantize: q must be what quantize returned, got ndarray"):
        rc.dequantize(q.codes)


def test_every_coded_form_has_a_name() -> None:
    known = {
        ".".join(
            [f.stem, *(str(c) for n, c in f.options.items() if n != "signed" and c != forms(f.stem)[0].options[n])]
        )
        for n in NAMES
        if "double" not in n
        for f in forms(n.partition(".")[0])
    }
    assert known == {n for n in NAMES if "double" not in n}
