"""LARS (You, Gitman & Ginsburg, arXiv 1708.03888, Algorithm 1): momentum whose steps are as long as the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row, wide

SCALARS = ("gs", "momentum", "wd")
WIDE = ("lr", "trust", "wd", "eps", "longest", "bare")
OPTIONS: dict[str, tuple[bool | str, ...]] = {"variant": ("paper", "optax", "clip")}
FACTORS = ()


def elements(variant: str = "paper") -> tuple[str, ...]:
    return ("v",)


def passes(variant: str = "paper") -> tuple[str, ...]:
    return "sums0", "finish0", "update0"


def sums(variant: str = "paper") -> int:
    return 2


def choices(hyper: Mapping[str, Any]) -> tuple[str, ...]:
    return (hyper.get("variant", "paper"),)


def scalars(
    t: int,
    vector: bool,
    *,
    lr: float = 1.0,
    trust: float = 1e-3,
    momentum: float = 0.9,
    wd: float = 0.0,
    eps: float = 0.0,
    max_unorm: float = 0.02,
    exclude_1d: bool = False,
    gscale: float = 1.0,
    maximize: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of step `t` (counted from 1), in the order of `SCALARS` and of `WIDE`."""
    bare = exclude_1d and vector
    wd = 0.0 if bare else wd
    return row(gradient_scale(gscale, maximize), momentum, wd), wide(lr, trust, wd, eps, max_unorm, bare)


def make(o: Any, variant: str = "paper") -> tuple[Any, ...]:
    """Norms of p and of what the variant measures: g, g + wd p, or the fresh velocity without decay."""
    mul, add, sub, clip, optax = o.mul, o.add, o.sub, variant == "clip", variant == "optax"

    @o.jit
    def norms(p, g, x, inverse, vector, s):
        if clip:
            return p, add(mul(s[1], x[0]), g)
        return p, add(g, mul(s[2], p)) if optax else g

    @o.jit
    def update(p, g, x, inverse, k, vector, s):
        d = add(g, mul(s[2], p))
        if clip:
            v = add(mul(s[1], x[0]), d)
            return sub(p, mul(k[0], v)), (v,)
        v = add(mul(s[1], x[0]), mul(k[0], d))
        return sub(p, v), (v,)

    return norms, (), update


def finish(r: np.ndarray, n: int, s: np.ndarray, w: np.ndarray, factor: Any, variant: str = "paper") -> np.ndarray:
    """lr times the local rate."""
    lr, trust, wd, eps, longest, bare = w
    with np.errstate(all="ignore"):
        wn, un = np.sqrt(r[0]), np.sqrt(r[1])
        if variant == "clip":
            most = longest * wn
            q, on = most / un, (un > most) & (most > 0)
        else:
            size = un + eps if variant == "optax" else un + wd * wn + eps
            q, on = trust * wn / size, (wn > 0) & (un > 0)
        return np.asarray(lr * np.where(on & (bare == 0), q, 1.0), np.float32)[:, None].repeat(4, 1)
