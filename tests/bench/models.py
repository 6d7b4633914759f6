"""The workloads of the benchmarks: shapes of real models, and parameters with gradients on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from refopt import models

Shape = tuple[int, ...]


def lora(model: models.Model, rank: int) -> list[Shape]:
    """Adapters of a rank on every linear of a model: A (rank, in) and B (out, rank)."""
    return [shape for out, into in model.linears for shape in ((rank, into), (out, rank))]


WORK: dict[str, list[Shape]] = {
    "llama1b": [tuple(s) for s in models.named("llama-3.2-1b").shapes],
    "lora7b": lora(models.named("llama-2-7b"), 16),
    "flat268m": [(2**28,)],
}
"""1,236M weights in 146 tensors; 40M in 448; 268M in one."""


def size(shapes: Sequence[Shape]) -> int:
    return sum(math.prod(s) for s in shapes)


def parameters(
    shapes: Sequence[Shape], dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> list[torch.nn.Parameter]:
    """Normal weights; gradients a thousandth of them in size, of the same dtype."""
    made = [torch.nn.Parameter(torch.randn(s, device=device).to(dtype)) for s in shapes]
    regrade(made)
    return made


def regrade(params: Sequence[torch.nn.Parameter]) -> None:
    """New gradients in new memory, as a backward pass leaves them."""
    for p in params:
        p.grad = torch.randn(p.shape, device=p.device).mul_(1e-3).to(p.dtype)
