"""The kernels of step.cu on the host: g++ builds their text behind an emulated grid, and a launch's table is the GPU's.

Nothing but loads, stores and a GPU's own instructions is replaced: tiles, pieces, what the lanes of a warp tell each
other, the table of tensors and the arguments are those of a GPU.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refopt_cuda.kernels import build
from refopt_cuda.kernels.step_cuda import ROWS, SIZES, Launch
from tests.kernels.gpu_step import Device
from tests.kernels.whole_emulator import OPTIONS

HEAD = Path(__file__).with_suffix(".hpp")
THREADS = 256
"""Of a block: what grid.hpp has."""
ENTRY = """
extern "C" void run(const Args* a, unsigned grid) {
    Grid::it().body = [a] { refopt_step(*a); };
    for (unsigned x = 0; x < grid; x++) Grid::it().run(x, grid);
}
"""


class Array:
    """Memory of the host, as CuPy shows that of a device; its address is a multiple of 256."""

    def __init__(self, words: np.ndarray) -> None:
        words = np.ascontiguousarray(words)
        room = np.full(words.nbytes + 512, 0xA5, np.uint8)
        at = -room.ctypes.data % 256
        self.words = room[at : at + words.nbytes].view(words.dtype).reshape(words.shape)
        self.words[...] = words
        self.room, self.start, self.end = room, at, at + words.nbytes
        self.ptr, self.data = self.words.ctypes.data, self

    def get(self) -> np.ndarray:
        beyond = np.concatenate([self.room[: self.start], self.room[self.end :]])
        assert (beyond == 0xA5).all(), "something was written beside an array"
        return self.words


class Host(Device):
    """What runs a launch: a grid of a few blocks, on host memory."""

    def __init__(self, gxx: str, folder: Path, blocks: int = 2) -> None:
        self.gxx, self.folder, self.blocks = gxx, folder, blocks
        self.built: dict[build.Kernel, ctypes.CDLL] = {}
        self.arrays: weakref.WeakSet[Array] = weakref.WeakSet()

    def upload(self, words: np.ndarray) -> Any:
        array = Array(words)
        self.arrays.add(array)
        return array

    def bind(self, launch: Launch, tensors: Any) -> None:
        table, launch.units, launch.ragged = launch._table(tensors)
        launch.size, launch.count, launch.table = SIZES[0], len(tensors), self.upload(table.view(np.uint8))

    def run(self, launch: Launch, grads: list[int], scalars: np.ndarray, which: list[int], random: list[int]) -> None:
        rows = 1 if len(scalars) == 1 else ROWS
        kernel = replace(launch._kernel(launch.size, rows), ragged=launch.ragged)
        args = np.zeros(1, launch._args_type(launch.size, rows))
        words = self.upload(kernel.lookup.words if kernel.shared else np.zeros(1, np.uint32))
        args["tensors"], args["tables"], args["units"], args["count"] = (
            launch.table.ptr,
            words.ptr,
            launch.units,
            launch.count,
        )
        launch._fill(args, grads, scalars, which, random)
        bounds = np.sort([at for x in self.arrays for at in (x.ptr, x.ptr + x.words.nbytes)]).astype(np.uint64)
        self.library(kernel).allow(ctypes.c_void_p(bounds.ctypes.data), len(bounds))
        self.library(kernel).run(ctypes.c_void_p(args.ctypes.data), ctypes.c_uint(self.blocks))

    def library(self, kernel: build.Kernel) -> ctypes.CDLL:
        """The kernel's text as a loaded library."""
        if kernel not in self.built:
            source = self.folder / f"step_{len(self.built)}.cpp"
            source.write_text(text(kernel))
            library = source.with_suffix(".so")
            done = subprocess.run([self.gxx, *OPTIONS, str(source), "-o", str(library)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
            self.built[kernel] = ctypes.CDLL(str(library))
        return self.built[kernel]


def text(kernel: build.Kernel) -> str:
    """The kernel's text for g++."""
    found = build.source(kernel)
    arith, access = build._text("kernels/arith.cuh"), build._text("kernels/access.cuh")
    assert found.startswith(arith) and access in found
    inline = "#undef HD\n#define HD inline\n"  # the functors' functions say `static` themselves
    found = arith + inline + found[len(arith) :].replace(access, f'#include "{HEAD}"')
    found = re.sub(r"struct float16_words \{.*?\n\};\n", "", found, flags=re.S)
    found = found.replace("typedef half_words<float16_words> float16;", "")
    found = re.sub(r"#define THREADS \d+", f"#define THREADS {THREADS}", found)
    return found.replace("extern __shared__ char memory[];", "static char memory[1 << 18];") + ENTRY
