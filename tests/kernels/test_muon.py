"""Muon's passes: their arithmetic on the host and on a device beside the oracle's bits, and that they compile."""

from __future__ import annotations

import ctypes
import re
import subprocess
from itertools import product
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
ROW = np.array([0.85, 1.0 - 0.85, 1.0 - 0.013 * 0.3, 0.013 * (40 / 24) ** 0.5], np.float32)
FUNCTOR = """
#include "kernels/arith.cuh"
#undef HD
#define HD inline
#include "kernels/muon.cuh"
extern "C" void passes(int64_t n, const float* g, const float* x, const float* row, float* b, float* z, float* p) {
    muon::Scalars s;
    std::memcpy(&s, row, sizeof s);
    for (int64_t i = 0; i < n; i++) {
        b[i] = muon::momentum(b[i], g[i], s);
        z[i] = muon::ahead(b[i], g[i], s);
        p[i] = muon::weight(p[i], x[i], s);
    }
}
"""


@pytest.fixture(scope="module")
def passes(gxx: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functor on the host: (g, x, b, p) to new (b, z, p)."""
    folder = tmp_path_factory.mktemp("muon")
    (folder / "muon.cpp").write_text(FUNCTOR)
    command = [gxx, "-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", f"-I{build.ROOT}", "muon.cpp"]
    done = subprocess.run([*command, "-o", "muon.so"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "muon.so"))

    def call(g: Any, x: Any, b: Any, p: Any) -> Any:
        b, p, z = b.copy(), p.copy(), np.empty_like(b)
        library.passes(ctypes.c_int64(g.size), *(ctypes.c_void_p(a.ctypes.data) for a in (g, x, ROW, b, z, p)))
        return b, z, p

    return call


@pytest.mark.gxx
def test_the_functor_has_the_oracles_bits(passes: Any) -> None:
    """Momentum and weights through the rule itself; what is made orthogonal, by its equation."""
    rng = np.random.default_rng(0)
    p, b, g = (log_uniform(rng, (40, 24), *span) for span in ((-3, 0), (-6, 2), (-6, 2)))
    want, state = rules.muon.update(p, g, {"B": b}, t=1, **HYPER)
    Z = ROW[1] * g + ROW[0] * state["B"]
    x = np.ascontiguousarray(orthogonal(Z.astype(np.float64), 5, 1e-7, "floor"), np.float32)
    new_b, z, new_p = passes(g, x, b, p)
    same_bits(new_b, state["B"], "B")
    same_bits(z, Z, "Z")
    same_bits(new_p, want, "p")


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
        assert re.findall(r"\.entry\s+(\w+)", ptx) == ["muon_momentum", "muon_input", "muon_apply"]
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
