"""Schedule-Free AdamW (Defazio et al., arXiv 2405.15682, algorithm 1), one element; p is y, where gradients are taken.

The share c of a step depends on the steps before: on the sum of their weights and on their largest rate, two float64
numbers a tensor. No kernel reads them, for the host can carry them along: `following` takes them and gives them back,
and must be used where hyper-parameters may change on the way. `scalars` is for those that have been the same since
step 1; then both follow from t, and the sum is added up term by term, as it was step by step: t times the weight has
other bits.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from refopt_cuda.scalars import gradient_scale, ipow, row

SCALARS = ("gs", "lr", "c", "along", "beta2", "omb2", "ir2", "eps", "wd")
STATES = (("z", False), ("v", True))


class Past(NamedTuple):
    """What the steps so far leave for the scalars of the next: the sum of their weights, and their largest rate."""

    weight_sum: float = 0.0
    lr_max: float = 0.0


def scalars(
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
    r: float = 0.0,
    lr_power: float = 2.0,
    warmup: int = 0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    """The float32 row of step `t` (counted from 1), in the order of `SCALARS`, if all steps before had these
    hyper-parameters; the first call for a late t adds up t weights, the next ones go on from there."""
    past = _replayed(t - 1, lr, r, lr_power, warmup)
    same = partial(following, past, t, lr=lr, r=r, lr_power=lr_power, warmup=warmup)
    return same(beta1=beta1, beta2=beta2, eps=eps, wd=wd, gscale=gscale, maximize=maximize)[0]


def following(
    past: Past,
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
    r: float = 0.0,
    lr_power: float = 2.0,
    warmup: int = 0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> tuple[np.ndarray, Past]:
    """The float32 row of the step `t` that follows on `past`, and what that step leaves."""
    rate = _rate(t, lr, warmup)
    now, c = _weighed(past, t, rate, r, lr_power)
    gs, ir2 = gradient_scale(gscale, maximize), 1.0 / math.sqrt(1.0 - ipow(beta2, t))
    along = rate * (beta1 * (1.0 - c) - 1.0)
    return row(gs, rate, c, along, beta2, 1.0 - beta2, ir2, eps, wd), now


def _rate(t: int, lr: float, warmup: int) -> float:
    """The rate of step `t`, which grows to lr."""
    return lr * min(1.0, t / warmup) if warmup else lr


def _weighed(past: Past, t: int, rate: float, r: float, lr_power: float) -> tuple[Past, float]:
    """What step `t` leaves, and the share of the new z in the average."""
    top = max(past.lr_max, rate)
    with np.errstate(all="ignore"):  # NumPy's powers, since those of Python raise where IEEE has an infinity
        weight = float(np.float64(t) ** r * np.float64(top) ** lr_power)
    total = past.weight_sum + weight
    return Past(total, top), weight / total if total > 0 else 0.0


_lock = threading.Lock()


@lru_cache(maxsize=64)
def _sums(lr: float, r: float, lr_power: float, warmup: int) -> array:
    """The sum of weights after 0, 1, 2 ... steps, as far as anybody has asked."""
    return array("d", [0.0])


def _replayed(t: int, lr: float, r: float, lr_power: float, warmup: int) -> Past:
    """What `t` steps with these hyper-parameters leave; their rates never fall, so the last is the largest."""
    with _lock:
        sums = _sums(lr, r, lr_power, warmup)
        for k in range(len(sums), t + 1):
            now, _ = _weighed(Past(sums[-1]), k, _rate(k, lr, warmup), r, lr_power)
            sums.append(now.weight_sum)
        return Past(sums[t], _rate(t, lr, warmup) if t else 0.0)


def make(o: Any) -> Callable:
    """`step(p, g, (z, v), s) -> (p, (z, v))` over the arithmetic `o`."""
    mul, add, sub, over_root = o.mul, o.add, o.sub, o.over_root["outside"]

    @o.jit
    def step(p, g, x, s):
        gs, lr, c, along, beta2, omb2, ir2, eps, wd = s
        g = mul(g, gs)
        z = x[0]
        v = add(mul(beta2, x[1]), mul(omb2, mul(g, g)))
        u = add(mul(g, over_root(v, ir2, eps)), mul(wd, p))
        p = add(p, mul(c, sub(z, p)))
        p = add(p, mul(along, u))
        return p, (sub(z, mul(lr, u)), v)

    return step
