r"""Signum, and signSGD with beta=0 (Bernstein et al., arXiv 1802.04434, Algorithms 2 and 1), decay decoupled.

The sign of a gradient is one bit, cheap to send and safe from outliers. Signum steps by lr along the sign of a running
mean of gradients: Lion with one beta for both of its mixtures.

======  ================  ===================================  =========
symbol  name              meaning                              default
======  ================  ===================================  =========
p       parameter         the weights
g       gradient          of the loss by p
m       momentum          running mean of g (not its sign)
u       direction         sgn(m): 1, -1 or 0
lr      learning rate     step length, >= 0                    1e-4
beta    decay of m        [0, 1)                               0.9
wd      weight decay      decoupled: p shrinks by 1 - lr wd    0
======  ================  ===================================  =========

State: ``m``, float32, the parameter's shape; 4 bytes a parameter, none when ``beta=0``. At t=1 m is (1 - beta) g, whose
sign is that of g, so the first step needs no correction. A beta nearer 1 turns later when gradients turn.

``decay_order`` says whether the old weights shrink before the step, what is left after it, or u gets wd p added.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
>>> p, state = rules.signum.update(p, g, rules.signum.init(p), t=1, lr=0.1, beta=0.8, wd=0.1)
>>> p, state = rules.signum.update(p, np.float32([-0.3, -0.1]), state, t=2, lr=0.1, beta=0.8, wd=0.1)
>>> print(p, state["m"])
[ 0.7811 -2.1592] [0.02 0.02]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt.scalars import f32, sgn
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, beta: float = 0.9, **hyper: Any) -> dict[str, Array]:
    """The momentum, zeros; nothing when ``beta=0``."""
    return {"m": np.zeros(p.shape, f32)} if beta else {}


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1e-4,
    beta: float = 0.9,
    wd: float = 0.0,
    decay_order: str = "before",
) -> tuple[Array, dict[str, Array]]:
    """One step; the sign is that of the new momentum."""
    omb, decay = f32(1.0 - beta), f32(1.0 - lr * wd)
    lr, beta, wd = f32(lr), f32(beta), f32(wd)
    if decay_order == "before":
        p = p * decay
    u = sgn(g)
    if beta:
        m = beta * state["m"] + omb * g
        u, state = sgn(m), {"m": m}
    if decay_order == "additive":
        u = u + wd * p
    p = p - lr * u
    if decay_order == "after":
        p = p * decay
    return p, state


rule = Rule(
    stem="signum",
    title="Signum",
    source="Bernstein et al., arXiv 1802.04434, Algorithm 2",
    states=(State("m", "momentum", when=lambda hyper: hyper["beta"] != 0),),
    hypers=(
        Hyper("lr", "lr", 1e-4, "learning rate", low=0),
        Hyper("beta", "beta", 0.9, "decay of m", low=0, high=1),
        Hyper("wd", "wd", 0.0, "weight decay, decoupled: p (1 - lr wd)", low=0, torch="weight_decay"),
        Hyper(
            "decay_order",
            "wd",
            "before",
            "before: the old p shrinks; after: the new p does; additive: wd p joins the direction (optax)",
            choices=("before", "after", "additive"),
        ),
    ),
    init=init,
    update=update,
)
