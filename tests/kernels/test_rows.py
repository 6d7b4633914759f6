"""Rows that a device computes for itself (rows.cu): its arithmetic by g++ against the host's, and what it is given."""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refopt.reduce import squares, total
from refopt.rules import RULES as RECORDS
from refopt_cuda.kernels import build, norm, rows_cuda, whole_build, whole_rules
from refopt_cuda.kernels.step_cuda import ROWS, SIZES, Launch
from refopt_cuda.random import step_word
from refopt_cuda.rules import RULES, form_of, forms, row
from refopt_cuda.scalars import gradient_scale
from tests.bits import same_bits
from tests.kernels.functors import OPTIONS
from tests.kernels.whole_emulator import Emulated

BETAS = (0.5, 0.8, 0.9, 0.97, 0.999, 0.9999)
STEPS = [*range(1, 2001), 4097, 12_345, 10**5, 999_999, 10**6, 2**24 + 1]
HYPER: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.03, "momentum": 0.85, "dampening": 0.2, "wd": 0.07},
    "adam": {"lr": 0.013, "eps": 1e-7, "wd": 1e-40},
    "adamw": {"lr": 0.013, "eps": 1e-7, "wd": 0.11},
    "lion": {"lr": 0.003, "wd": 0.2},
    "signum": {"lr": 0.003, "beta": 0.85, "wd": 0.2},
    "rmsprop": {"lr": 0.003, "alpha": 0.97, "momentum": 0.1, "wd": 0.2},
    "adagrad": {"lr": 0.003, "lr_decay": 0.037, "wd": 0.2},
    "ademamix": {"lr": 0.013, "beta3": 0.9995, "alpha": 3.7, "wd": 0.11},
}
WHOLE: dict[str, list[dict[str, Any]]] = {
    "lamb": [
        {"lr": 0.013, "eps": 1e-7, "wd": 0.11, "phi_low": 0.3, "phi_high": 4.0, "exclude_1d": True},
        {"lr": 0.013, "wd": 0.0, "variant": "apex", "bias_correction": False},
        {"lr": 0.013, "wd": 0.2, "variant": "clip", "max_unorm": 0.37},
    ],
    "lars": [{"lr": 0.7, "trust": 0.02, "momentum": 0.85, "wd": 0.07, "eps": 1e-6, "exclude_1d": True}],
    "adafactor": [
        {"eps1": 1e-12, "eps2": 0.03, "clip": 0.8, "decay_rate": -0.6, "wd": 0.3},
        {"warmup_init": True, "beta1": 0.7},
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "wd": 0.1},
        {"lr": 0.004, "variant": "torch", "wd": 0.3},
        {"lr": 0.004, "variant": "torch", "eps1": 0.0},
    ],
    "came": [{"beta1": 0.8, "beta2": 0.97, "beta3": 0.995, "eps1": 1e-12, "eps2": 1e-6, "clip": 0.8, "wd": 0.2}],
    "adam_mini": [{"lr": 0.013, "eps": 1e-7, "wd": 0.11}],
}
"""Numbers that no two scalars share; every option of the rows is on in one of them."""
MORE: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.03, "momentum": 0.85, "nesterov": True}),
    ("adam", {"lr": 0.013, "wd": 0.0, "bias_correction": False}),
    ("adamw", {"lr": 0.013, "bias_correction": False}),
]
CASES = [*HYPER.items(), *MORE]
WRAP = """
#undef HD
#define HD inline
"""
CALLS = """
extern "C" void all_rows(int64_t n, const int64_t* t, const double* gs, const double* hyper, Live* out) {
    for (int64_t i = 0; i < n; i++) fill(out + EACH * i, (uint64_t)t[i], gs[i], *(const Hypers*)hyper, 0);
}
extern "C" int size() { return sizeof(Live) * EACH; }
extern "C" double factor_of(double factor, double scale, int clip, double total, double longest) {
    return gradient_factor(factor, scale, clip, total, longest);
}
extern "C" uint64_t word_of(uint64_t seed, uint64_t t) { return step_word(seed, t); }
extern "C" int width() { return sizeof(Scalars) / 4; }
extern "C" int given() { return sizeof(Hypers) / 8; }
"""


def plain(stem: str) -> Any:
    few = {"plain": rows_cuda.PLAIN, "muon": rows_cuda.MUON}
    return few[stem] if stem in few else (whole_rules.forms if stem in whole_rules.WHOLE else forms)(stem)[0]


EVERY = [*RULES, *whole_rules.WHOLE, "plain", "muon"]


@pytest.fixture(scope="module")
def built(gxx: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """rows.cu of each rule as a library of the host, in one call of the compiler for each."""
    folder, out = tmp_path_factory.mktemp("rows"), {}
    for stem in EVERY:
        arith, rest = rows_cuda.source(plain(stem)).split("// Counted random bits", 1)
        source, library = folder / f"{stem}.cpp", folder / f"{stem}.so"
        source.write_text(f"{arith}{WRAP}//{rest}{CALLS}")
        command = [gxx, *(o.replace("-O2", "-O1") for o in OPTIONS), str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out[stem] = ctypes.CDLL(str(library))
    return out


def device_rows(library: Any, stem: str, hyper: dict[str, Any], steps: list[int], gs: float) -> np.ndarray:
    out = np.full((len(steps), rows_cuda.each(plain(stem)) // 4), np.nan, np.float32)
    args = rows_cuda.arguments(plain(stem), hyper, [(0, 1)], 0, rows_cuda.Factor())
    t, scale = np.array(steps, np.int64), np.full(len(steps), gs)
    given = (t.ctypes.data, scale.ctypes.data, args["hyper"].ctypes.data, out.ctypes.data)
    library.all_rows(ctypes.c_int64(len(steps)), *map(ctypes.c_void_p, given))
    return out


@pytest.mark.gxx
@pytest.mark.parametrize(("stem", "hyper"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_device_computes_the_scalars_of_the_host(stem: str, hyper: dict[str, Any], built: Any) -> None:
    """Word for word; where there are betas, for each of six and thousands of steps."""
    names, checked = rows_cuda.hypers(stem), RECORDS[stem].check(stem, hyper)
    assert built[stem].width() == len(RULES[stem].SCALARS) and built[stem].given() == len(names)
    for k, beta in enumerate(BETAS):
        betas = {b: BETAS[(k + j) % 6] for j, b in enumerate(("beta1", "beta2")) if b in names} if k else {}
        steps = STEPS if "beta1" in names or stem == "adagrad" else STEPS[:3]
        now = checked | betas | ({"beta": beta} if "beta" in names and k else {})
        gs = gradient_scale(beta / 3, k % 2 == 1)
        want = np.array([row(stem, t, now | {"gscale": beta / 3, "maximize": k % 2 == 1}) for t in steps])
        same_bits(device_rows(built[stem], stem, now, steps, gs)[:, : want.shape[1]], want, f"{stem}, {now}")


@pytest.mark.gxx
@pytest.mark.parametrize(("stem", "hyper"), [(s, h) for s, some in WHOLE.items() for h in some], ids=str)
def test_a_device_computes_both_rows_of_rules_that_see_whole_tensors(stem: str, hyper: Any, built: Any) -> None:
    """Of tensors of two axes or more, and of vectors: float32 and float64, word for word."""
    now, names, module = RECORDS[stem].check(stem, hyper), rows_cuda.hypers(stem), whole_rules.WHOLE[stem]
    assert built[stem].width() == len(module.SCALARS) and built[stem].given() == len(names)
    assert built[stem].size() == rows_cuda.PAIR
    got = device_rows(built[stem], stem, now, STEPS, gradient_scale(0.37, True)).reshape(len(STEPS), 2, -1)
    for k, t in enumerate(STEPS):
        for vector in (False, True):
            want = whole_rules.rows(stem, t, vector, now | {"gscale": 0.37, "maximize": True})
            same_bits(got[k, int(vector), : want.scalars.size], want.scalars, f"{stem} {t} {vector}")
            wide = got[k, int(vector), 16:32].copy().view(np.float64)[: want.wide.size]
            same_bits(wide, want.wide, f"{stem} {t} {vector}")


@pytest.mark.gxx
def test_a_device_computes_the_scalars_of_steps_of_many_calls(built: Any) -> None:
    """Muon's between its products, and for what torch's own operations step: a factor and a rate."""
    hyper = {"lr": 0.013, "momentum": 0.85, "wd": 0.3, "factor": 1.7**0.5}
    want = np.float32([0.85, 1.0 - 0.85, 1.0 - 0.013 * 0.3, 0.013 * 1.7**0.5, -0.37])
    same_bits(device_rows(built["muon"], "muon", hyper, [1], -0.37)[0, :5], want, "muon")
    same_bits(device_rows(built["plain"], "plain", hyper, [1], -0.37)[0, :2], np.float32([-0.37, 0.013]), "plain")


@pytest.mark.gxx
def test_a_device_cuts_gradients_as_the_host_does(built: Any) -> None:
    function = built["sgd"].factor_of
    function.restype = ctypes.c_double
    rng = np.random.default_rng(0)
    sums = [0.0, 1e-30, 1.0, np.inf, np.nan, *10.0 ** rng.uniform(-40, 40, 300)]
    for total_, factor, scale in zip(
        sums, np.resize([1.0, 0.3, -2.5], 305), 2.0 ** np.resize(range(20), 305), strict=True
    ):
        for longest in (0.5, 1.0, 1e6):
            want = norm.gradient_factor(factor / scale, total_, longest)
            given = (ctypes.c_double(x) for x in (factor, scale))
            got = function(*given, 1, ctypes.c_double(total_), ctypes.c_double(longest))
            assert np.float64(got).tobytes() == np.float64(want).tobytes() or (np.isnan(got) and np.isnan(want))


@pytest.mark.gxx
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 + 5, 2**70 + 3])
def test_a_device_makes_the_words_of_random_bits(seed: int, built: Any) -> None:
    function = built["lion"].word_of
    function.restype = ctypes.c_uint64
    for t in (1, 2, 1000, 2**33):
        assert function(ctypes.c_uint64(seed & 2**64 - 1), ctypes.c_uint64(t)) == step_word(seed, t)


SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (1,),
    (300,),
    (3, 255),
    (5, 256),
    (2, 3, 300),
    (70_000,),
    (300, 40),
    (600, 256),
]
NUMBERS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def gradients(number: str) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    exact = [(10.0 ** rng.uniform(-3, 3, s) * rng.choice([-1, 1], s)).astype(np.float32) for s in SHAPES]
    if number == "bfloat16":
        return [np.asarray(np.ascontiguousarray(g).view(np.uint32) >> 16, np.uint16).reshape(g.shape) for g in exact]
    return [np.asarray(g, NUMBERS[number]) for g in exact]


def wide(g: np.ndarray) -> np.ndarray:
    return (g.astype(np.uint32) << 16).view(np.float32) if g.dtype == np.uint16 else g.astype(np.float32)


@pytest.mark.parametrize("number", NUMBERS)
def test_sums_of_squares_on_the_host_are_the_oracles(number: str) -> None:
    for g, shape in zip(gradients(number), SHAPES, strict=True):
        assert norm.square(g, shape) == (total(squares(wide(g))) if g.size else 0.0), shape


@pytest.mark.gxx
@pytest.mark.parametrize("number", NUMBERS)
def test_sums_of_squares_by_the_passes_of_a_gpu_are_the_oracles(number: str, gxx: str, tmp_path: Path) -> None:
    """A tensor without elements keeps what was there, a skipped one as well."""
    grads, out = gradients(number), np.zeros(len(SHAPES))
    places = [out.ctypes.data + 8 * k for k in range(len(SHAPES))]
    run = norm.squares((number, tuple(SHAPES)), places, Emulated(gxx, tmp_path))
    run([g.ctypes.data for g in grads], 0)
    assert out.tolist() == [total(squares(wide(g))) if g.size else 0.0 for g in grads]


# ---------------------------------------------------------------------------------------- compiled without a driver


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings: pip install 'refopt[test]'")
    from tests.kernels import test_nvrtc

    return test_nvrtc


@pytest.mark.parametrize("stem", EVERY)
def test_rows_compile_and_their_arithmetic_does_not_obey_the_flags(stem: str, nvrtc: Any) -> None:
    """In float64 by name: no FMA, no flush, no approximate division; but for Adafactor's power, the library's."""
    text = (
        rows_cuda.source(plain(stem)).replace("return pow(base, exponent)", "return mul64(base, exponent)")
        + "\n"
        + nvrtc.layout("Args", rows_cuda.args_type())
    )
    text += f'\nstatic_assert(sizeof(Live) * EACH == {rows_cuda.each(plain(stem))}, "row");'
    architecture = nvrtc.ARCHITECTURES[EVERY.index(stem) % len(nvrtc.ARCHITECTURES)]
    ptx, log = nvrtc.compile_text(text, architecture)
    assert not re.findall(r"(?:warning|error) #(?!177)(\d+)", log), log
    assert not re.findall(r"fma\.\S*f(?:32|64)|\.ftz\.|\.approx\S*f64", ptx) and "mul.rn.f64" in ptx


@pytest.mark.parametrize("number", NUMBERS)
def test_sums_of_squares_compile_and_spill_nothing(number: str, nvrtc: Any) -> None:
    ptx, log = nvrtc.compile_text(whole_build.source(whole_build.Kernel(norm.NORM, "float32", number)), 90)
    assert not nvrtc.spilled(log) and len(re.findall(r"\.entry\s+(?:sums0|finish0)", ptx)) == 2


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize(("codec", "weight"), [("dynamic8", "bf16_sr"), ("q4", "bf16_rem16"), ("f32", "bfloat16")])
def test_a_kernel_that_reads_rows_spills_nothing(codec: str, weight: str, rows: int, nvrtc: Any) -> None:
    kernel = replace(nvrtc.kernel_of(form_of("adamw", {}), (codec,) * 2, weight, "bfloat16", rows), live=True)
    ptx, log = nvrtc.compiled(kernel, 90)
    assert not nvrtc.spilled(log) and not nvrtc.foreign(ptx, False) and ".f64" not in ptx


@pytest.mark.parametrize("size", SIZES)
def test_a_launch_that_reads_rows_packs_its_arguments_as_the_kernel_reads_them(size: int, nvrtc: Any) -> None:
    launch = Launch("lion", ("f32",), "float32", "float32")
    kernel = replace(launch._kernel(size, ROWS), live=True)
    layout = nvrtc.layout("Args", launch._args_type(size, ROWS, live=True))
    check = f'static_assert(sizeof(Live) == {rows_cuda.BYTES}, "row");'
    nvrtc.compile_text(f"{build.source(kernel)}\n{layout}\n{check}", 90)
