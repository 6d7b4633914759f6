"""`nf4.cu` behind CuPy: NF4 and FP4 weights, their scales coded or not, to numbers in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from refopt_cuda.codecs import named
from refopt_cuda.kernels import build, step_cuda

__all__ = ["Kernel", "decode", "source", "tables"]

THREADS, AT_ONCE, RESIDENT = 256, 4, 4
"""Threads a block, eights that each takes, and blocks that a multiprocessor holds at least."""
PER_BLOCK = THREADS * AT_ONCE * 8
STORE = "st.global.cs"
"""How numbers are written: as what is not soon read again."""
LARGEST = 2**35
"""Elements of an array, at most: eights are counted in 32 bits."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: "nf4" or "fp4", whether the scales are coded, elements of a block (a power of two, 8 or more), and
    the number format of what is written ("float32", "bfloat16", "float16")."""

    stem: str
    nested: bool
    block: int
    number: str

    def __post_init__(self) -> None:
        if not fits(self.block):
            raise ValueError(f"nf4.Kernel: block must be a power of two, 8 or more, got {self.block}")


def fits(block: int) -> bool:
    """Whether eight neighbours always share a scale that a shift finds."""
    return block >= 8 and block & (block - 1) == 0


def defines(kernel: Kernel) -> str:
    """What the text is put together for."""
    names = {"OUT": kernel.number, "NESTED": int(kernel.nested), "SHIFT": kernel.block.bit_length() - 1}
    names |= {"AT_ONCE": AT_ONCE, "BLOCKS": RESIDENT, "GIVE": f'"{STORE}"'}
    return "\n".join(f"#define {name} {value}" for name, value in names.items())


def source(kernel: Kernel) -> str:
    """The whole text; its entry is `nf4_decode`."""
    files = ("kernels/arith.cuh", "codecs/bf16.cuh", "kernels/access.cuh", "kernels/formats.cuh")
    return "\n".join([defines(kernel), *map(build._text, files), build._text("kernels/nf4.cu")])


def tables(stem: str) -> np.ndarray:
    """The base's sixteen values by code, then the 256 of dynamic8, float32."""
    forms = named(stem), named("dynamic8")
    return np.concatenate([form.module.tables(**form.options)[0] for form in forms])


@cache
def _ready(kernel: Kernel, device: int) -> tuple[Any, Any]:
    """The function, and its tables on the device."""
    cupy = step_cuda._cupy()
    with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True) as stream:
        module = cupy.RawModule(code=source(kernel), options=build.OPTIONS, backend="nvrtc")
        words = cupy.asarray(tables(kernel.stem))
        stream.synchronize()
        return module.get_function("nf4_decode"), words


def decode(kernel: Kernel, at: tuple[int, int, int, int], out: int, n: int, stream: int) -> None:
    """Enqueue on the current device: n weights, in the format of the kernel, to address `out`.

    at    addresses of codes, scales and, where these are coded, scales2 and offset (else 0)
    """
    if not 0 <= n < LARGEST:
        raise ValueError(f"nf4.decode: 0 to 2^35 - 1 elements, got {n}")
    if n == 0:
        return
    function, words = _ready(kernel, step_cuda._cupy().cuda.Device().id)
    with step_cuda.on_stream(stream):
        function(
            (-(-n // PER_BLOCK),),
            (THREADS,),
            (*map(np.uint64, at), np.uint64(words.data.ptr), np.uint64(out), np.uint64(n)),
        )
