r"""SM3 (Anil, Gupta, Koren & Singer, arXiv 1901.11150, Algorithms SM3-I and SM3-II): Adagrad under a cover.

Adagrad keeps a sum of squares for every weight. SM3 keeps one number for each row and one for each column (each index
of each axis), the greatest that any weight under it needs; a weight reads the least of those that cover it, which is
never less than its own sum, so a step is never longer than Adagrad's.

======  ===============  ============================================================  =======
symbol  name             meaning                                                       default
======  ===============  ============================================================  =======
p       parameter        the weights
g       gradient         of the loss by p
mu      accumulators     for each index of each axis, axis after axis; never negative
nu      estimate         least of the mu that cover a weight; in II g^2 is added
u       update           g / sqrt(nu); 0 where nothing has come yet
m       momentum         running mean of u, kept if beta > 0
lr      learning rate    step length, >= 0; tuned like Adagrad's                       0.1
beta    momentum         decay of m, [0, 1)                                            0.9
eps     guard            added to nu under the root, >= 0                              0
======  ===============  ============================================================  =======

``variant="II"`` adds g^2 to what the cover says of each weight and then takes the greatest: the tighter one, as in
TensorFlow (eps=1e-30) and optax (eps=1e-8). ``variant="I"`` adds the greatest g^2 to the accumulators at once.

State: ``mu``, 4 bytes for each index of each axis, 4 (m + n) for m x n weights; a vector is its own cover, 4 bytes a
parameter (this is Adagrad). ``m``, 4 bytes a parameter, none when ``momentum=0``. All float32.

At t=1 variant II divides by the size of g itself: each update is a sign; variant I divides by the greatest of a row
or column, whichever is less. Then m takes (1 - momentum) of it, uncorrected. No beta2 forgets: as with Adagrad, what g
is divided by only grows.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([[1, -2], [3, 0.5]]), np.float32([[0.5, 0.25], [-0.1, 0.8]])
>>> p, state = rules.sm3.update(p, g, rules.sm3.init(p), t=1)
>>> p, state = rules.sm3.update(p, np.float32([[3, -1], [2, 0.1]]) * g, state, t=2)
>>> print(p.astype(float).round(4).tolist(), state["mu"].round(4))
[[0.9715, -2.0145], [3.0227, 0.48]] [2.5    0.6464 2.5    0.6464]
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from refopt.scalars import f32
from refopt.spec import Array, Hyper, Rule, State


def cover_shape(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...]:
    """One entry for each index of each axis; a tensor of one axis or none keeps its shape."""
    return (sum(shape),) if len(shape) > 1 else shape


def greatest(x: Array) -> Array:
    """For each index of each axis the greatest x under it, axis after axis; NaN counts as greatest."""
    if x.ndim < 2:
        return x
    others = [tuple(b for b in range(x.ndim) if b != a) for a in range(x.ndim)]
    return np.concatenate([x.max(axis=rest, initial=0) for rest in others])


def least(mu: Array, shape: tuple[int, ...]) -> Array:
    """For each element the least accumulator of those that cover it."""
    if len(shape) < 2:
        return mu
    parts = np.split(mu, np.cumsum(shape)[:-1])
    return reduce(np.minimum, np.meshgrid(*parts, indexing="ij", sparse=True))


def init(p: Array, momentum: float = 0.9, **hyper: Any) -> dict[str, Array]:
    """Zeros: the accumulators, and m unless ``momentum=0``."""
    mu = np.zeros(cover_shape(p.shape, hyper), f32)
    return {"mu": mu, "m": np.zeros(p.shape, f32)} if momentum else {"mu": mu}


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    eps: float = 0.0,
    variant: str = "II",
) -> tuple[Array, dict[str, Array]]:
    """One step; t does not enter, accumulators never decay."""
    if variant == "II":
        nu = least(state["mu"], p.shape) + g * g
        mu = greatest(nu)
    else:
        mu = state["mu"] + greatest(g * g)
        nu = least(mu, p.shape)
    r = f32(1) / np.sqrt(np.where(nu == 0, f32(1), nu + f32(eps)))
    u = np.where(nu == 0, f32(0), g * r)
    new = {"mu": mu}
    if momentum:
        m = f32(momentum) * state["m"] + f32(1.0 - momentum) * u
        u, new = m, new | {"m": m}
    p = p - f32(lr) * u
    return p, new


rule = Rule(
    stem="sm3",
    title="SM3",
    source="Anil et al., arXiv 1901.11150, Algorithms SM3-I and SM3-II",
    states=(
        State("mu", "accumulators of each axis", nonnegative=True, shape=cover_shape, coded=False),
        State("m", "momentum", when=lambda hyper: hyper["momentum"] != 0),
    ),
    hypers=(
        Hyper("lr", "lr", 0.1, "learning rate", low=0),
        Hyper("momentum", "beta", 0.9, "decay of m; 0: no m", low=0, high=1),
        Hyper("eps", "eps", 0.0, "added to nu under the root; TensorFlow 1e-30, optax 1e-8", low=0),
        Hyper("variant", "variant", "II", "which algorithm of the paper", choices=("II", "I")),
    ),
    init=init,
    update=update,
    scope="tensor",
)
