"""What benchmarks step: shapes of real models, and weights and gradients of these shapes on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from refopt import memory, models

Shape = tuple[int, ...]
FLAT = 2**28
RANK = 16
WORDS = {torch.bfloat16: "", torch.float32: "-f32", torch.float16: "-f16"}


@dataclass(frozen=True)
class Work:
    """Tensors that are stepped together. `fresh`: gradients are new tensors at other addresses in every step."""

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.bfloat16
    fresh: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return sum(map(math.prod, self.shapes))

    def of(self, dtype: torch.dtype) -> Work:
        """The same shapes in another dtype, which the name then says."""
        return replace(self, name=self.name + WORDS[dtype], dtype=dtype)

    def matrices(self) -> Work:
        """Without vectors: what Muon and GaLore take."""
        return replace(self, shapes=tuple(s for s in self.shapes if len(s) == 2))

    def smaller(self, by: int) -> Work:
        """Every side divided, for trying a script where there is no GPU."""
        return self if by == 1 else replace(self, shapes=tuple(tuple(max(16, n // by) for n in s) for s in self.shapes))


def llama1b() -> Work:
    """Every tensor of Llama-3.2-1B: 146, 1,235.8M elements."""
    return Work("llama1b", tuple(models.named("llama-3.2-1b").shapes))


def lora7b() -> Work:
    """Adapters of rank 16, A (16, in) and B (out, 16), on every linear of Llama-2-7B: 448, 40.0M elements."""
    return Work("lora7b", tuple(memory.adapters(models.named("llama-2-7b"), RANK)), fresh=True)


def block1b() -> Work:
    """The seven matrices of one block of Llama-3.2-1B."""
    return Work("llama1b-block", tuple(models.named("llama-3.2-1b").linears()[:7]))


def flat(n: int = FLAT) -> Work:
    """One vector."""
    return Work(f"flat{count(n)}", ((n,),))


def rows(columns: int, n: int = FLAT) -> Work:
    """One matrix of about n elements with rows of so many."""
    return Work(f"rows{columns}", ((n // columns, columns),))


def count(n: int) -> str:
    """1048576: 1m; 2**28: 268m; 2**32: 4b."""
    million = n / 1e6
    return f"{million:.0f}m" if million < 1000 else f"{million / 1000:.0f}b"


def parameters(work: Work, device: str, seed: int = 0) -> list[torch.nn.Parameter]:
    """Normal weights, each with a gradient of about a thousandth, in the dtype of the work."""
    draw = torch.Generator(device).manual_seed(seed)
    out = []
    for shape in work.shapes:
        p = torch.nn.Parameter(torch.empty(shape, dtype=work.dtype, device=device).normal_(generator=draw))
        p.grad = torch.empty_like(p).normal_(0, 1e-3, generator=draw)
        out.append(p)
    return out


def reallocate(params: Sequence[torch.nn.Parameter]) -> None:
    """Every gradient copied to another address; the old ones are freed only when all copies are made."""
    new = [p.grad.clone() for p in params if p.grad is not None]
    for p, g in zip(params, new, strict=True):
        p.grad = g


def deaden(params: Sequence[torch.nn.Parameter]) -> None:
    """No gradient any more for every fifth row of every matrix."""
    for p in params:
        if p.ndim == 2 and p.grad is not None:
            p.grad[::5] = 0
