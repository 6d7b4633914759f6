r"""CAME (Luo et al., arXiv 2307.02047, Algorithm 2): Adafactor with momentum, slowed where the momentum is unsure.

A rank-1 second moment makes mistakes, and momentum keeps them. CAME measures how far each update strays from the
momentum, keeps that, too, as row and column means, and divides the momentum by it: what is steady moves fast.

======  ===============  ==================================================================  =======
symbol  name             meaning                                                             default
======  ===============  ==================================================================  =======
p       parameter        the weights; two or more axes are factored over the last two
g       gradient         of the loss by p
R, C    factors          running means of g^2 over columns, over rows; never negative
V       second moment    running mean of g^2 where there are no two axes to factor
U       update           g / sqrt(V), its root mean square cut to d
m       momentum         running mean of U
e       instability      (U - m)^2 + eps2
Rr, Cr  its factors      running means of e over columns, over rows; never negative
W       step             m / sqrt(instability); m for a vector
lr      learning rate    step length, > 0                                                    2e-4
beta1   decay of m       [0, 1)                                                              0.9
beta2   decay of R, C    [0, 1); no bias correction: early updates are cut by d              0.999
beta3   decay of Rr, Cr  [0, 1)                                                              0.9999
eps1    guard            added to g^2                                                        1e-30
eps2    guard            added to (U - m)^2                                                  1e-16
d       clip             greatest RMS of U, > 0                                              1
wd      weight decay     decoupled: p shrinks by 1 - lr wd                                   0
======  ===============  ==================================================================  =======

State: ``m``, 4 bytes a parameter; ``R``, ``C``, ``Rr``, ``Cr``, 8 (m + n) bytes for m x n weights; a vector keeps ``V``
instead of the four, 4 bytes a parameter. All float32.

At t=1 V lacks a correction and is far too small, and the clip alone sets U; m is 0.1 U. A beta2 nearer 1 makes that
last longer.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([[1, -2], [3, 0.5]]), np.float32([[0.5, 0.25], [-0.1, 0.8]])
>>> p, state = rules.came.update(p, g, rules.came.init(p), t=1, lr=1e-3, wd=10)
>>> p, state = rules.came.update(p, np.float32([[3, -1], [2, 0.1]]) * g, state, t=2, lr=1e-3, wd=10)
>>> print(p.astype(float).round(4).tolist(), state["R"].round(6), state["Cr"].round(6))
[[0.9499, -1.9645], [2.9501, 0.4475]] [0.001312 0.000348] [2.27e-04 7.40e-05]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt.reduce import r256_rows, rms, row_and_column_means
from refopt.scalars import f32
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, **hyper: Any) -> dict[str, Array]:
    """Zeros."""
    return {name: np.zeros(shape, f32) for name, shape in rule.shapes(p.shape, hyper).items()}


def inverse_root(R: Array, C: Array) -> Array:
    """1 / sqrt(V) of V_ij = R_i C_j / mean(R)."""
    mu = (r256_rows(R.reshape(-1, R.shape[-1])) / R.shape[-1]).astype(f32)
    rf = f32(1) / np.sqrt(R / mu.reshape(*R.shape[:-1], 1))
    cf = f32(1) / np.sqrt(C)
    return rf[..., :, None] * cf[..., None, :]


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 2e-4,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta3: float = 0.9999,
    eps1: float = 1e-30,
    eps2: float = 1e-16,
    clip: float = 1.0,
    wd: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """One step; U is measured against the m that it has entered already."""
    if not p.size:
        return p, state
    omb1, omb2, omb3 = f32(1.0 - beta1), f32(1.0 - beta2), f32(1.0 - beta3)
    decay = f32(1.0 - lr * wd)
    lr, beta1, beta2, beta3, eps1, eps2 = f32(lr), f32(beta1), f32(beta2), f32(beta3), f32(eps1), f32(eps2)
    q = g * g + eps1
    if p.ndim > 1:
        rows, columns = row_and_column_means(q)
        R = beta2 * state["R"] + omb2 * rows
        C = beta2 * state["C"] + omb2 * columns
        U = inverse_root(R, C) * g
        new = {"R": R, "C": C}
    else:
        V = beta2 * state["V"] + omb2 * q
        U = f32(1) / np.sqrt(V) * g
        new = {"V": V}
    U = U * (f32(1) / np.maximum(f32(1), f32(float(rms(U)) / clip)))
    m = beta1 * state["m"] + omb1 * U
    W, new = m, new | {"m": m}
    if p.ndim > 1:
        e = (U - m) * (U - m) + eps2
        rows, columns = row_and_column_means(e)
        Rr = beta3 * state["Rr"] + omb3 * rows
        Cr = beta3 * state["Cr"] + omb3 * columns
        W = inverse_root(Rr, Cr) * m
        new = new | {"Rr": Rr, "Cr": Cr}
    p = p * decay
    p = p - lr * W
    return p, new


def together(call: str, hyper: dict[str, Any]) -> None:
    """A step of no length, or an update of no size, is refused."""
    for name in ("lr", "clip"):
        if hyper[name] <= 0:
            raise ValueError(f"{call}: {name} must be > 0, got {hyper[name]!r}")


def per_row(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...] | None:
    """One entry a row."""
    return shape[:-1] if len(shape) > 1 else None


def per_column(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...] | None:
    """One entry a column."""
    return shape[:-2] + shape[-1:] if len(shape) > 1 else None


def per_vector(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...] | None:
    """One entry a weight, for a vector."""
    return shape if len(shape) < 2 else None


rule = Rule(
    stem="came",
    title="CAME",
    source="Luo et al., arXiv 2307.02047, Algorithm 2",
    states=(
        State("R", "row factor", nonnegative=True, shape=per_row, coded=False),
        State("C", "column factor", nonnegative=True, shape=per_column, coded=False),
        State("V", "second moment of a vector", nonnegative=True, shape=per_vector),
        State("m", "momentum"),
        State("Rr", "row factor of the instability", nonnegative=True, shape=per_row, coded=False),
        State("Cr", "column factor of the instability", nonnegative=True, shape=per_column, coded=False),
    ),
    hypers=(
        Hyper("lr", "lr", 2e-4, "learning rate, > 0"),
        Hyper("beta1", "beta1", 0.9, "decay of m", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.999, "decay of R, C, V", low=0, high=1, torch="betas[1]"),
        Hyper("beta3", "beta3", 0.9999, "decay of Rr, Cr", low=0, high=1, torch="betas[2]"),
        Hyper("eps1", "eps1", 1e-30, "added to g^2", low=0, torch="eps[0]"),
        Hyper("eps2", "eps2", 1e-16, "added to (U - m)^2", low=0, torch="eps[1]"),
        Hyper("clip", "d", 1.0, "greatest RMS of the update", torch="clip_threshold"),
        Hyper("wd", "wd", 0.0, "weight decay, decoupled: p (1 - lr wd)", low=0, torch="weight_decay"),
    ),
    init=init,
    update=update,
    together=together,
    scope="tensor",
    tier="T1",
)
