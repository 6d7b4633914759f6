"""AdEMAMix (Pagliardini, Ablin & Grangier, arXiv:2409.03137, algorithm 1), one element: a fast and a slow mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, ipow, row

SCALARS = (
    "gs", "step", "decay", "beta1", "omb1", "beta2", "omb2", "ir2", "eps", "beta3", "omb3", "a", "lr", "ibc1", "wd"
)  # fmt: skip
STATES = (("m1", False, "beta1"), ("m2", False), ("v", True))
OPTIONS = {"beta1": (True, False), "decay_order": ("before", "after", "additive")}


def scalars(
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta3: float = 0.9999,
    alpha: float = 2.0,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
    eps: float = 1e-8,
    wd: float = 0.0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of step `t` (counted from 1), in the order of `SCALARS`."""
    if t_alpha is not None and t < t_alpha:
        alpha = alpha * t / t_alpha
    if t_beta3 is not None and t < t_beta3:
        beta3 = _slowing(beta1, beta3, t / t_beta3)
    bc1, bc2 = 1.0 - ipow(beta1, t), 1.0 - ipow(beta2, t)
    gs, ir2 = gradient_scale(gscale, maximize), 1.0 / math.sqrt(bc2)
    fast, square, slow = (beta1, 1.0 - beta1), (beta2, 1.0 - beta2), (beta3, 1.0 - beta3)
    return row(gs, lr / bc1, 1.0 - lr * wd, *fast, *square, ir2, eps, *slow, alpha * bc1, lr, 1.0 / bc1, wd)


def _slowing(first: float, last: float, part: float) -> float:
    """The beta whose half-life lies that part of the way between the two."""
    a, b = math.log(first), math.log(last)
    return math.exp(a * b / ((1.0 - part) * b + part * a))


def make(o: Any, beta1: bool = True, decay_order: str = "before") -> Callable:
    """`step(p, g, (m1, m2, v), s) -> (p, (m1, m2, v))` over the arithmetic `o`; no m1 for beta1 = 0."""
    mul, add, sub, over_root, fast = o.mul, o.add, o.sub, o.over_root["outside"], beta1
    before, after, additive = (decay_order == order for order in OPTIONS["decay_order"])

    @o.jit
    def step(p, g, x, s):
        gs, step, decay, beta1, omb1, beta2, omb2, ir2, eps, beta3, omb3, a, lr, ibc1, wd = s
        g = mul(g, gs)
        if before:
            p = mul(p, decay)
        m2 = add(mul(beta3, x[-2]), mul(omb3, g))
        v = add(mul(beta2, x[-1]), mul(omb2, mul(g, g)))
        m1, y = g, (m2, v)
        if fast:
            m1 = add(mul(beta1, x[0]), mul(omb1, g))
            y = (m1, m2, v)
        num, r = add(m1, mul(a, m2)), over_root(v, ir2, eps)
        if additive:
            p = sub(p, mul(lr, add(mul(mul(num, ibc1), r), mul(wd, p))))
        else:
            p = sub(p, mul(step, mul(num, r)))
        return mul(p, decay) if after else p, y

    return step
