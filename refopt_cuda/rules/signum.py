"""Signum, and signSGD without its momentum (Bernstein et al., arXiv:1802.04434, algorithms 2 and 1), one element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row

SCALARS = ("gs", "lr", "decay", "beta", "omb", "wd")
STATES = (("m", False, "beta"),)
OPTIONS = {"beta": (True, False), "decay_order": ("before", "after", "additive")}


def scalars(
    t: int,
    *,
    lr: float,
    beta: float = 0.9,
    wd: float = 0.0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of a step, in the order of `SCALARS`; the same for every `t`."""
    return row(gradient_scale(gscale, maximize), lr, 1.0 - lr * wd, beta, 1.0 - beta, wd)


def make(o: Any, beta: bool = True, decay_order: str = "before") -> Callable:
    """`step(p, g, x, s) -> (p, x)` over the arithmetic `o`; x is `(m,)`, or `()` for beta = 0."""
    mul, add, sub, sgn, momentum = o.mul, o.add, o.sub, o.sgn, beta
    before, after, additive = (decay_order == order for order in OPTIONS["decay_order"])

    @o.jit
    def step(p, g, x, s):
        gs, lr, decay, beta, omb, wd = s
        g = mul(g, gs)
        if before:
            p = mul(p, decay)
        c, y = g, x
        if momentum:
            c = add(mul(beta, x[0]), mul(omb, g))
            y = (c,)
        u = sgn(c)
        if additive:
            u = add(u, mul(wd, p))
        p = sub(p, mul(lr, u))
        return mul(p, decay) if after else p, y

    return step
