"""refopt_cuda: the fast path. torch.optim drop-ins over raw CUDA kernels on a GPU and Numba loops on a CPU.

Importing this package needs NumPy alone; `refopt_cuda.optim` needs torch and Numba, and CuPy for CUDA tensors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refopt_cuda import optim as optim

__all__ = ["optim"]

NEEDS = {"optim": ("torch", "numba")}


def __getattr__(name: str) -> Any:
    if name not in NEEDS:
        raise AttributeError(f"module 'refopt_cuda' has no attribute {name!r}; it has {', '.join(NEEDS)}")
    try:
        return importlib.import_module(f"refopt_cuda.{name}")
    except ModuleNotFoundError as error:
        if error.name not in NEEDS[name]:
            raise
        raise ModuleNotFoundError(
            f"refopt_cuda.{name} needs {error.name}, which is not installed: pip install 'refopt[torch,numba]'",
            name=error.name,
        ) from error
