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

State: ``m`` and ``v``, float32, the parameter's shape; 8 bytes a parameter. ``amsgrad`` (Reddi et al. 2018) divides by
the largest v so far and keeps it: ``w``, 4 bytes more.

At t=1 the corrections undo the zeros that m and v began with: every weight moves by lr, against the sign of g. A
beta2 near 1 forgets slowly: after quiet steps a sudden gradient moves a weight by up to (1 - beta1) / sqrt(1 - beta2)
lr, 3.2 lr by default. A small one makes v the last gradient's square: the step is m over the size of g, which leaps
where g comes near 0.

Libraries differ, and each difference has a name here. ``decay="decoupled"``: AdamW. ``eps_at``: whether eps meets
sqrt(v) after the correction, before it, or v itself. ``bias_correction=False``: none.

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


def init(p: Array, amsgrad: bool = False, **hyper: Any) -> dict[str, Array]:
    """Both moments, and the largest second one if ``amsgrad``, zeros."""
    return {name: np.zeros(p.shape, f32) for name in ("m", "v", *(["w"] if amsgrad else []))}


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
    amsgrad: bool = False,
    bias_correction: bool = True,
    eps_at: str = "outside",
    decay: str = "coupled",
) -> tuple[Array, dict[str, Array]]:
    """One step; the bias corrections are folded into `step` and `ir2`, as one host scalar each."""
    bc1, bc2 = (1.0 - ipow(beta1, t), 1.0 - ipow(beta2, t)) if bias_correction else (1.0, 1.0)
    omb1, omb2 = f32(1.0 - beta1), f32(1.0 - beta2)
    step, ir2, keep = f32(lr / bc1), f32(1.0 / sqrt(bc2)), f32(1.0 - lr * wd)
    beta1, beta2, eps, wd = f32(beta1), f32(beta2), f32(eps), f32(wd)
    if decay == "decoupled":
        p = p * keep
    elif wd:
        g = g + wd * p
    m = beta1 * state["m"] + omb1 * g
    v = beta2 * state["v"] + omb2 * (g * g)
    z, new = v, {"m": m, "v": v}
    if amsgrad:
        w = np.maximum(state["w"], v)
        z, new = w, new | {"w": w}
    if eps_at == "uncorrected":
        d = (np.sqrt(z) + eps) * ir2
    elif eps_at == "inside":
        d = np.sqrt(z + eps) * ir2
    else:
        d = np.sqrt(z) * ir2 + eps
    r = f32(1) / d
    p = p - step * (m * r)
    return p, new


rule = Rule(
    stem="adam",
    title="Adam",
    source="Kingma & Ba, arXiv 1412.6980, Algorithm 1",
    states=(
        State("m", "first moment", torch="exp_avg"),
        State("v", "second moment", nonnegative=True, torch="exp_avg_sq"),
        State("w", "largest v so far", True, "max_exp_avg_sq", when=lambda hyper: hyper["amsgrad"]),
    ),
    hypers=(
        Hyper("lr", "lr", 1e-3, "learning rate", low=0),
        Hyper("beta1", "beta1", 0.9, "decay of m", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.999, "decay of v", low=0, high=1, torch="betas[1]"),
        Hyper("eps", "eps", 1e-8, "added to sqrt(v)", low=0, torch="eps"),
        Hyper("wd", "wd", 0.0, "weight decay, coupled: g + wd p", low=0, torch="weight_decay"),
        Hyper("amsgrad", "amsgrad", False, "divide by the largest v so far", torch="amsgrad"),
        Hyper("bias_correction", "bias_correction", True, "divide m and v by 1 - beta^t (False: apex, DeepSpeed)"),
        Hyper(
            "eps_at",
            "eps",
            "outside",
            "outside: corrected sqrt(v), then + eps (torch, bitsandbytes); uncorrected: sqrt(v) + eps, then corrected "
            "(GaLore, APOLLO); inside: sqrt(v + eps), then corrected (apex's eps_inside_sqrt)",
            choices=("outside", "uncorrected", "inside"),
        ),
        Hyper(
            "decay",
            "wd",
            "coupled",
            "coupled: g + wd p (torch); decoupled: p (1 - lr wd) (bitsandbytes; torch's decoupled_weight_decay)",
            choices=("coupled", "decoupled"),
        ),
    ),
    init=init,
    update=update,
)
