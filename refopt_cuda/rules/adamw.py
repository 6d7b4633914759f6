"""AdamW (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2), one element; decay first, as in torch.optim.AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, ipow, row

SCALARS = ("gs", "step", "decay", "beta1", "omb1", "beta2", "omb2", "ir2", "eps", "lr", "ibc1", "wd")
STATES = (("m", False), ("v", True), ("w", True, "amsgrad"))
OPTIONS = {
    "amsgrad": (False, True),
    "eps_at": ("outside", "uncorrected", "inside"),
    "decay_order": ("before", "after", "additive"),
}


def scalars(
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 1e-2,
    bias_correction: bool = True,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of step `t` (counted from 1), in the order of `SCALARS`."""
    bc1, bc2 = (1.0 - ipow(beta1, t), 1.0 - ipow(beta2, t)) if bias_correction else (1.0, 1.0)
    gs, ir2 = gradient_scale(gscale, maximize), 1.0 / math.sqrt(bc2)
    return row(gs, lr / bc1, 1.0 - lr * wd, beta1, 1.0 - beta1, beta2, 1.0 - beta2, ir2, eps, lr, 1.0 / bc1, wd)


def make(o: Any, amsgrad: bool = False, eps_at: str = "outside", decay_order: str = "before") -> Callable:
    """`step(p, g, (m, v), s) -> (p, (m, v))` over the arithmetic `o`; amsgrad keeps w as well."""
    mul, add, sub, maximum, over_root = o.mul, o.add, o.sub, o.maximum, o.over_root[eps_at]
    before, after, additive = (decay_order == order for order in OPTIONS["decay_order"])

    @o.jit
    def step(p, g, x, s):
        gs, step, decay, beta1, omb1, beta2, omb2, ir2, eps, lr, ibc1, wd = s
        g = mul(g, gs)
        if before:
            p = mul(p, decay)
        m = add(mul(beta1, x[0]), mul(omb1, g))
        v = add(mul(beta2, x[1]), mul(omb2, mul(g, g)))
        z, y = v, (m, v)
        if amsgrad:
            z = maximum(x[2], v)
            y = (m, v, z)
        r = over_root(z, ir2, eps)
        if additive:
            p = sub(p, mul(lr, add(mul(mul(m, ibc1), r), mul(wd, p))))
        else:
            p = sub(p, mul(step, mul(m, r)))
        return mul(p, decay) if after else p, y

    return step
