r"""AdamW (Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2), in the dialect of torch.optim.AdamW.

Adam divides the gradient by its own size, so an L2 term inside the gradient is divided too and hardly decays the
weights that need it. AdamW takes the decay out of the gradient and shrinks the old weights directly.

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
wd      weight decay   decoupled: p shrinks by 1 - lr wd    1e-2
======  =============  ===================================  =========

State: ``m`` and ``v``, float32, the parameter's shape; 8 bytes a parameter.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
>>> p, state = rules.adamw.update(p, g, rules.adamw.init(p), t=1, lr=0.1, wd=0.1)
>>> p, state = rules.adamw.update(p, -2 * g, state, t=2, lr=0.1, wd=0.1)
>>> print(p.round(5), state["m"].round(5), state["v"].round(6))
[ 0.91771 -2.02259] [-0.055  -0.0275] [0.00125  0.000312]
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
    wd: float = 1e-2,
) -> tuple[Array, dict[str, Array]]:
    """One step; the bias corrections are folded into `step` and `ir2`, as one host scalar each."""
    omb1, omb2 = f32(1.0 - beta1), f32(1.0 - beta2)
    step = f32(lr / (1.0 - ipow(beta1, t)))
    ir2 = f32(1.0 / sqrt(1.0 - ipow(beta2, t)))
    decay = f32(1.0 - lr * wd)
    beta1, beta2, eps = f32(beta1), f32(beta2), f32(eps)
    p = p * decay
    m = beta1 * state["m"] + omb1 * g
    v = beta2 * state["v"] + omb2 * (g * g)
    d = np.sqrt(v) * ir2 + eps
    r = f32(1) / d
    p = p - step * (m * r)
    return p, {"m": m, "v": v}


rule = Rule(
    stem="adamw",
    title="AdamW",
    source="Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2",
    states=(
        State("m", "first moment", torch="exp_avg"),
        State("v", "second moment", nonnegative=True, torch="exp_avg_sq"),
    ),
    hypers=(
        Hyper("lr", "lr", 1e-3, "learning rate", low=0),
        Hyper("beta1", "beta1", 0.9, "decay of m", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.999, "decay of v", low=0, high=1, torch="betas[1]"),
        Hyper("eps", "eps", 1e-8, "added to sqrt(v)", low=0, torch="eps"),
        Hyper("wd", "wd", 1e-2, "weight decay, decoupled: p (1 - lr wd)", low=0, torch="weight_decay"),
    ),
    init=init,
    update=update,
)
