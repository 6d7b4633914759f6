"""Muon's passes: their arithmetic on the host and on a device beside the oracle's bits, and that they compile."""

from __future__ import annotations

import ctypes
import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refopt import rules
from refopt.codecs import bf16
from refopt.rules.muon import orthogonal
from refopt_cuda.kernels import build
from refopt_cuda.kernels import muon as kernels
from tests.bits import same_bits
from tests.strategies import log_uniform

HYPER = {"lr": 0.013, "momentum": 0.85, "wd": 0.3}
ROW = np.array([0.85, 1.0 - 0.85, 1.0 - 0.013 * 0.3, 0.013 * (40 / 24) ** 0.5, 1.0], np.float32)
EMULATOR = Path(__file__).with_name("muon_emulator.cpp")
PASSES = {"momentum": 0, "input": 1, "apply": 2}


class Emulated:
    """The kernels as they stand in muon.cu, on the host."""

    def __init__(self, gxx: str, folder: Path, kernel: kernels.Kernel) -> None:
        (folder / "defines.inc").write_text(kernels.defines(kernel))
        command = [gxx, "-O1", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", str(EMULATOR)]
        command += [f"-I{build.ROOT}", f"-I{folder}", "-o", str(folder / "muon.so")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.compiled, self.kernel = ctypes.CDLL(str(folder / "muon.so")), kernel

    def run(self, name: str, passes: kernels.Passes, stack: Any) -> None:
        passes.args["stack"] = stack.ctypes.data
        parts, count = passes.grid
        self.compiled["pass"](PASSES[name], parts, count, ctypes.c_void_p(passes.args.ctypes.data))

    def mirror(self, stack: Any, shift: float) -> None:
        count, m, _ = stack.shape
        tiles = -(-m // kernels.SIDE)
        self.compiled.mirror(tiles, count, ctypes.c_void_p(stack.ctypes.data), m, ctypes.c_float(shift))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def emulated(request: Any, gxx: str, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """Momentum in float32 or in bfloat16; all else in float32."""
    kernel = kernels.Kernel("float32", request.param, "float32", "float32", 1.0, True)
    return Emulated(gxx, tmp_path_factory.mktemp("muon"), kernel)


@pytest.mark.gxx
@pytest.mark.parametrize("shape", [(40, 24), (1, 7), (33, 65), (180, 200)])
def test_the_passes_have_the_oracles_bits(emulated: Emulated, shape: Any) -> None:
    """Three matrices at once: eights, a rest, one part and three; weights through the rule itself."""
    rng, n, count = np.random.default_rng(0), shape[0] * shape[1], 3
    p, b, g = (log_uniform(rng, (count, *shape), *span) for span in ((-3, 0), (-6, 2), (-6, 2)))
    half = emulated.kernel.buffer == "bfloat16"
    kept = bf16.encode(b.reshape(-1)).codes if half else b.reshape(-1)
    b = bf16.decode(bf16.encode(b)) if half else b
    kept, stepped = kept.copy().reshape(count, n), p.copy()
    addresses = [kernels.Matrix(*(x.ctypes.data for x in row)) for row in zip(g, kept, stepped, strict=True)]
    row = ROW.copy()
    row[3] = np.float32(0.013 * max(1.0, shape[0] / shape[1]) ** 0.5)
    stack, sums = np.zeros((count, *shape), np.float32), np.zeros((count, kernels.parts(n)))
    passes = kernels.Passes(emulated.kernel, addresses, n, row, 1e-7, sums.ctypes.data)
    emulated.run("momentum", passes, stack)
    emulated.run("input", passes, stack)
    new = row[0] * b + row[1] * g
    new = bf16.decode(bf16.encode(new)) if half else new
    same_bits(kept, (bf16.encode(new).codes if half else new).reshape(count, n), "B")
    Z = row[1] * g + row[0] * new
    norms = np.sqrt((Z.astype(np.float64) ** 2).sum((1, 2)))
    np.testing.assert_allclose(np.sqrt(sums.sum(1)), norms, rtol=1e-14)
    same_bits(stack, Z * (1 / np.sqrt(sums.sum(1))).astype(np.float32)[:, None, None], "the input")
    X = [np.ascontiguousarray(orthogonal(z.astype(np.float64), 5, 1e-7, "floor"), np.float32) for z in Z]
    emulated.run("apply", passes, np.array(X))
    for k in range(count):
        want, _ = rules.muon.update(p[k], g[k], {"B": b[k]}, t=1, **HYPER)
        same_bits(stepped[k], want if not half else p[k] * row[2] - row[3] * X[k], "p")


@pytest.mark.gxx
@pytest.mark.parametrize("size", [0.0, 1e-9, np.inf, np.nan])
def test_small_norms_count_as_eps_and_those_that_are_no_numbers_as_themselves(emulated: Emulated, size: float) -> None:
    g, b, p = (np.full((1, 10), size, np.float32), np.zeros((1, 10), np.float32), np.zeros((1, 10), np.float32))
    stack, sums = np.ones((1, 10), np.float32), np.zeros((1, 1))
    address = kernels.Matrix(*(x.ctypes.data for x in (g, b, p)))
    passes = kernels.Passes(emulated.kernel, [address], 10, ROW, 1e-7, sums.ctypes.data)
    emulated.run("momentum", passes, stack)
    emulated.run("input", passes, stack)
    z = (1 - 0.85) * (1 + 0.85) * size
    want = z / max(10**0.5 * z, 1e-7) if np.isfinite(size) else np.nan
    np.testing.assert_allclose(stack, np.full((1, 10), want), rtol=1e-2)


@pytest.mark.gxx
@pytest.mark.parametrize("m", [1, 63, 64, 130])
def test_a_matrix_is_mirrored_across_its_diagonal(emulated: Emulated, m: int) -> None:
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((2, m, m)).astype(np.float32)
    upper = np.triu(stack)
    want = upper + np.triu(stack, 1).transpose(0, 2, 1) + np.float32(1.5) * np.eye(m, dtype=np.float32)
    emulated.mirror(stack, 1.5)
    same_bits(stack, want.astype(np.float32), "mirrored")


FORMATS = [*product(build.NUMBERS, ("float32", "bfloat16"), build.NUMBERS, ("float16", "bfloat16", "float32"))]


@pytest.mark.parametrize(("grad", "buffer", "weight", "stack"), FORMATS[::5])
def test_the_passes_compile_and_their_arithmetic_does_not_obey_the_flags(
    grad: str, buffer: str, weight: str, stack: str
) -> None:
    """float64 is for the sum of squares alone: squares, sums, a root and a quotient."""
    nvrtc = pytest.importorskip("tests.kernels.test_nvrtc")
    kernel = kernels.Kernel(grad, buffer, weight, stack, 4096.0 if stack == "float16" else 1.0, True)
    for architecture in (75, 90, 120):
        if architecture not in nvrtc.ARCHITECTURES:
            continue
        ptx, log = nvrtc.compile_text(kernels.source(kernel), architecture)
        assert set(re.findall(r"(?:warning|error) #(\d+)", log)) <= {nvrtc.UNUSED}, log
        double = {line.split()[0] for line in nvrtc.foreign(ptx, False) if ".f64" in line}
        assert not [line for line in nvrtc.foreign(ptx, False) if ".f64" not in line]
        assert {name.split(".")[0] for name in double} <= {
            "mov",
            "add",
            "mul",
            "sqrt",
            "div",
            "rcp",
            "cvt",
            "ld",
            "st",
            "setp",
            "selp",
        }
        assert re.findall(r"\.entry\s+(\w+)", ptx) == ["muon_momentum", "muon_input", "muon_apply", "muon_mirror"]
        assert not any(map(int, re.findall(r"(\d+) bytes spill", log)))


def test_arguments_are_packed_as_the_kernel_reads_them() -> None:
    nvrtc = pytest.importorskip("tests.kernels.test_nvrtc")
    text = kernels.source(kernels.Kernel("float32", "float32", "float32", "float16", 4096.0, False))
    nvrtc.compile_text(f"{text}\n{nvrtc.layout('Args', kernels.ARGS)}", 90)
    moved = np.dtype([("g", "u8"), ("b", "u8")])
    with pytest.raises(AssertionError, match=r"offset|size"):
        nvrtc.compile_text(f"{text}\n{nvrtc.layout('Args', moved)}", 90)


@pytest.mark.parametrize("n", [1, 16384, 16385, 2**28])
def test_parts_cover_a_matrix(n: int) -> None:
    count = kernels.parts(n)
    assert 1 <= count <= kernels.PARTS and (count == kernels.PARTS or count * kernels.PART >= n)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("shape", [(1, 7), (33, 200), (64, 128), (257, 1031)])
@pytest.mark.parametrize(
    ("grad", "weight"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "bfloat16")]
)
def test_the_passes_have_the_oracles_bits_on_a_device(grad: str, weight: str, shape: Any, shift: int) -> None:
    """The stack in float32, unit 1: momentum, input and step beside NumPy; gradients at odd addresses too."""
    cupy = pytest.importorskip("cupy")
    rng, n, count = np.random.default_rng(0), shape[0] * shape[1], 3
    words = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
    wide = {"bfloat16": lambda x: (x.astype(np.uint32) << 16).view(np.float32)}

    def numbers(name: str) -> tuple[Any, Any]:
        x = log_uniform(rng, (count, n), -3, 0)
        kept = (x.view(np.uint32) >> 16).astype(np.uint16) if name == "bfloat16" else x.astype(words[name])
        return kept, wide.get(name, lambda w: w.astype(np.float32))(kept)

    (g_kept, g), (p_kept, p), (b, _) = numbers(grad), numbers(weight), numbers("float32")
    room = [cupy.zeros(n + shift, g_kept.dtype) for _ in range(count)]
    for there, here in zip(room, g_kept, strict=True):
        there[shift:] = cupy.asarray(here)
    buffers, weights = [cupy.asarray(x) for x in b], [cupy.asarray(x) for x in p_kept]
    stack, sums = cupy.zeros((count, n), np.float32), cupy.zeros((count, kernels.parts(n)))
    addresses = [
        kernels.Matrix(g.data.ptr + shift * g.itemsize, b.data.ptr, p.data.ptr)
        for g, b, p in zip(room, buffers, weights, strict=True)
    ]
    kernel = kernels.Kernel(grad, "float32", weight, "float32", 1.0, True)
    run = kernels.Passes(kernel, addresses, n, ROW, 1e-7, sums.data.ptr).run
    stream = cupy.cuda.get_current_stream().ptr
    run("momentum", stack.data.ptr, stream)
    run("input", stack.data.ptr, stream)
    new = ROW[0] * b + ROW[1] * g
    same_bits(cupy.asnumpy(cupy.stack(buffers)), new, "B")
    Z = ROW[1] * g + ROW[0] * new
    norm = np.sqrt((Z.astype(np.float64) ** 2).sum(1))
    X = cupy.asnumpy(stack)
    np.testing.assert_allclose(X, Z / norm[:, None], rtol=1e-6)
    run("apply", stack.data.ptr, stream)
    want = p * ROW[2] - ROW[3] * X
    got = cupy.asnumpy(cupy.stack(weights))
    if weight == "bfloat16":
        want = bf16.encode(want.reshape(-1)).codes.reshape(want.shape)
    same_bits(got, want.astype(got.dtype), "p")
