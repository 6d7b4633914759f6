"""Arrays of NumPy, CuPy and torch, and anything with DLPack, as the kernels see them: an address, a shape, a format."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from refopt.spec import ShapeError

__all__ = ["Handle", "empty", "handle"]

NUMBERS = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "uint16": "bfloat16"}
"""Formats by the name of a dtype; NumPy and CuPy may hold bfloat16 as its uint16 words."""
CUDA, CPU = 2, 1
"""Device types of DLPack."""


@dataclass(frozen=True)
class Handle:
    """One array: the library that it is of, itself, its address and shape, and its device (None: host memory)."""

    package: str
    array: Any
    address: int
    shape: tuple[int, ...]
    dtype: str
    device: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def number(self) -> str:
        """Its number format, as the kernels call it."""
        return NUMBERS[self.dtype]

    def words(self) -> np.ndarray:
        """Host memory as NumPy sees it; bfloat16 as uint16 words."""
        a = self.array
        if self.package == "torch":
            torch = sys.modules["torch"]
            a = a.detach()
            a = (a.view(torch.uint16) if a.dtype == torch.bfloat16 else a).numpy()
        return a.view(np.uint16) if a.dtype.name == "bfloat16" else a

    @property
    def stream(self) -> int:
        """The stream that its library works on now."""
        if self.package == "torch":
            return sys.modules["torch"].cuda.current_stream(self.device).cuda_stream
        return sys.modules["cupy"].cuda.get_current_stream().ptr

    def on_device(self) -> AbstractContextManager[Any]:
        """Its device as the current one."""
        if self.device is None:
            return nullcontext()
        if self.package == "torch":
            return sys.modules["torch"].cuda.device(self.device)
        return sys.modules["cupy"].cuda.Device(self.device)


def handle(x: Any, call: str, name: str, numbers: bool = True) -> Handle:
    """What a kernel needs of `x`. TypeError for what is no array or, if `numbers`, no float32, float16 or bfloat16;
    ValueError for one that is not row-major."""
    found = _torch(x) or _cupy(x) or _numpy(x) or _foreign(x)
    if found is None:
        raise TypeError(
            f"{call}: {name} must be an array of NumPy, CuPy or torch or have DLPack, got {type(x).__name__}"
        )
    made, contiguous = found
    if numbers and made.dtype not in NUMBERS:
        raise TypeError(f"{call}: {name} must be float32, float16 or bfloat16, got {made.dtype}")
    if not contiguous:
        raise ValueError(f"{call}: {name} must be row-major without gaps")
    return made


def like(one: Handle, other: Handle, call: str, names: str) -> None:
    """ShapeError or ValueError where two arrays do not go together."""
    if one.shape != other.shape:
        raise ShapeError(f"{call}: {names} have shapes {one.shape} and {other.shape}")
    if one.device != other.device:
        raise ValueError(f"{call}: {names} are on devices {one.device} and {other.device}")


def empty(shape: tuple[int, ...], dtype: np.dtype | str, near: Handle) -> Any:
    """A new array of the same library on the same device; "bfloat16" is uint16 words in NumPy and CuPy."""
    name = np.dtype(dtype).name if dtype != "bfloat16" else "bfloat16"
    if near.package == "torch":
        torch = sys.modules["torch"]
        kind = torch.bfloat16 if name in ("bfloat16", "uint16") else getattr(torch, name)
        return torch.empty(shape, dtype=kind, device=near.array.device)
    plain = np.uint16 if name == "bfloat16" else np.dtype(name)
    return (np if near.package == "numpy" else sys.modules["cupy"]).empty(shape, plain)


def _torch(x: Any) -> tuple[Handle, bool] | None:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return None
    device = x.device.index if x.is_cuda else None
    name = str(x.dtype).removeprefix("torch.")
    return Handle("torch", x, x.data_ptr(), tuple(x.shape), name, device), x.is_contiguous()


def _cupy(x: Any) -> tuple[Handle, bool] | None:
    cupy = sys.modules.get("cupy")
    if cupy is None or not isinstance(x, cupy.ndarray):
        return None
    return Handle("cupy", x, x.data.ptr, tuple(x.shape), x.dtype.name, x.device.id), bool(x.flags.c_contiguous)


def _numpy(x: Any) -> tuple[Handle, bool] | None:
    if not isinstance(x, np.ndarray):
        return None
    return Handle("numpy", x, x.ctypes.data, x.shape, x.dtype.name, None), x.flags.c_contiguous


def _foreign(x: Any) -> tuple[Handle, bool] | None:
    if not hasattr(x, "__dlpack__"):
        return None
    if x.__dlpack_device__()[0] == CUDA:
        import cupy

        return _cupy(cupy.from_dlpack(x))
    return _numpy(np.from_dlpack(x))
