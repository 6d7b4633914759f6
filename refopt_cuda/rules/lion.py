"""Lion (Chen et al., arXiv:2302.06675, algorithm 2), one element: two betas, and sgn(0) = sgn(NaN) = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row

SCALARS = ("gs", "lr", "decay", "beta1", "omb1", "beta2", "omb2", "wd")
STATES = (("m", False),)
OPTIONS = {"decay_order": ("before", "after", "additive")}


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
    return row(gs, lr, 1.0 - lr * wd, beta1, 1.0 - beta1, beta2, 1.0 - beta2, wd)


def make(o: Any, decay_order: str = "before") -> Callable:
    """`step(p, g, (m,), s) -> (p, (m,))` over the arithmetic `o`."""
    mul, add, sub, sgn = o.mul, o.add, o.sub, o.sgn
    before, after, additive = (decay_order == order for order in OPTIONS["decay_order"])

    @o.jit
    def step(p, g, x, s):
        gs, lr, decay, beta1, omb1, beta2, omb2, wd = s
        (m,) = x
        g = mul(g, gs)
        if before:
            p = mul(p, decay)
        u = sgn(add(mul(beta1, m), mul(omb1, g)))
        if additive:
            u = add(u, mul(wd, p))
        p = sub(p, mul(lr, u))
        m = add(mul(beta2, m), mul(omb2, g))
        return mul(p, decay) if after else p, (m,)

    return step
