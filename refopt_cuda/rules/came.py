"""CAME (Luo et al., arXiv 2307.02047, Algorithm 2): Adafactor with momentum, slowed where the momentum is unsure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row, wide

SCALARS = ("gs", "beta1", "omb1", "beta2", "omb2", "beta3", "omb3", "eps1", "eps2", "lr", "decay")
WIDE = ("clip",)
OPTIONS: dict[str, tuple[bool | str, ...]] = {}
FACTORS = ("R", "C", "Rr", "Cr")
KEEP = (("beta2", "omb2"), ("beta3", "omb3"))
LEAST = None


def elements() -> tuple[str, ...]:
    """V is kept for vectors alone."""
    return "V", "m"


def passes() -> tuple[str, ...]:
    return "tiles0", "lines0", "means0", "sums0", "finish0", "tiles1", "lines1", "means1", "update0"


def sums() -> int:
    return 1


def choices(hyper: Mapping[str, Any]) -> tuple[bool, ...]:
    return ()


def scalars(
    t: int,
    vector: bool,
    *,
    lr: float = 2e-4,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta3: float = 0.9999,
    eps1: float = 1e-30,
    eps2: float = 1e-16,
    clip: float = 1.0,
    wd: float = 0.0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of step `t` (counted from 1), in the order of `SCALARS` and of `WIDE`."""
    betas = beta1, 1.0 - beta1, beta2, 1.0 - beta2, beta3, 1.0 - beta3
    return row(gradient_scale(gscale, maximize), *betas, eps1, eps2, lr, 1.0 - lr * wd), wide(clip)


def make(o: Any) -> tuple[Any, ...]:
    """g^2 is summed by rows and columns, then the instability; between them the update before it is cut."""
    mul, add, sub, rcp, sqrt = o.mul, o.add, o.sub, o.rcp, o.sqrt
    zero = np.float32(0)

    @o.jit
    def square(g, x, inverse, k, s):
        return add(mul(g, g), s[7])

    @o.jit
    def direction(g, v, inverse, vector, s):
        if vector:
            v = add(mul(s[3], v), mul(s[4], add(mul(g, g), s[7])))
            inverse = rcp(sqrt(v))
        return mul(inverse, g), v

    @o.jit
    def moved(u, m, k, s):
        u = mul(u, k[0])
        return u, add(mul(s[1], m), mul(s[2], u))

    @o.jit
    def instability(g, x, inverse, k, s):
        u, m = moved(mul(inverse[0], g), x[1], k, s)
        d = sub(u, m)
        return add(mul(d, d), s[8])

    @o.jit
    def norms(p, g, x, inverse, vector, s):
        u, _ = direction(g, x[0], inverse[0], vector, s)
        return u, zero

    @o.jit
    def update(p, g, x, inverse, k, vector, s):
        u, v = direction(g, x[0], inverse[0], vector, s)
        _, m = moved(u, x[1], k, s)
        step = m if vector else mul(inverse[1], m)
        return sub(mul(p, s[10]), mul(s[9], step)), (v, m)

    return norms, (square, instability), update


def finish(r: np.ndarray, n: int, s: np.ndarray, w: np.ndarray, factor: Any) -> np.ndarray:
    """What the update is cut by."""
    one = np.float32(1)
    with np.errstate(all="ignore"):
        root = np.sqrt(r[0] / n).astype(np.float32).astype(np.float64)
        cut = one / np.maximum(one, np.float32(root / w[0]))
    return cut[:, None].repeat(4, 1)
