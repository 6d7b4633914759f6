r"""LARS (You, Gitman & Ginsburg, arXiv 1708.03888, Algorithm 1 and Equation 6), and the rules that share its name.

With large batches one rate is too long for layers whose gradient is large beside their weights, and they diverge. LARS
gives each tensor its own: the step is a fixed share of the norm of the weights, whatever the norm of the gradient.

======  ===============  ================================================  =========
symbol  name             meaning                                           default
======  ===============  ================================================  =========
p       parameter        the weights of one tensor
g       gradient         of the loss by p
wn, gn  norms            of all of p, of all of g, in float64
q       local rate       eta wn / (gn + wd wn + eps); 1 if a norm is 0
v       velocity         running sum of steps; lr and q stand inside
lr      learning rate    >= 0                                              1
eta     trust            share of wn that a step is long, >= 0             1e-3
mu      momentum         share of v kept, [0, 1)                           0.9
wd      weight decay     coupled (L2), >= 0                                0
eps     guard            added to the norms, >= 0                          0
======  ===============  ================================================  =========

State: ``v``, float32, the parameter's shape; 4 bytes a parameter. A change of lr does not rescale what v remembers. A
layer of zeros has q = 1: with q = 0 it would never move.

At t=1 v is the scaled gradient: without decay the tensor moves by lr trust wn. A momentum too near 1 adds up steps
whose q was that of other weights.

``variant="optax"`` divides by the norm of g + wd p instead. ``variant="clip"`` is what bitsandbytes calls LARS: SGD
with momentum, lr outside v, whose step is only cut to ``max_unorm`` wn, measured without decay. ``exclude_1d`` lets
biases and norms go without q and without decay.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([[3, -4]]), np.float32([[0.5, 0.25]])
>>> p, state = rules.lars.update(p, g, rules.lars.init(p), t=1, trust=0.1, momentum=0.5, wd=0.2)
>>> p, state = rules.lars.update(p, -2 * g, state, t=2, trust=0.1, momentum=0.5, wd=0.2)
>>> print(p.round(4), state["v"].round(4))
[[ 2.5777 -3.4482]] [[ 0.0695 -0.3754]]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt.reduce import norm64
from refopt.scalars import f32
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, **hyper: Any) -> dict[str, Array]:
    """The velocity, zeros."""
    return {"v": np.zeros(p.shape, f32)}


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1.0,
    trust: float = 1e-3,
    momentum: float = 0.9,
    wd: float = 0.0,
    eps: float = 0.0,
    variant: str = "paper",
    max_unorm: float = 0.02,
    exclude_1d: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """One step of one whole tensor."""
    bare = exclude_1d and p.ndim <= 1
    wd = 0.0 if bare else wd
    mu, wd32 = f32(momentum), f32(wd)
    d = g + wd32 * p
    wn = norm64(p)
    if variant == "clip":
        un = norm64(mu * state["v"] + g)
        q = max_unorm * wn / un if un > max_unorm * wn > 0 and not bare else 1.0
        s = f32(lr * q)
        v = mu * state["v"] + d
        p = p - s * v
    else:
        gn = norm64(d) if variant == "optax" else norm64(g)
        size = gn + eps if variant == "optax" else gn + wd * wn + eps
        q = trust * wn / size if wn > 0 and gn > 0 and not bare else 1.0
        s = f32(lr * q)
        v = mu * state["v"] + s * d
        p = p - v
    return p, {"v": v}


rule = Rule(
    stem="lars",
    title="LARS",
    source="You, Gitman & Ginsburg, arXiv 1708.03888, Algorithm 1",
    states=(State("v", "velocity"),),
    hypers=(
        Hyper("lr", "lr", 1.0, "learning rate", low=0),
        Hyper("trust", "eta", 1e-3, "share of the weights' norm that a step is long", low=0),
        Hyper("momentum", "mu", 0.9, "share of the velocity kept", low=0, high=1, torch="momentum"),
        Hyper("wd", "wd", 0.0, "weight decay, coupled: g + wd p", low=0, torch="weight_decay"),
        Hyper("eps", "eps", 0.0, "added to the norms", low=0, torch="eps"),
        Hyper(
            "variant",
            "q",
            "paper",
            "paper: eta wn / (gn + wd wn); optax: eta wn / norm(g + wd p); clip: SGD, cut to max_unorm wn (bnb)",
            choices=("paper", "optax", "clip"),
        ),
        Hyper("max_unorm", "max_unorm", 0.02, "of the clip variant: longest step beside the weights' norm", low=0),
        Hyper("exclude_1d", "exclude_1d", False, "vectors and scalars go without q and without decay"),
    ),
    init=init,
    update=update,
    scope="tensor",
    tier="T1",
)
