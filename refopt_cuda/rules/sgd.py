"""SGD with momentum (Polyak 1964; Sutskever et al. 2013), one element; dialect of torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row

SCALARS = ("gs", "lr", "wd", "mu", "damp", "coupled", "first", "nesterov", "keep")
STATES = (("buf", False, "momentum"),)
OPTIONS = {"momentum": (False, True), "lr_at": ("outside", "inside"), "decay": ("coupled", "decoupled")}
ZERO = np.float32(0)


def scalars(
    t: int,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    wd: float = 0.0,
    nesterov: bool = False,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of step `t` (counted from 1), in the order of `SCALARS`; 5 to 7 are flags, 0 or 1."""
    gs, coupled = gradient_scale(gscale, maximize), np.float32(wd) != 0
    return row(gs, lr, wd, momentum, 1.0 - dampening, coupled, t == 1, nesterov, 1.0 - lr * wd)


def make(o: Any, momentum: bool = False, lr_at: str = "outside", decay: str = "coupled") -> Callable:
    """`step(p, g, x, s) -> (p, x)` over the arithmetic `o`; x is `(buf,)`, or `()` without momentum."""
    mul, add, sub = o.mul, o.add, o.sub
    decoupled, inside = decay == "decoupled", lr_at == "inside"

    @o.jit
    def step(p, g, x, s):
        gs, lr, wd, mu, damp, coupled, first, nesterov, keep = s
        g = mul(g, gs)
        if decoupled:
            p = mul(p, keep)
        elif coupled != ZERO:
            g = add(g, mul(wd, p))
        if inside:
            g = mul(lr, g)
        d, y = g, x
        if momentum:
            buf = g if first != ZERO else add(mul(mu, x[0]), mul(damp, g))
            d, y = add(g, mul(mu, buf)) if nesterov != ZERO else buf, (buf,)
        return sub(p, d if inside else mul(lr, d)), y

    return step
