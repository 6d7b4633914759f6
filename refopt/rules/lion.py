r"""Lion (Chen et al., arXiv 2302.06675, Algorithm 2): evolved sign momentum.

Adam's second moment only sets the size of a step. Lion drops it: every weight moves by exactly lr, in the direction
of the sign of an interpolation between momentum and gradient. Half of Adam's state, at a three to ten times smaller lr.

======  ================  =======================================  =========
symbol  name              meaning                                  default
======  ================  =======================================  =========
p       parameter         the weights
g       gradient          of the loss by p
m       momentum          running mean of g (whole, not its sign)
c       interpolation     of m and g; its sign is the step
lr      learning rate     step length, >= 0                        1e-4
beta1   for the step      share of m in c, [0, 1)                  0.9
beta2   for the state     share of m in the next m, [0, 1)         0.99
wd      weight decay      decoupled: p shrinks by 1 - lr wd        0
======  ================  =======================================  =========

State: ``m``, float32, the parameter's shape; 4 bytes a parameter.

At t=1 c is (1 - beta1) g, and every weight moves by lr against the sign of g. A beta2 too near 1 makes m a mean of
long ago, and weights go on along old signs; beta2 = beta1 is Signum.

``decay_order`` says whether the old weights shrink before the step, what is left after it, or sgn(c) gets wd p added.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
>>> p, state = rules.lion.update(p, g, rules.lion.init(p), t=1, lr=0.1, wd=0.1)
>>> p, state = rules.lion.update(p, -0.08 * g, state, t=2, lr=0.1, wd=0.1)
>>> print(p, state["m"])
[ 0.7811 -2.1592] [0.00455  0.002275]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt.scalars import f32, sgn
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, **hyper: Any) -> dict[str, Array]:
    """The momentum, zeros."""
    return {"m": np.zeros(p.shape, f32)}


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1e-4,
    beta1: float = 0.9,
    beta2: float = 0.99,
    wd: float = 0.0,
    decay_order: str = "before",
) -> tuple[Array, dict[str, Array]]:
    """One step; both interpolations use the same raw g, the state's after the parameter has moved."""
    omb1, omb2 = f32(1.0 - beta1), f32(1.0 - beta2)
    decay = f32(1.0 - lr * wd)
    lr, beta1, beta2, wd = f32(lr), f32(beta1), f32(beta2), f32(wd)
    m = state["m"]
    if decay_order == "before":
        p = p * decay
    c = beta1 * m + omb1 * g
    u = sgn(c)
    if decay_order == "additive":
        u = u + wd * p
    p = p - lr * u
    if decay_order == "after":
        p = p * decay
    m = beta2 * m + omb2 * g
    return p, {"m": m}


rule = Rule(
    stem="lion",
    title="Lion",
    source="Chen et al., arXiv 2302.06675, Algorithm 2",
    states=(State("m", "momentum", torch="exp_avg"),),
    hypers=(
        Hyper("lr", "lr", 1e-4, "learning rate", low=0),
        Hyper("beta1", "beta1", 0.9, "share of m in the step", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.99, "share of m in the next m", low=0, high=1, torch="betas[1]"),
        Hyper("wd", "wd", 0.0, "weight decay, decoupled: p (1 - lr wd)", low=0, torch="weight_decay"),
        Hyper(
            "decay_order",
            "wd",
            "before",
            "before: the old p shrinks (google/automl); after: the new p does; additive: wd p joins the sign (optax)",
            choices=("before", "after", "additive"),
        ),
    ),
    init=init,
    update=update,
)
