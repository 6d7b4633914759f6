"""The kernels of whole.cu on the host: g++ builds their text behind an emulated grid, and the launcher launches that.

Nothing but loads, stores and the instructions of arith.cuh is replaced: the passes, the order of every sum, the table
of tensors and the arguments are those of a GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refopt_cuda.kernels import whole_build as build

OPTIONS = (
    "-O1",
    "-std=c++17",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-w",
)
HEAD = Path(__file__).with_suffix(".hpp")


class Emulated:
    """A device of host memory, with a grid of a few blocks."""

    def __init__(self, gxx: str, folder: Path, blocks: int = 2) -> None:
        self.gxx, self.folder, self.blocks = gxx, folder, blocks
        self.built: dict[tuple[build.Kernel, str], ctypes.CDLL] = {}

    def upload(self, array: np.ndarray) -> Any:
        held = self.allocate(array.nbytes)
        held[:] = array.view(np.uint8)
        return held

    def allocate(self, count: int) -> Any:
        room = np.full(count + 16, 0xFF, np.uint8)  # NaN where nothing has been written
        return room[-room.ctypes.data % 16 :][:count]

    def address(self, held: Any) -> int:
        return held.ctypes.data

    def launcher(self, kernel: build.Kernel) -> Callable[[str, int, Any, int], None]:
        library = self.library(kernel)

        def launch(entry: str, items: int, arguments: Any, stream: int) -> None:
            getattr(library, entry)(ctypes.c_void_p(arguments.ctypes.data), ctypes.c_uint(min(self.blocks, items)))

        return launch

    def library(self, kernel: build.Kernel, more: str = "") -> ctypes.CDLL:
        """The kernel's text, with `more` behind it, as a loaded library."""
        if (kernel, more) not in self.built:
            name = f"whole_{len(self.built)}"
            inline = "#undef HD\n#define HD inline\n"  # the functors' functions say `static` themselves
            arith, tail = _split(kernel)
            source = self.folder / f"{name}.cpp"
            source.write_text("\n".join([arith, inline, tail, f'#include "{HEAD}"', build.template(kernel), more]))
            library = source.with_suffix(".so")
            done = subprocess.run([self.gxx, *OPTIONS, str(source), "-o", str(library)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
            self.built[kernel, more] = ctypes.CDLL(str(library))
        return self.built[kernel, more]


def _split(kernel: build.Kernel) -> tuple[str, str]:
    """The arithmetic, and the functors behind it."""
    arith = build.text("kernels/arith.cuh")
    return arith, build.functors(kernel)[len(arith) :]
