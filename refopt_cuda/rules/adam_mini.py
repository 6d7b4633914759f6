"""Adam-mini (Zhang et al., arXiv 2406.16793, Algorithm 1): AdamW with one second moment for each block of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from refopt_cuda.scalars import gradient_scale, ipow, row, wide

SCALARS = ("gs", "beta1", "omb1", "beta2", "omb2", "ibc1", "ir2", "eps", "lr", "decay")
WIDE = ("unused",)
OPTIONS: dict[str, tuple[bool | str, ...]] = {"elementwise": (False, True)}
FACTORS = ("v",)


def elements(elementwise: bool = False) -> tuple[str, ...]:
    return ("m", "v") if elementwise else ("m",)


def passes(elementwise: bool = False) -> tuple[str, ...]:
    return ("update0",) if elementwise else ("sums0", "finish0", "update0")


def sums(elementwise: bool = False) -> int:
    return 1


def choices(hyper: Mapping[str, Any]) -> tuple[bool, ...]:
    return (hyper.get("blocks") == "elementwise",)


def blocks(shape: tuple[int, ...], hyper: Mapping[str, Any]) -> int:
    """Rows, heads, or the whole tensor."""
    kind = hyper.get("blocks", "rows")
    return shape[0] if kind == "rows" else int(hyper["heads"]) if kind == "heads" else 1


def scalars(
    t: int,
    vector: bool,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
    gscale: float = 1.0,
    maximize: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of step `t` (counted from 1), in the order of `SCALARS` and of `WIDE`."""
    gs, ibc1, ir2 = (
        gradient_scale(gscale, maximize),
        1.0 / (1.0 - ipow(beta1, t)),
        1.0 / math.sqrt(1.0 - ipow(beta2, t)),
    )
    return row(gs, beta1, 1.0 - beta1, beta2, 1.0 - beta2, ibc1, ir2, eps, lr, 1.0 - lr * wd), wide(0.0)


def make(o: Any, elementwise: bool = False) -> tuple[Any, ...]:
    """Squares of g; AdamW's step with the block's own k, or where `elementwise` with that of the weight."""
    mul, add, sub, outside = o.mul, o.add, o.sub, o.over_root["outside"]
    zero = np.float32(0)

    @o.jit
    def squares(p, g, x, inverse, vector, s):
        return g, zero

    @o.jit
    def update(p, g, x, inverse, k, vector, s):
        _, beta1, omb1, beta2, omb2, ibc1, ir2, eps, lr, decay = s
        p = mul(p, decay)
        m = add(mul(beta1, x[0]), mul(omb1, g))
        if elementwise:
            v = add(mul(beta2, x[1]), mul(omb2, mul(g, g)))
            return sub(p, mul(lr, mul(m, mul(ibc1, outside(v, ir2, eps))))), (m, v)
        return sub(p, mul(lr, mul(m, k[0]))), (m,)

    return squares, (), update


def finish(
    r: np.ndarray, n: int, s: np.ndarray, w: np.ndarray, factor: np.ndarray, elementwise: bool = False
) -> np.ndarray:
    """The second moments of the blocks, in place, and the step length of each."""
    _, _, _, beta2, omb2, ibc1, ir2, eps, _, _ = s
    with np.errstate(all="ignore"):
        factor[:] = beta2 * factor + omb2 * np.float32(r[0] / n)
        k = ibc1 * (np.float32(1) / (np.sqrt(factor) * ir2 + eps))
    return k[:, None].repeat(4, 1)
