"""SGD with momentum (Polyak 1964; Sutskever et al. 2013), one element; dialect of torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row

SCALARS = ("gs", "lr", "wd", "momentum", "damp", "coupled", "first", "nesterov")
STATES = (("buf", False),)
STATELESS = True
"""Without momentum there is no buffer."""
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
    """The float32 row of step `t` (counted from 1), in the order of `SCALARS`; the last three are flags, 0 or 1."""
    gs = gradient_scale(gscale, maximize)
    return row(gs, lr, wd, momentum, 1.0 - dampening, np.float32(wd) != 0, t == 1, nesterov)


def make(o: Any) -> Callable:
    """`step(p, g, x, s) -> (p, x)` over the arithmetic `o`; x is `(buf,)`, or `()` for SGD without momentum."""
    mul, add, sub = o.mul, o.add, o.sub

    @o.jit
    def step(p, g, x, s):
        gs, lr, wd, momentum, damp, coupled, first, nesterov = s
        g = mul(g, gs)
        if coupled != ZERO:
            g = add(g, mul(wd, p))
        if len(x) == 0:
            return sub(p, mul(lr, g)), x
        buf = g if first != ZERO else add(mul(momentum, x[0]), mul(damp, g))
        d = add(g, mul(momentum, buf)) if nesterov != ZERO else buf
        return sub(p, mul(lr, d)), (buf,)

    return step
