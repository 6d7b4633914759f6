r"""Adam (Kingma & Ba, arXiv 1412.6980, Algorithm 1), with L2 weight decay as in torch.optim.Adam.

One learning rate cannot suit every weight. Adam divides each step by the running size of that weight's own gradient,
at the price of two numbers a weight: their mean m and their mean square v.

======  =============  ===================================  =========
symbol  name           meaning                              default
======  =============  ===================================  =========
p       parameter      the weights
g       gradient       of the loss by p
m       first moment   running mean of g
v       second moment  running mean of g^2, never negative
lr      learning rate  step length, >= 0                    1e-3
beta1   decay of m     [0, 1)                               0.9
beta2   decay of v     [0, 1)                               0.999
eps     guard          added to sqrt(v), >= 0               1e-8
wd      weight decay   coupled (L2), >= 0                   0
======  =============  ===================================  =========

State: ``m`` and ``v``, float32, the parameter's shape; 8 bytes a parameter.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
>>> p, state = rules.adam.update(p, g, rules.adam.init(p), t=1, lr=0.1, wd=0.1)
>>> p, state = rules.adam.update(p, -2 * g, state, t=2, lr=0.1, wd=0.1)
>>> print(p.round(5), state["m"].round(5), state["v"].round(6))
[ 0.92526 -2.03047] [-0.037  -0.0665] [0.001188 0.000507]
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from refopt.scalars import f32, ipow
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, **hyper: Any) -> dict[str, Array]:
    """Both moments, zeros."""
    return {"m": np.zeros(p.shape, f32), "v": np.zeros(p.shape, f32)}


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """One step; the bias corrections are folded into `step` and `ir2`, as one host scalar each."""
    omb1, omb2 = f32(1.0 - beta1), f32(1.0 - beta2)
    step = f32(lr / (1.0 - ipow(beta1, t)))
    ir2 = f32(1.0 / sqrt(1.0 - ipow(beta2, t)))
    beta1, beta2, eps, wd = f32(beta1), f32(beta2), f32(eps), f32(wd)
    if wd:
        g = g + wd * p
    m = beta1 * state["m"] + omb1 * g
    v = beta2 * state["v"] + omb2 * (g * g)
    d = np.sqrt(v) * ir2 + eps
    r = f32(1) / d
    p = p - step * (m * r)
    return p, {"m": m, "v": v}


rule = Rule(
    stem="adam",
    title="Adam",
    source="Kingma & Ba, arXiv 1412.6980, Algorithm 1",
    states=(
        State("m", "first moment", torch="exp_avg"),
        State("v", "second moment", nonnegative=True, torch="exp_avg_sq"),
    ),
    hypers=(
        Hyper("lr", "lr", 1e-3, "learning rate", low=0),
        Hyper("beta1", "beta1", 0.9, "decay of m", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.999, "decay of v", low=0, high=1, torch="betas[1]"),
        Hyper("eps", "eps", 1e-8, "added to sqrt(v)", low=0, torch="eps"),
        Hyper("wd", "wd", 0.0, "weight decay, coupled: g + wd p", low=0, torch="weight_decay"),
    ),
    init=init,
    update=update,
)
