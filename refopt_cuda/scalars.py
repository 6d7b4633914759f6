"""Host scalars of the fast path: float64 in, one rounding to float32 out.

Written apart from the oracle's own on purpose: a function shared by both would hide an off-by-one `t`.
"""

from __future__ import annotations

import numpy as np

__all__ = ["gradient_scale", "ipow", "row", "wide"]


def ipow(base: float, exponent: int) -> float:
    """`base ** exponent` in float64 by binary powering: the same bits on every platform, unlike libm's pow."""
    power = 1.0
    while exponent:
        if exponent & 1:
            power *= base
        base *= base
        exponent >>= 1
    return power


def gradient_scale(gscale: float, maximize: bool) -> float:
    """The factor that every step multiplies its gradient with first; ascent is a negative one."""
    return -gscale if maximize else gscale


def row(*values: float) -> np.ndarray:
    """The float32 row that a step of one tensor reads, in the order of the rule's `SCALARS`."""
    return np.array(values, dtype=np.float64).astype(np.float32)


def wide(*values: float) -> np.ndarray:
    """The float64 row that what is made of a tensor's sums is computed with."""
    return np.array(values, np.float64)
