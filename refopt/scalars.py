"""Host scalars: everything a rule computes once a step, in float64, rounded to float32 once.

Computing 1 - beta in float32 instead would be off by 1.3e-5 for beta = 0.999, so the order matters: float64 first.
"""

from __future__ import annotations

import numpy as np

f32 = np.float32


def ipow(base: float, t: int) -> float:
    """base**t in float64 by binary powering: the same bits on every machine, which libm's pow is not."""
    r = 1.0
    while t:
        if t & 1:
            r *= base
        base *= base
        t >>= 1
    return r


def sgn(x: np.ndarray) -> np.ndarray:
    """Sign of x as float32: +1, -1, and 0 for +-0 and NaN."""
    return (x > 0).astype(f32) - (x < 0).astype(f32)
