"""LAMB (You et al., arXiv 1904.00962, Algorithm 2): Adam's direction, as long as the weights are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, ipow, row, wide

SCALARS = ("gs", "beta1", "omb1", "beta2", "omb2", "ibc1", "ir2", "eps", "wd", "decay")
WIDE = ("lr", "low", "high", "longest", "bare")
VARIANTS = ("paper", "apex", "clip")
"""The functor's `scalars` takes the place among these."""
OPTIONS: dict[str, tuple[bool | str, ...]] = {"variant": ("paper", "clip")}
FACTORS = ()


def elements(variant: str = "paper") -> tuple[str, ...]:
    return "m", "v"


def passes(variant: str = "paper") -> tuple[str, ...]:
    return "sums0", "finish0", "update0"


def sums(variant: str = "paper") -> int:
    return 2


def choices(hyper: Mapping[str, Any]) -> tuple[str, ...]:
    """The apex variant is the paper's, but that a tensor without decay has no ratio."""
    return ("clip" if hyper.get("variant") == "clip" else "paper",)


def scalars(
    t: int,
    vector: bool,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    wd: float = 1e-2,
    phi_low: float = 0.0,
    phi_high: float | None = None,
    bias_correction: bool = True,
    variant: str = "paper",
    max_unorm: float = 1.0,
    exclude_1d: bool = False,
    gscale: float = 1.0,
    maximize: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of step `t` (counted from 1), in the order of `SCALARS` and of `WIDE`."""
    bare = exclude_1d and vector
    wd = 0.0 if bare else wd
    bc1, bc2 = (1.0 - ipow(beta1, t), 1.0 - ipow(beta2, t)) if bias_correction else (1.0, 1.0)
    gs, ir2 = gradient_scale(gscale, maximize), 1.0 / math.sqrt(bc2)
    plain = bare or (variant == "apex" and wd == 0)
    high = math.inf if phi_high is None else phi_high
    scalars = row(gs, beta1, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 / bc1, ir2, eps, wd, 1.0 - lr * wd)
    return scalars, wide(lr, phi_low, high, max_unorm, plain)


def make(o: Any, variant: str = "paper") -> tuple[Any, ...]:
    """Norms of p and of the direction; the direction is computed again in the update."""
    mul, add, sub, outside, clip = o.mul, o.add, o.sub, o.over_root["outside"], variant == "clip"

    @o.jit
    def direction(p, g, x, s):
        _, beta1, omb1, beta2, omb2, ibc1, ir2, eps, wd, _ = s
        m = add(mul(beta1, x[0]), mul(omb1, g))
        v = add(mul(beta2, x[1]), mul(omb2, mul(g, g)))
        u = mul(mul(m, ibc1), outside(v, ir2, eps))
        return u if clip else add(u, mul(wd, p)), (m, v)

    @o.jit
    def norms(p, g, x, inverse, vector, s):
        u, _ = direction(p, g, x, s)
        return p, u

    @o.jit
    def update(p, g, x, inverse, k, vector, s):
        u, x = direction(p, g, x, s)
        p = sub(p, mul(k[0], u))
        return mul(p, s[9]) if clip else p, x

    return norms, (), update


def finish(r: np.ndarray, n: int, s: np.ndarray, w: np.ndarray, factor: Any, variant: str = "paper") -> np.ndarray:
    """lr times the trust ratio."""
    lr, low, high, longest, bare = w
    with np.errstate(all="ignore"):
        wn, un = np.sqrt(r[0]), np.sqrt(r[1])
        q = np.fmin(longest * wn / un, 1.0) if variant == "clip" else np.fmin(np.fmax(wn, low), high) / un
        return np.asarray(lr * np.where((wn > 0) & (un > 0) & (bare == 0), q, 1.0), np.float32)[:, None].repeat(4, 1)
