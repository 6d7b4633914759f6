"""The raw CUDA kernels behind CuPy: one `Launch` is one kernel launch over any number of tensors.

A launch knows pointers and shapes, not arrays: it serves torch, CuPy or anything else that can name a device address.
What stays between steps (parameters and states) is a table on the device; what changes each step (gradients and
scalars) travels as kernel arguments, so a step copies nothing and waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refopt_cuda.codecs import dynamic8
from refopt_cuda.kernels import build
from refopt_cuda.rules import RULES, Form, named

SIZES = (64, 512, 3072)
"""Kernels are compiled for at most this many tensors a launch; arguments of up to 32 KiB need CUDA 12.1 or newer."""
ROWS = 8
"""Different rows of scalars (step counts) that one launch can hold."""
UNIT = 8
"""Blocks that a warp takes at a time."""


SKIP = 1
"""In place of a gradient's address: leave this tensor alone."""


class Tensor(NamedTuple):
    """One parameter: device addresses of p and of (codes, scales) of each state (scales 0 if none), and its shape."""

    p: int
    states: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "refopt_cuda: CUDA tensors need CuPy, which is not installed: pip install 'refopt[cuda13]' (or cuda12)"
        ) from error
    return cupy


@cache
def _tables(device: int) -> Any:
    """The dynamic map on a device: 256 signed values, 256 unsigned, then both encode tables, as 32-bit words."""
    cupy = _cupy()
    values = [dynamic8.codebook(unsigned).view(np.uint32) for unsigned in (False, True)]
    buckets = [dynamic8.encode_table(unsigned) for unsigned in (False, True)]
    with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True) as stream:
        table = cupy.asarray(np.concatenate([*values, *buckets]))
        stream.synchronize()  # launches on any stream read it; none of them is waited for
    return table


@cache
def _compiled(kernel: build.Kernel, device: int) -> tuple[Any, int]:
    """The function on this device and the number of thread blocks that fill it."""
    cupy = _cupy()
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=build.source(kernel), options=build.OPTIONS, backend="nvrtc")
        function = module.get_function("refopt_step")
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        room = properties["sharedMemPerBlockOptin"]
        if kernel.shared > room:
            raise RuntimeError(
                f"refopt_cuda: dynamic8 keeps {kernel.shared} bytes of tables in shared memory, "
                f"{properties['name'].decode()} has {room} a block: take another codec (int8_linear, bf16, f32)"
            )
        if kernel.shared:
            function.max_dynamic_shared_size_bytes = kernel.shared
        count = properties["multiProcessorCount"]
    return function, count


@cache
def on_stream(handle: int) -> Any:
    """CuPy's view of a stream that another library owns."""
    cuda = _cupy().cuda
    if not hasattr(cuda.Stream, "from_external"):
        return cuda.ExternalStream(handle)
    foreign = type("Foreign", (), {"__cuda_stream__": lambda self: (0, handle)})
    return cuda.Stream.from_external(foreign())


class Launch:
    """One kernel for tensors of equal number formats and codecs; `bind` them once, `run` it every step.

    rule             a form of `refopt_cuda.rules`, or a stem: its plainest form with as many states as codecs
    codecs           a codec's stem for each state in the rule's order
    p_dtype, g_dtype "float32", "bfloat16" or "float16"
    block            elements that share a scale; 256 is the fast path, other sizes go element by element
    """

    def __init__(self, rule: str | Form, codecs: tuple[str, ...], p_dtype: str, g_dtype: str, block: int = 256) -> None:
        form = named(rule, len(codecs))
        if form is None:
            raise ValueError(f"Launch: {rule} does not keep {len(codecs)} states, got codecs {codecs}")
        self.form, self.block = form, block
        self.codecs = tuple((c, not n) for c, (_, n) in zip(codecs, form.states, strict=True))
        self.p_dtype, self.g_dtype = p_dtype, g_dtype
        self.scalars = len(RULES[form.stem].SCALARS)
        self.count = self.units = 0
        self._kernel(SIZES[0])

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Fix the parameters and states that the launch works on (current device): ~100 bytes a tensor are copied."""
        cupy = _cupy()
        if not 0 < len(tensors) <= SIZES[-1]:
            raise ValueError(f"Launch.bind: 1 to {SIZES[-1]} tensors fit a launch, got {len(tensors)}")
        self.device = cupy.cuda.Device().id
        self.size = next(s for s in SIZES if s >= len(tensors))
        table, self.units = self._table(tensors)
        self.count, self.bound = len(tensors), tuple(tensors)
        self.table = cupy.asarray(table.view(np.uint8))
        self.lookup = _tables(self.device)
        self.ways: dict[int, tuple[Any, ...]] = {}

    def _way(self, rows: int) -> tuple[Any, ...]:
        """(function, grid, threads, shared bytes, arguments) of the kernel that holds this many rows of scalars."""
        if rows not in self.ways:
            kernel = self._kernel(self.size, rows)
            function, grid = _compiled(kernel, self.device)
            args = np.zeros(1, self._args_type(self.size, rows))
            args["tensors"], args["values"] = self.table.data.ptr, self.lookup.data.ptr
            args["units"], args["count"] = self.units, self.count
            grid = min(grid, -(-self.units * UNIT // (kernel.threads // 32)))
            self.ways[rows] = ((grid,), (kernel.threads,), function, kernel.shared, args)
        return self.ways[rows]

    def _kernel(self, tensors: int, rows: int = 1) -> build.Kernel:
        return build.Kernel(self.form, self.codecs, self.p_dtype, self.g_dtype, self.block, tensors, rows)

    @staticmethod
    def _args_type(size: int, rows: int) -> np.dtype:
        fields = [("tensors", "u8"), ("values", "u8"), ("units", "u4"), ("count", "u4"), ("scalars", "f4", (rows, 16))]
        return np.dtype([*fields, ("which", "u1", (size,)), ("g", "u8", (size,))], align=True)

    def _table(self, tensors: Sequence[Tensor]) -> tuple[np.ndarray, int]:
        kept = max(len(self.codecs), 1)
        head = [("first", "u4"), ("whole", "u4"), ("per", "u4"), ("aligned", "u4"), ("p", "u8"), ("row", "i8")]
        tail = [("states", "u8", (kept, 2)), ("n", "i8"), ("blocks", "u4"), ("unused", "u4")]
        table = np.zeros(len(tensors) + 1, np.dtype([*head, *tail]))
        first = 0
        for entry, t in zip(table, tensors, strict=False):
            n, row, per, count = self._blocks(t.shape)
            units = -(-count // UNIT)
            if first + units >= 2**29:
                raise ValueError(f"Launch.bind: {first + units} units of {UNIT} blocks; at most 2^29 - 1 fit a launch")
            entry["first"], entry["blocks"], entry["per"] = first, count, per
            entry["p"], entry["n"], entry["row"] = t.p, n, row
            for j, state in enumerate(t.states):
                entry["states"][j] = state
            entry["aligned"] = all(a % 16 == 0 for a in (t.p, *(codes for codes, _ in t.states)))
            entry["whole"] = n // self.block if not per and entry["aligned"] else 0
            first += units
        table["first"][-1] = first
        return table, first

    def _blocks(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(elements, elements a row, blocks a row or 0 where all rows are whole blocks, blocks)."""
        n = math.prod(shape)
        if n >= 2**35:
            raise ValueError(f"Launch.bind: a tensor has {n} elements; at most 2^35 - 1 are addressed")
        row = shape[-1] if len(shape) >= 2 and shape[-1] >= 16 else n
        if n == 0 or row % self.block == 0 or row == n:
            return n, row, 0, -(-n // self.block)
        if row > 2**32:
            raise ValueError(f"Launch.bind: rows of {row} elements; at most 2^32, or whole blocks, are addressed")
        per = -(-row // self.block)
        return n, row, per, n // row * per

    def run(self, grads: Sequence[int], scalars: np.ndarray, which: Sequence[int] | None, stream: int) -> None:
        """Enqueue one step on `stream` (a cudaStream_t).

        grads    the device address of each tensor's gradient, at any alignment; `SKIP` leaves that tensor alone
        scalars  float32 (rows, len(SCALARS)), at most `ROWS` rows
        which    each tensor's row; None where there is one
        """
        rows, width = scalars.shape
        if rows > ROWS or width != self.scalars or len(grads) != self.count:
            raise ValueError(f"Launch.run: {len(grads)} gradients for {self.count} tensors, scalars {scalars.shape}")
        if not self.units:
            return
        grid, threads, function, shared, args = self._way(1 if rows == 1 else ROWS)
        args["scalars"][0, :rows, :width] = scalars
        args["g"][0, : self.count] = grads
        if which is not None:
            args["which"][0, : self.count] = which
        with on_stream(stream):
            function(grid, threads, (args,), shared_mem=shared)
