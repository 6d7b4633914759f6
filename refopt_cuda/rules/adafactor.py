"""Adafactor (Shazeer & Stern, arXiv 1804.04235, Algorithms 4 to 6): the second moment as row and column means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, row, wide

SCALARS = ("gs", "b2", "omb2", "plus", "top", "beta1", "omb1", "low")
WIDE = ("rho", "eps2", "clip", "wd", "shrink")
VARIANTS = ("transformers", "torch")
"""The functor's `scalars` takes the place among these."""
OPTIONS: dict[str, tuple[bool | str, ...]] = {"momentum": (False, True), "scaled": (True, False)}
FACTORS = ("R", "C")
KEEP = (("b2", "omb2"),)
LEAST = "low"


def elements(momentum: bool = False, scaled: bool = True) -> tuple[str, ...]:
    """V is kept for vectors alone."""
    return ("V", "m") if momentum else ("V",)


def passes(momentum: bool = False, scaled: bool = True) -> tuple[str, ...]:
    return "tiles0", "lines0", "means0", "sums0", "finish0", "update0"


def sums(momentum: bool = False, scaled: bool = True) -> int:
    return 2 if scaled else 1


def choices(hyper: Mapping[str, Any]) -> tuple[bool, ...]:
    return hyper.get("beta1") is not None, bool(hyper.get("scale_parameter", True))


def scalars(
    t: int,
    vector: bool,
    *,
    lr: float | None = None,
    eps1: float | None = None,
    eps2: float = 1e-3,
    clip: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    wd: float = 0.0,
    relative_step: bool = True,
    warmup_init: bool = False,
    variant: str = "transformers",
    gscale: float = 1.0,
    maximize: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of step `t` (counted from 1), in the order of `SCALARS` and of `WIDE`.

    A `shrink` below 0 stands for the step length alpha, which is known when the weights have been measured.
    """
    b2, rho, beta1 = 1.0 - float(t) ** decay_rate, lr, beta1 or 0.0
    if relative_step or lr is None:
        cap = lr if lr is not None else 1e-6 * t if warmup_init else 1e-2
        rho = min(cap, 1.0 / math.sqrt(t))
    if variant == "transformers":
        plus, low, top, shrink = (1e-30 if eps1 is None else eps1), 0.0, math.inf, -1.0
    else:
        plus, low = 0.0, (2.0**-23 if eps1 is None else eps1)
        top, shrink = (1.0 / low if low else math.inf), (1e-2 if lr is None else lr)
    scalars = row(gradient_scale(gscale, maximize), b2, 1.0 - b2, plus, top, beta1, 1.0 - beta1, low)
    return scalars, wide(float(rho), eps2, clip, wd, shrink)  # type: ignore[arg-type]


def make(o: Any, momentum: bool = False, scaled: bool = True) -> tuple[Any, ...]:
    """g^2 is summed by rows and columns; then the update before it is cut, and the weights."""
    mul, add, sub, rcp, sqrt = o.mul, o.add, o.sub, o.rcp, o.sqrt

    @o.jit
    def square(g, x, inverse, k, s):
        return add(mul(g, g), s[3])

    @o.jit
    def direction(g, v, inverse, vector, s):
        if vector:
            v = add(mul(s[1], v), mul(s[2], add(mul(g, g), s[3])))
            inverse = rcp(sqrt(v))
        return mul(s[4] if s[4] < inverse else inverse, g), v

    @o.jit
    def norms(p, g, x, inverse, vector, s):
        u, _ = direction(g, x[0], inverse[0], vector, s)
        return u, p

    @o.jit
    def update(p, g, x, inverse, k, vector, s):
        u, v = direction(g, x[0], inverse[0], vector, s)
        u = mul(k[1], mul(u, k[0]))
        if momentum:
            m = add(mul(s[5], x[1]), mul(s[6], u))
            return sub(mul(p, k[2]), m), (v, m)
        return sub(mul(p, k[2]), u), (v,)

    return norms, (square,), update


def finish(
    r: np.ndarray, n: int, s: np.ndarray, w: np.ndarray, factor: Any, momentum: bool = False, scaled: bool = True
) -> np.ndarray:
    """What the update is cut by, the step length, and what the weights shrink by."""
    rho, eps2, clip, wd, shrink = w
    one = np.float32(1)
    with np.errstate(all="ignore"):
        root = np.sqrt(r / n).astype(np.float32).astype(np.float64)
        alpha = np.float32((np.maximum(eps2, root[1]) if scaled else np.ones(r.shape[1])) * rho)
        cut = one / np.maximum(one, np.float32(root[0] / clip))
        decay = np.float32(1.0 - wd * (alpha.astype(np.float64) if shrink < 0 else np.full(alpha.shape, shrink)))
    return np.stack([cut, alpha, decay, decay], 1)
