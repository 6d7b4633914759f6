"""refopt_cuda: the fast path. torch.optim drop-ins over raw CUDA kernels on a GPU and Numba loops on a CPU.

Importing this package needs NumPy alone; `refopt_cuda.optim` and `refopt_cuda.nn` need torch and Numba, and CuPy for
CUDA tensors. Without torch there are `quantize`, `dequantize`, `init` and `step`, on arrays of NumPy, CuPy or anything
with DLPack.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refopt_cuda import convert as convert
    from refopt_cuda import nn as nn
    from refopt_cuda import optim as optim
    from refopt_cuda.functional import init as init
    from refopt_cuda.functional import step as step
    from refopt_cuda.quantization import Quantized as Quantized
    from refopt_cuda.quantization import dequantize as dequantize
    from refopt_cuda.quantization import quantize as quantize

__all__ = ["Quantized", "convert", "dequantize", "init", "nn", "optim", "quantize", "step"]

NEEDS = {"optim": ("torch", "numba"), "nn": ("torch", "numba"), "convert": ("torch", "numba")}
FUNCTIONS = {"quantize": "quantization", "dequantize": "quantization", "Quantized": "quantization"}
FUNCTIONS |= {"init": "functional", "step": "functional"}


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return getattr(importlib.import_module(f"refopt_cuda.{FUNCTIONS[name]}"), name)
    if name not in NEEDS:
        raise AttributeError(f"module 'refopt_cuda' has no attribute {name!r}; it has {', '.join(__all__)}", name=name)
    try:
        return importlib.import_module(f"refopt_cuda.{name}")
    except ModuleNotFoundError as error:
        if error.name not in NEEDS[name]:
            raise
        raise ModuleNotFoundError(
            f"refopt_cuda.{name} needs {error.name}, which is not installed: pip install 'refopt[torch,numba]'",
            name=error.name,
        ) from error
