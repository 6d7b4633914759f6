"""What a rule that sees whole tensors computes for one weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["Steps", "wide"]


class Steps(NamedTuple):
    """Scalar functions of one weight, its gradient `g`, its states `x`, `inverse`, the roots of its rank-1 moments, one
    over each, `k`, four floats of its block, `vector`, whether nothing is factored, and the float32 scalars `s`.

    sums(p, g, x, inverse, vector, s) -> (a, b)              what is squared and summed; 0 where there is one sum
    tiles: tile(g, x, inverse, k, s) -> q                    what rows and columns are summed of, a function a pair
    update(p, g, x, inverse, k, vector, s) -> (p, x)
    """

    sums: Callable | None
    tiles: tuple[Callable, ...]
    update: Callable


def wide(*values: float) -> np.ndarray:
    """The float64 row that sums are finished with."""
    return np.array(values, np.float64)
