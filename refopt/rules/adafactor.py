r"""Adafactor (Shazeer & Stern, arXiv 1804.04235, Algorithms 4 to 6), in the dialect of transformers.

Adam's second moment is as large as the weights. Adafactor keeps only its row means R and column means C and rebuilds
V_ij = R_i C_j / mean(R), the best rank-1 fit; it clips the update instead of correcting a bias, and scales it by the
size of the weights.

======  ===============  ==================================================================  =======
symbol  name             meaning                                                             default
======  ===============  ==================================================================  =======
p       parameter        the weights; two or more axes are factored over the last two
g       gradient         of the loss by p
R, C    factors          running means of g^2 over columns, over rows; never negative
V       second moment    running mean of g^2 where there are no two axes to factor
m       momentum         running mean of the updates alpha U, kept if beta1 is given
b2      decay of V       1 - t^c; 0 at t=1, so there is no bias to correct
U       update           g / sqrt(V), its root mean square cut to d
rho     relative step    min(1e-2, 1 / sqrt(t)), or lr
alpha   step length      rho max(eps2, RMS(p)), or rho without scale_parameter
lr      learning rate    only with relative_step=False                                       None
eps1    guard            added to g^2                                                        1e-30
eps2    guard            least RMS(p) that counts                                            1e-3
d       clip             greatest RMS of U, > 0                                              1
c       decay_rate       exponent of 1 - b2, <= 0                                            -0.8
beta1   decay of m       [0, 1), or None: no m                                               None
wd      weight decay     p shrinks by 1 - alpha wd                                           0
======  ===============  ==================================================================  =======

``warmup_init`` starts rho at 1e-6 t. ``variant="torch"`` is torch.optim.Adafactor: rho = min(lr, 1 / sqrt(t)) with
lr = 1e-2, decay by lr wd, and eps1 = 2^-23 is not added to g^2 but is the least mean(R) and the least sqrt(V), so that
gradients below it hardly move a weight.

State: ``R`` and ``C``, 4 (m + n) bytes for m x n weights, next to nothing; ``V`` for vectors and ``m`` if beta1 is
given, 4 bytes a parameter each. All float32.

At t=1 b2 is 0: V is g^2 itself, and U is the sign of g if g is of rank 1. A decay_rate nearer 0 forgets sooner, until
every U is near a sign; one further away hears less and less of new gradients.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([[1, -2], [3, 0.5]]), np.float32([[0.5, 0.25], [-0.1, 0.8]])
>>> p, state = rules.adafactor.update(p, g, rules.adafactor.init(p), t=1, wd=0.5)
>>> p, state = rules.adafactor.update(p, np.float32([[3, -1], [2, 0.1]]) * g, state, t=2, wd=0.5)
>>> print(p.astype(float).round(4).tolist(), state["R"].round(4), state["C"].round(4))
[[0.9256, -1.9629], [2.9556, 0.4643]] [0.7306 0.1517] [0.713  0.1693]
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from refopt.reduce import r256_rows, rms, row_and_column_means
from refopt.scalars import f32
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, beta1: float | None = None, **hyper: Any) -> dict[str, Array]:
    """Zeros: both factors, or V for a vector; m if beta1 is given."""
    shapes = {"R": p.shape[:-1], "C": p.shape[:-2] + p.shape[-1:]} if p.ndim > 1 else {"V": p.shape}
    shapes |= {} if beta1 is None else {"m": p.shape}
    return {name: np.zeros(shape, f32) for name, shape in shapes.items()}


def relative(t: int, lr: float | None, warmup_init: bool) -> float:
    """The relative step size rho; `lr` is its cap, None but in variant torch."""
    cap = lr if lr is not None else 1e-6 * t if warmup_init else 1e-2
    return min(cap, 1.0 / sqrt(t))


def guards(eps1: float | None, variant: str) -> tuple[Any, Any, Any]:
    """What is added to g^2, the least mean(R) that counts, and the greatest 1 / sqrt(V)."""
    if variant == "transformers":
        return f32(1e-30 if eps1 is None else eps1), f32(0), f32(np.inf)
    low = 2.0**-23 if eps1 is None else eps1
    return f32(0), f32(low), f32(1.0 / low if low else np.inf)


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float | None = None,
    eps1: float | None = None,
    eps2: float = 1e-3,
    clip: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    wd: float = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
    variant: str = "transformers",
) -> tuple[Array, dict[str, Array]]:
    """One step; alpha is measured on the weights before they decay."""
    if not p.size:
        return p, state
    b2 = 1.0 - float(t) ** decay_rate
    rho = relative(t, lr, warmup_init) if relative_step or lr is None else lr
    alpha = f32((np.maximum(eps2, float(rms(p))) if scale_parameter else 1.0) * rho)
    shrink = float(alpha) if variant == "transformers" else 1e-2 if lr is None else lr
    omb2, b2, decay = f32(1.0 - b2), f32(b2), f32(1.0 - wd * shrink)
    add, low, top = guards(eps1, variant)
    q = g * g + add
    if p.ndim > 1:
        rows, columns = row_and_column_means(q)
        R = b2 * state["R"] + omb2 * rows
        C = b2 * state["C"] + omb2 * columns
        mu = np.maximum(r256_rows(R.reshape(-1, p.shape[-2])) / p.shape[-2], low).astype(f32)
        rf = f32(1) / np.sqrt(R / mu.reshape(*p.shape[:-2], 1))
        cf = f32(1) / np.sqrt(C)
        U = np.minimum(rf[..., :, None] * cf[..., None, :], top) * g
        new = {"R": R, "C": C}
    else:
        V = b2 * state["V"] + omb2 * q
        U = np.minimum(f32(1) / np.sqrt(V), top) * g
        new = {"V": V}
    U = U * (f32(1) / np.maximum(f32(1), f32(float(rms(U)) / clip)))
    U = alpha * U
    if beta1 is not None:
        m = f32(beta1) * state["m"] + f32(1.0 - beta1) * U
        U, new = m, new | {"m": m}
    p = p * decay
    p = p - U
    return p, new


def together(call: str, hyper: dict[str, Any]) -> None:
    """The signs of d and c; a learning rate is given or made, never both; variant torch has fewer switches."""
    if hyper["clip"] <= 0:
        raise ValueError(f"{call}: clip must be > 0, got {hyper['clip']!r}")
    if hyper["decay_rate"] > 0:
        raise ValueError(f"{call}: decay_rate must be <= 0, got {hyper['decay_rate']!r}")
    if hyper["warmup_init"] and not hyper["relative_step"]:
        raise ValueError(f"{call}: warmup_init needs relative_step=True, got relative_step=False")
    if not hyper["relative_step"] and hyper["lr"] is None:
        raise ValueError(f"{call}: lr must be given with relative_step=False, got None")
    if hyper["variant"] == "transformers" and hyper["relative_step"] and hyper["lr"] is not None:
        raise ValueError(f"{call}: lr must be None with relative_step=True, got {hyper['lr']!r}")
    fixed = {"scale_parameter": True, "relative_step": True, "warmup_init": False, "beta1": None}
    for name, value in fixed.items() if hyper["variant"] == "torch" else ():
        if hyper[name] != value:
            raise ValueError(f"{call}: {name} must be {value!r} with variant='torch', got {hyper[name]!r}")


rule = Rule(
    stem="adafactor",
    title="Adafactor",
    source="Shazeer & Stern, arXiv 1804.04235, Algorithms 4 to 6",
    states=(
        State(
            "R",
            "row factor",
            nonnegative=True,
            torch="row_var",
            shape=lambda shape, hyper: shape[:-1] if len(shape) > 1 else None,
            coded=False,
        ),
        State(
            "C",
            "column factor",
            nonnegative=True,
            torch="col_var",
            shape=lambda shape, hyper: shape[:-2] + shape[-1:] if len(shape) > 1 else None,
            coded=False,
        ),
        State(
            "V",
            "second moment of a vector",
            nonnegative=True,
            torch="variance",
            shape=lambda shape, hyper: shape if len(shape) < 2 else None,
        ),
        State("m", "momentum of the updates", when=lambda hyper: hyper["beta1"] is not None),
    ),
    hypers=(
        Hyper("lr", "lr", None, "learning rate without relative_step; torch: greatest rho", low=0, optional=True),
        Hyper("eps1", "eps1", None, "1e-30, added to g^2; torch: 2^-23, least sqrt(V)", low=0, optional=True),
        Hyper("eps2", "eps2", 1e-3, "least RMS(p) that counts", low=0),
        Hyper("clip", "d", 1.0, "greatest RMS of the update", torch="d"),
        Hyper("decay_rate", "c", -0.8, "exponent of 1 - b2", torch="beta2_decay"),
        Hyper("beta1", "beta1", None, "decay of m; None: no m", low=0, high=1, optional=True),
        Hyper("wd", "wd", 0.0, "weight decay, decoupled: p (1 - alpha wd)", low=0, torch="weight_decay"),
        Hyper("scale_parameter", "scale_parameter", True, "alpha = rho max(eps2, RMS(p)), not rho"),
        Hyper("relative_step", "relative_step", True, "rho = min(1e-2, 1 / sqrt(t)), not lr"),
        Hyper("warmup_init", "warmup_init", False, "rho = min(1e-6 t, 1 / sqrt(t))"),
        Hyper("variant", "variant", "transformers", "whose dialect", choices=("transformers", "torch")),
    ),
    init=init,
    update=update,
    together=together,
    scope="tensor",
    tier="T1",
)
