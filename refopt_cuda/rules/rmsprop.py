"""RMSprop (Tieleman & Hinton 2012; centred: Graves, arXiv:1308.0850), one element; dialect of torch.optim.RMSprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row

SCALARS = ("gs", "lr", "wd", "alpha", "oma", "eps", "mu", "coupled")
STATES = (("v", True), ("a", False, "centered"), ("buf", False, "momentum"))
OPTIONS = {"centered": (False, True), "momentum": (False, True), "eps_at": ("outside", "inside")}
ZERO = np.float32(0)
ONE = np.float32(1)


def scalars(
    t: int,
    *,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    wd: float = 0.0,
    momentum: float = 0.0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of a step, in the order of `SCALARS`; the same for every `t`."""
    return row(gradient_scale(gscale, maximize), lr, wd, alpha, 1.0 - alpha, eps, momentum, np.float32(wd) != 0)


def make(o: Any, centered: bool = False, momentum: bool = False, eps_at: str = "outside") -> Callable:
    """`step(p, g, x, s) -> (p, x)` over the arithmetic `o`; x is (v, a, buf), less what is not kept."""
    mul, add, sub, maximum, over_root = o.mul, o.add, o.sub, o.maximum, o.over_root[eps_at]

    @o.jit
    def step(p, g, x, s):
        gs, lr, wd, alpha, oma, eps, mu, coupled = s
        g = mul(g, gs)
        if coupled != ZERO:
            g = add(g, mul(wd, p))
        v = add(mul(alpha, x[0]), mul(oma, mul(g, g)))
        z, y = v, (v,)
        if centered:
            a = add(mul(alpha, x[1]), mul(oma, g))
            z = maximum(sub(v, mul(a, a)), ZERO)
            y = (v, a)
        u = mul(g, over_root(z, ONE, eps))
        if momentum:
            u = add(mul(mu, x[-1]), u)
            y = y + (u,)
        return sub(p, mul(lr, u)), y

    return step
