r"""AdEMAMix (Pagliardini, Ablin & Grangier, arXiv 2409.03137, Algorithm 1), decay decoupled and before the step.

A gradient from ten thousand steps ago still helps, and Adam has forgotten it: a mean slow enough to remember would be
too slow to steer by. AdEMAMix keeps both, a fast mean and a very slow one, and steps along their mixture.

=======  ===============  ===========================================  =========
symbol   name             meaning                                      default
=======  ===============  ===========================================  =========
p        parameter        the weights
g        gradient         of the loss by p
m1       fast mean        running mean of g, bias-corrected
m2       slow mean        running mean of g, on purpose not corrected
v        second moment    running mean of g^2, never negative
lr       learning rate    step length, >= 0                            1e-3
beta1    decay of m1      [0, 1)                                       0.9
beta2    decay of v       [0, 1)                                       0.999
beta3    decay of m2      [0, 1)                                       0.9999
alpha    share of m2      >= 0; 2 to 10 in the paper                   2
T_alpha  ramp of alpha    steps from 0 to alpha, None: at once         None
T_beta3  ramp of beta3    steps from beta1 to beta3, None: at once     None
eps      guard            added to sqrt(v), >= 0                       1e-8
wd       weight decay     decoupled: p shrinks by 1 - lr wd            0
=======  ===============  ===========================================  =========

State: ``m1`` (none when ``beta1=0``), ``m2`` and ``v``, float32, the parameter's shape; 12 bytes a parameter. Both
corrections of AdamW are there, so at t=1 m1 counts whole and m2 with 1 - beta3. With ``alpha=0`` it is AdamW bit for
bit: ``a`` carries the correction of m1 that ``step`` takes away from m2.

A wrong beta2 does what it does to AdamW. A beta3 as small as beta1 makes the slow mean a second fast one: the step is
some alpha times longer, and remembers nothing more.

The ramps: alpha grows in proportion to t; the half-life of m2, not beta3 itself, grows in proportion to t.
``decay_order``: the old weights shrink before the step, what is left after it, or wd p joins the step.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
>>> state, hyper = rules.ademamix.init(p), {"lr": 0.1, "beta3": 0.99, "alpha": 5, "wd": 0.1, "t_beta3": 4}
>>> p, state = rules.ademamix.update(p, g, state, t=1, **hyper)
>>> p, state = rules.ademamix.update(p, -2 * g, state, t=2, **hyper)
>>> print(p.round(5), state["m1"].round(5), state["m2"].round(5), state["v"].round(6))
[ 0.90442 -2.03588] [-0.055  -0.0275] [-0.00308 -0.00154] [0.00125  0.000312]
"""

from __future__ import annotations

from math import exp, log, sqrt
from typing import Any

import numpy as np

from refopt.scalars import f32, ipow
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, beta1: float = 0.9, **hyper: Any) -> dict[str, Array]:
    """The two means and the second moment, zeros; no fast mean when ``beta1=0``."""
    return {name: np.zeros(p.shape, f32) for name in (["m1"] if beta1 else []) + ["m2", "v"]}


def ramped(beta1: float, beta3: float, part: float) -> float:
    """beta3 while its half-life grows: at part 0 beta1, at part 1 beta3, between them linear in 1 / log beta."""
    return exp(log(beta1) * log(beta3) / ((1.0 - part) * log(beta3) + part * log(beta1)))


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta3: float = 0.9999,
    alpha: float = 2.0,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
    eps: float = 1e-8,
    wd: float = 0.0,
    decay_order: str = "before",
) -> tuple[Array, dict[str, Array]]:
    """One step; m1 is divided by bc1 through `step`, and m2, which is not to be, is multiplied by it through `a`."""
    alpha = alpha * t / t_alpha if t_alpha and t < t_alpha else alpha
    beta3 = ramped(beta1, beta3, t / t_beta3) if t_beta3 and t < t_beta3 else beta3
    bc1, bc2 = 1.0 - ipow(beta1, t), 1.0 - ipow(beta2, t)
    omb1, omb2, omb3 = f32(1.0 - beta1), f32(1.0 - beta2), f32(1.0 - beta3)
    step, ibc1, ir2 = f32(lr / bc1), f32(1.0 / bc1), f32(1.0 / sqrt(bc2))
    a, decay = f32(alpha * bc1), f32(1.0 - lr * wd)
    lr, beta1, beta2, beta3, eps, wd = f32(lr), f32(beta1), f32(beta2), f32(beta3), f32(eps), f32(wd)
    if decay_order == "before":
        p = p * decay
    new, m1 = {}, g
    if beta1:
        m1 = beta1 * state["m1"] + omb1 * g
        new = {"m1": m1}
    m2 = beta3 * state["m2"] + omb3 * g
    v = beta2 * state["v"] + omb2 * (g * g)
    d = np.sqrt(v) * ir2 + eps
    num = m1 + a * m2
    r = f32(1) / d
    if decay_order == "additive":
        u = (num * ibc1) * r + wd * p
        p = p - lr * u
    else:
        p = p - step * (num * r)
    if decay_order == "after":
        p = p * decay
    return p, new | {"m2": m2, "v": v}


def together(call: str, hyper: dict[str, Any]) -> None:
    """The ramp of beta3 takes logarithms of both betas."""
    if hyper["t_beta3"] is not None and not (hyper["beta1"] > 0 and hyper["beta3"] > 0):
        raise ValueError(
            f"{call}: t_beta3 needs beta1 > 0 and beta3 > 0, got beta1={hyper['beta1']!r}, beta3={hyper['beta3']!r}"
        )


rule = Rule(
    stem="ademamix",
    title="AdEMAMix",
    source="Pagliardini et al., arXiv 2409.03137, Algorithm 1",
    states=(
        State("m1", "fast mean", when=lambda hyper: hyper["beta1"] != 0),
        State("m2", "slow mean"),
        State("v", "second moment", nonnegative=True),
    ),
    hypers=(
        Hyper("lr", "lr", 1e-3, "learning rate", low=0),
        Hyper("beta1", "beta1", 0.9, "decay of m1", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.999, "decay of v", low=0, high=1, torch="betas[1]"),
        Hyper("beta3", "beta3", 0.9999, "decay of m2", low=0, high=1, torch="betas[2]"),
        Hyper("alpha", "alpha", 2.0, "share of m2 (2 in apple/ml-ademamix, 5 in bitsandbytes)", low=0),
        Hyper("t_alpha", "T_alpha", None, "steps in which alpha grows from 0", low=1, whole=True, optional=True),
        Hyper("t_beta3", "T_beta3", None, "steps in which beta3 grows from beta1", low=1, whole=True, optional=True),
        Hyper("eps", "eps", 1e-8, "added to sqrt(v)", low=0, torch="eps"),
        Hyper("wd", "wd", 0.0, "weight decay, decoupled: p (1 - lr wd)", low=0, torch="weight_decay"),
        Hyper(
            "decay_order",
            "wd",
            "before",
            "before: the old p shrinks; after: the new p does (bitsandbytes on CUDA); additive: wd p joins the step "
            "(apple/ml-ademamix)",
            choices=("before", "after", "additive"),
        ),
    ),
    init=init,
    update=update,
    together=together,
)
