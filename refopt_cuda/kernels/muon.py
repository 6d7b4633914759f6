"""The passes of `muon.cu` behind CuPy: all that Muon does between its matrix products, over matrices of equal shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refopt_cuda.kernels import build, step_cuda

MATRICES, THREADS = 64, 256
"""Matrices a launch, and threads a block."""
PART, PARTS = 16384, 1024
"""Elements that a block takes at least, and blocks a matrix at most; both fixed, so that no device sums otherwise."""
ARGS = np.dtype(
    [
        *((name, "u8", (MATRICES,)) for name in ("g", "b", "p")),
        *((name, "u8") for name in ("stack", "sums")),
        ("n", "i8"),
        ("eps", "f8"),
        ("live", "u8"),
        ("parts", "u4"),
        ("s", "f4", (5,)),
    ]
)


class Matrix(NamedTuple):
    """Device addresses of one matrix: gradient, momentum and weights, each row-major."""

    g: int
    b: int
    p: int


@dataclass(frozen=True)
class Kernel:
    """Number formats of gradients, momentum, weights and stack; what 1 is in the stack; whether Z looks ahead."""

    grad: str
    buffer: str
    weight: str
    stack: str
    unit: float
    nesterov: bool


def _text(path: str) -> str:
    return (build.ROOT / path).read_text(encoding="utf-8").replace("#pragma once", "")


def defines(kernel: Kernel) -> str:
    """What the text is put together for."""
    names = {
        "GRAD": kernel.grad,
        "BUFFER": kernel.buffer,
        "WEIGHT": kernel.weight,
        "STACK": kernel.stack,
        "UNIT": f"{kernel.unit:.1f}f",
        "NESTEROV": int(kernel.nesterov),
        "MATRICES": MATRICES,
        "THREADS": THREADS,
    }
    return "\n".join(f"#define {name} {value}" for name, value in names.items())


def source(kernel: Kernel) -> str:
    """The whole text; its entries are `muon_momentum`, `muon_input`, `muon_apply` and `muon_mirror`."""
    files = (
        "kernels/arith.cuh",
        "codecs/bf16.cuh",
        "kernels/access.cuh",
        "kernels/formats.cuh",
        "kernels/muon.cuh",
        "kernels/muon.cu",
    )
    return "\n".join([*map(_text, files[:-1]), defines(kernel), _text(files[-1])])


@cache
def _functions(kernel: Kernel, device: int) -> dict[str, Any]:
    cupy = step_cuda._cupy()
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=source(kernel), options=build.OPTIONS, backend="nvrtc")
        return {name: module.get_function(f"muon_{name}") for name in ("momentum", "input", "apply", "mirror")}


def parts(n: int) -> int:
    """Blocks that share a matrix of n elements; as many sums of squares, float64, are kept for it."""
    return min(max(-(-n // PART), 1), PARTS)


class Passes:
    """The three passes over up to `MATRICES` matrices of n elements each; enqueued on a stream, nothing is waited for.

    scalars   float32: mu, 1 - mu, decay, step, gs, what gradients are multiplied by; or the device address of a row
              that `rows_cuda` makes for MUON
    stack     device address of one matrix after the other, n elements each
    sums      device address of `parts(n)` float64 a matrix
    """

    def __init__(
        self,
        kernel: Kernel,
        matrices: Sequence[Matrix],
        n: int,
        scalars: Any,
        eps: float,
        sums: int,
    ) -> None:
        if not 0 < len(matrices) <= MATRICES or not 0 < n < 2**35:
            raise ValueError(f"Passes: 1 to {MATRICES} matrices of 1 to 2^35 - 1 elements, got {len(matrices)} of {n}")
        self.kernel, self.grid = kernel, (parts(n), len(matrices))
        self.args = np.zeros(1, ARGS)
        for name, addresses in zip(Matrix._fields, zip(*matrices, strict=True), strict=True):
            self.args[name][0, : len(matrices)] = addresses
        self.args["n"], self.args["eps"], self.args["sums"] = n, eps, sums
        self.args["parts"] = parts(n)
        self.args["live" if isinstance(scalars, int) else "s"][0] = scalars

    def run(self, name: str, stack: int, stream: int) -> None:
        """Enqueue "momentum", "input" or "apply" on the current device."""
        self.args["stack"] = stack
        function = _functions(self.kernel, step_cuda._cupy().cuda.Device().id)[name]
        with step_cuda.on_stream(stream):
            function(self.grid, (THREADS,), (self.args,))


SIDE = 64
"""Rows and columns of a tile that is mirrored at once."""


def mirror(stack: int, count: int, m: int, number: str, shift: float, stream: int) -> None:
    """Make `count` matrices of m x m symmetric by what is above their diagonals, and add to these; enqueued.

    stack    device address of the matrices, one after the other, row-major
    number   their number format
    """
    function = _functions(Kernel(number, "float32", number, number, 1.0, False), step_cuda._cupy().cuda.Device().id)
    tiles = -(-m // SIDE)
    with step_cuda.on_stream(stream):
        function["mirror"]((tiles, tiles, count), (THREADS,), (np.uint64(stack), np.uint32(m), np.float32(shift)))
