"""Adam (Kingma & Ba, arXiv:1412.6980, algorithm 1), one element; coupled decay (L2), as in torch.optim.Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, ipow, row

SCALARS = ("gs", "step", "wd", "beta1", "omb1", "beta2", "omb2", "ir2", "eps", "coupled")
STATES = (("m", False), ("v", True))
ZERO = np.float32(0)


def scalars(
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of step `t` (counted from 1), in the order of `SCALARS`."""
    bc1, bc2 = 1.0 - ipow(beta1, t), 1.0 - ipow(beta2, t)
    gs, ir2 = gradient_scale(gscale, maximize), 1.0 / math.sqrt(bc2)
    return row(gs, lr / bc1, wd, beta1, 1.0 - beta1, beta2, 1.0 - beta2, ir2, eps, np.float32(wd) != 0)


def make(o: Any) -> Callable:
    """`step(p, g, (m, v), s) -> (p, (m, v))` over the arithmetic `o`."""
    mul, add, sub, rcp, sqrt = o.mul, o.add, o.sub, o.rcp, o.sqrt

    @o.jit
    def step(p, g, x, s):
        gs, step, wd, beta1, omb1, beta2, omb2, ir2, eps, coupled = s
        m, v = x
        g = mul(g, gs)
        if coupled != ZERO:
            g = add(g, mul(wd, p))
        m = add(mul(beta1, m), mul(omb1, g))
        v = add(mul(beta2, v), mul(omb2, mul(g, g)))
        d = add(mul(sqrt(v), ir2), eps)
        p = sub(p, mul(step, mul(m, rcp(d))))
        return p, (m, v)

    return step
