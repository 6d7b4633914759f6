"""Adagrad (Duchi, Hazan & Singer, JMLR 12, 2011), one element; dialect of torch.optim.Adagrad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row

SCALARS = ("gs", "clr", "wd", "eps", "coupled")
STATES = (("s", True),)
OPTIONS = {"eps_at": ("outside", "inside")}
ZERO = np.float32(0)
ONE = np.float32(1)


def scalars(
    t: int,
    *,
    lr: float,
    lr_decay: float = 0.0,
    init_acc: float = 0.0,
    eps: float = 1e-10,
    wd: float = 0.0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of step `t` (counted from 1), in the order of `SCALARS`; `init_acc` has no part in it."""
    clr = lr / (1.0 + (t - 1) * lr_decay)
    return row(gradient_scale(gscale, maximize), clr, wd, eps, np.float32(wd) != 0)


def make(o: Any, eps_at: str = "outside") -> Callable:
    """`step(p, g, (sum,), s) -> (p, (sum,))` over the arithmetic `o`."""
    mul, add, sub, over_root = o.mul, o.add, o.sub, o.over_root[eps_at]

    @o.jit
    def step(p, g, x, s):
        gs, clr, wd, eps, coupled = s
        g = mul(g, gs)
        if coupled != ZERO:
            g = add(g, mul(wd, p))
        total = add(x[0], mul(g, g))
        return sub(p, mul(clr, mul(g, over_root(total, ONE, eps)))), (total,)

    return step
