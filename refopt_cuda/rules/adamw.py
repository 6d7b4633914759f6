"""AdamW (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2), one element; decay first, as in torch.optim.AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, ipow, row

SCALARS = ("gs", "step", "decay", "beta1", "omb1", "beta2", "omb2", "ir2", "eps")
STATES = (("m", False), ("v", True))


def scalars(
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 1e-2,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of step `t` (counted from 1), in the order of `SCALARS`."""
    bc1, bc2 = 1.0 - ipow(beta1, t), 1.0 - ipow(beta2, t)
    gs, ir2 = gradient_scale(gscale, maximize), 1.0 / math.sqrt(bc2)
    return row(gs, lr / bc1, 1.0 - lr * wd, beta1, 1.0 - beta1, beta2, 1.0 - beta2, ir2, eps)


def make(o: Any) -> Callable:
    """`step(p, g, (m, v), s) -> (p, (m, v))` over the arithmetic `o`."""
    mul, add, sub, rcp, sqrt = o.mul, o.add, o.sub, o.rcp, o.sqrt

    @o.jit
    def step(p, g, x, s):
        gs, step, decay, beta1, omb1, beta2, omb2, ir2, eps = s
        m, v = x
        g = mul(g, gs)
        p = mul(p, decay)
        m = add(mul(beta1, m), mul(omb1, g))
        v = add(mul(beta2, v), mul(omb2, mul(g, g)))
        d = add(mul(sqrt(v), ir2), eps)
        p = sub(p, mul(step, mul(m, rcp(d))))
        return p, (m, v)

    return step
