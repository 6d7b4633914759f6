"""Lion (Chen et al., arXiv:2302.06675, algorithm 2), one element: two betas, and sgn(0) = sgn(NaN) = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row

SCALARS = ("gs", "lr", "decay", "beta1", "omb1", "beta2", "omb2")
STATES = (("m", False),)


def scalars(
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    wd: float = 0.0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of a step, in the order of `SCALARS`; the same for every `t`."""
    gs = gradient_scale(gscale, maximize)
    return row(gs, lr, 1.0 - lr * wd, beta1, 1.0 - beta1, beta2, 1.0 - beta2)


def make(o: Any) -> Callable:
    """`step(p, g, (m,), s) -> (p, (m,))` over the arithmetic `o`."""
    mul, add, sub, sgn = o.mul, o.add, o.sub, o.sgn

    @o.jit
    def step(p, g, x, s):
        gs, lr, decay, beta1, omb1, beta2, omb2 = s
        (m,) = x
        g = mul(g, gs)
        p = mul(p, decay)
        c = add(mul(beta1, m), mul(omb1, g))
        p = sub(p, mul(lr, sgn(c)))
        m = add(mul(beta2, m), mul(omb2, g))
        return p, (m,)

    return step
