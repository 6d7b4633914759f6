r"""LAMB (You et al., arXiv 1904.00962, Algorithm 2), and the rules that share its name.

LARS for Adam: with batches of tens of thousands one rate is too long for some layers and too short for others. LAMB
takes Adam's direction, decay included, and makes the step of each tensor as long as its weights are, times lr.

======  ================  ==================================================  =========
symbol  name              meaning                                             default
======  ================  ==================================================  =========
p       parameter         the weights of one tensor
g       gradient          of the loss by p
m       first moment      running mean of g
v       second moment     running mean of g^2, never negative
u       direction         m / (sqrt(v) + eps), both corrected, plus wd p
wn, un  norms             of all of p, of all of u, in float64
q       trust ratio       phi(wn) / un; 1 if a norm is 0
phi     bounds            phi(wn) = wn, kept in [phi_low, phi_high]           0, None
lr      learning rate     >= 0                                                1e-3
beta1   decay of m        [0, 1)                                              0.9
beta2   decay of v        [0, 1)                                              0.999
eps     guard             added to sqrt(v), >= 0                              1e-6
wd      weight decay      wd p joins u, >= 0                                  1e-2
======  ================  ==================================================  =========

State: ``m`` and ``v``, float32, the parameter's shape; 8 bytes a parameter. u is not kept: a second reading computes
it again. Cutting or joining tensors changes the norms, so it changes the result.

At t=1 u is the sign of g, and wd p: the tensor moves by lr wn as a whole. A wrong beta2 turns the direction and no
more, as q makes every step lr phi(wn) long.

``variant="apex"`` leaves q = 1 where wd = 0, as apex does unless use_nvlamb. ``variant="clip"`` is what bitsandbytes
calls LAMB: AdamW whose step is only cut, to ``max_unorm`` wn, and whose decay comes after it. ``bias_correction=False``
takes m and v as they are. ``exclude_1d`` lets biases and norms go without q and without decay.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([[3, -4]]), np.float32([[0.5, 0.25]])
>>> p, state = rules.lamb.update(p, g, rules.lamb.init(p), t=1, lr=0.1, wd=0.2)
>>> p, state = rules.lamb.update(p, np.float32([[-2, 1]]) * g, state, t=2, lr=0.1, wd=0.2)
>>> print(p.round(4), state["m"].round(4), state["v"].round(6))
[[ 2.2256 -4.4496]] [[-0.055   0.0475]] [[0.00125  0.000125]]
"""

from __future__ import annotations

from math import inf, sqrt
from typing import Any

import numpy as np

from refopt.reduce import norm64
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
    eps: float = 1e-6,
    wd: float = 1e-2,
    phi_low: float = 0.0,
    phi_high: float | None = None,
    bias_correction: bool = True,
    variant: str = "paper",
    max_unorm: float = 1.0,
    exclude_1d: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """One step of one whole tensor."""
    bare = exclude_1d and p.ndim <= 1
    wd = 0.0 if bare else wd
    bc1, bc2 = (1.0 - ipow(beta1, t), 1.0 - ipow(beta2, t)) if bias_correction else (1.0, 1.0)
    omb1, omb2 = f32(1.0 - beta1), f32(1.0 - beta2)
    ibc1, ir2, decay = f32(1.0 / bc1), f32(1.0 / sqrt(bc2)), f32(1.0 - lr * wd)
    beta1, beta2, eps = f32(beta1), f32(beta2), f32(eps)
    m = beta1 * state["m"] + omb1 * g
    v = beta2 * state["v"] + omb2 * (g * g)
    d = np.sqrt(v) * ir2 + eps
    r = f32(1) / d
    u = (m * ibc1) * r
    if variant != "clip":
        u = u + f32(wd) * p
    wn, un = norm64(p), norm64(u)
    if bare or not (wn > 0 and un > 0) or (variant == "apex" and wd == 0):
        q = 1.0
    elif variant == "clip":
        q = min(1.0, max_unorm * wn / un)
    else:
        q = min(max(wn, phi_low), inf if phi_high is None else phi_high) / un
    s = f32(lr * q)
    p = p - s * u
    if variant == "clip":
        p = p * decay
    return p, {"m": m, "v": v}


def together(call: str, hyper: dict[str, Any]) -> None:
    """phi keeps the norm between two bounds."""
    low, high = hyper["phi_low"], hyper["phi_high"]
    if high is not None and low > high:
        raise ValueError(f"{call}: phi_low must be <= phi_high, got phi_low={low!r}, phi_high={high!r}")


rule = Rule(
    stem="lamb",
    title="LAMB",
    source="You et al., arXiv 1904.00962, Algorithm 2",
    states=(State("m", "first moment"), State("v", "second moment", nonnegative=True)),
    hypers=(
        Hyper("lr", "lr", 1e-3, "learning rate", low=0),
        Hyper("beta1", "beta1", 0.9, "decay of m", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.999, "decay of v", low=0, high=1, torch="betas[1]"),
        Hyper("eps", "eps", 1e-6, "added to sqrt(v)", low=0, torch="eps"),
        Hyper("wd", "wd", 1e-2, "weight decay (1e-2 in apex, 0 in optax): wd p joins u", low=0, torch="weight_decay"),
        Hyper("phi_low", "phi", 0.0, "least norm of the weights that counts", low=0),
        Hyper(
            "phi_high", "phi", None, "greatest norm of the weights that counts; None: no bound", low=0, optional=True
        ),
        Hyper("bias_correction", "bias_correction", True, "divide m and v by 1 - beta^t (False: apex's option)"),
        Hyper(
            "variant",
            "q",
            "paper",
            "paper: phi(wn) / un; apex: that, but 1 where wd = 0; clip: AdamW, cut to max_unorm wn (bitsandbytes)",
            choices=("paper", "apex", "clip"),
        ),
        Hyper("max_unorm", "max_unorm", 1.0, "of the clip variant: longest u beside the weights' norm", low=0),
        Hyper("exclude_1d", "exclude_1d", False, "vectors and scalars go without q and without decay"),
    ),
    init=init,
    update=update,
    together=together,
    scope="tensor",
    tier="T1",
)
