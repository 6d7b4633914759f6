"""Sums of squares of gradients in the canonical order, for the norm over all of them that clipping asks for.

On a device they are the first two passes of `whole.cu` under a rule that updates nothing; the loops of `whole_host`
take the same sums on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refopt_cuda.kernels import whole_cuda, whole_host
from refopt_cuda.kernels.whole_cut import Cut
from refopt_cuda.kernels.whole_rules import Rows, Steps

__all__ = ["NORM", "PLAIN", "gradient_factor", "square", "squares"]


@dataclass(frozen=True)
class Norm:
    """The sum of squares under the attributes of a form of a whole-tensor rule."""

    stem = name = "norm"
    functor = "squared_norm"
    elements = ("none",)
    factors = ("square",)
    factored = False
    sums = 1
    scalars = ("gs",)
    passes = ("sums0", "finish0")
    source = "kernels/norm.cuh"

    def make(self, o: Any) -> Steps:
        """The gradient itself is what is squared and summed."""
        zero = np.float32(0)

        @o.jit
        def sums(p, g, x, inverse, vector, s):
            return g, zero

        return Steps(sums, (), None)  # type: ignore[arg-type]

    def blocks(self, shape: tuple[int, ...], hyper: Mapping[str, Any]) -> int:
        """One sum a tensor."""
        return 1


NORM: Any = Norm()
PLAIN = Rows(np.ones(1, np.float32), np.zeros(0))
"""Gradients are measured as they are."""


def gradient_factor(factor: float, total: float | None = None, longest: float = 0.0) -> float:
    """What gradients are multiplied by so that their norm, times `factor`, is `longest` at most; `total` is the sum of
    their squares, None where nothing is cut. A norm of NaN makes NaN, one of Inf makes 0."""
    if total is None:
        return factor
    cut = longest / (abs(factor) * math.sqrt(total) + 1e-6)
    return factor if cut > 1.0 else factor * cut


def square(g: np.ndarray, shape: tuple[int, ...]) -> float:
    """R of the squares of one gradient: float32, float16, or words of bfloat16, row-major; float64."""
    cut, word = Cut.of(NORM, shape, {}), whole_host.NUMBERS[g.dtype.name]
    return whole_host.square(NORM, cut, g, word) if cut.n else 0.0


def squares(
    kind: tuple[str, tuple[tuple[int, ...], ...]], addresses: Sequence[int], device: whole_cuda.Device | None = None
) -> Callable[[Sequence[int], int], None]:
    """`run(grads, stream)` on the current device, or on another: the sums of gradients of a dtype and of these shapes,
    each to its address (of a float64)."""
    dtype, shapes = kind
    whole = whole_cuda.Whole(NORM, {}, "float32", dtype, device)
    whole.bind([whole_cuda.Tensor(0, {"square": a}, s) for a, s in zip(addresses, shapes, strict=True)])
    return lambda grads, stream: whole.run(grads, [PLAIN], None, stream)
