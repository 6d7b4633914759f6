"""What a codec does to numbers, as curves: its values, the error at each magnitude, and the states of a real model.

>>> from refopt import codecs
>>> from refopt.curves import levels, largest_update
>>> x = levels(codecs.dynamic8)
>>> print(x.size, x.min(), x.max())
256 -0.99296874 1.0
>>> largest_update(codecs.int8_linear, 2) > 1000 > 2 > largest_update(codecs.dynamic8(signed=False), 2)
True
"""

from __future__ import annotations

import pydoc_data.topics
from functools import cache

import numpy as np

from refopt import rules
from refopt.spec import Array, Codec

f32 = np.float32
GRID = 200_001


def levels(codec: Codec) -> Array:
    """Every value that a codec gives back in a block whose largest magnitude is 1, ascending."""
    low = -1.0 if codec.signed else 0.0
    x = np.linspace(low, 1.0, GRID)
    small = 10.0 ** np.linspace(-9, 0, GRID)
    return np.unique(through(codec, np.concatenate([x, small, -small] if codec.signed else [x, small])))


def through(codec: Codec, x: Array) -> Array:
    """`x` after the codec, each element in a block with a 1."""
    pairs = np.stack([x.astype(f32), np.ones(x.size, f32)], axis=1)
    alone = codec(block=_least(codec), layout="rows") if codec.block else codec
    wide = _least(codec) if codec.block else 2
    padded = np.zeros((x.size, wide), f32)
    padded[:, :2] = pairs
    return alone.encode(padded).decode()[:, 0]


def _least(codec: Codec) -> int:
    """The smallest block of at least two that a codec takes."""
    for block in (2, 32):
        try:
            codec(block=block)
            return block
        except ValueError:
            continue
    return int(codec.block or 2)


def errors(codec: Codec, decades: float = 8, count: int = 4001) -> tuple[Array, Array]:
    """(magnitudes beside the largest of the block, relative error at each)."""
    x = 10.0 ** np.linspace(-decades, 0, count)
    return x, np.abs(through(codec, x) - x) / x


def largest_update(codec: Codec | None, decades: float, steps: int = 300, seed: int = 0) -> float:
    """max |update| / lr of Adam over steps of noise whose size differs by `decades` within a block of 256.

    Only v goes through the codec; m stays exact. Adam with exact states stays below 2.
    """
    rng = np.random.default_rng(seed)
    size = 10 ** (-rng.random(256) * decades)
    p, rule, worst = np.zeros(256, f32), rules.adam, 0.0
    state = rule.init(p)
    for t in range(1, steps + 1):
        g = (size * rng.standard_normal(256)).astype(f32)
        moved, state = rule.update(p, g, state, t=t, lr=1.0)
        worst = max(worst, float(np.abs(moved).max()))
        if codec is not None:
            state["v"] = codec.encode(state["v"]).decode()
    return worst


@cache
def real_states(steps: int = 60) -> tuple[Array, Array]:
    """(m, v) of AdamW on a model of which byte follows which (256 x 256), trained on the Python documentation's topics.

    Real gradients: most bytes are rare, so rows differ by decades, and some are never seen.
    """
    text = np.frombuffer(" ".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    p, rule = np.zeros((256, 256), f32), rules.adamw
    state, batch = rule.init(p), 4096
    for t in range(1, steps + 1):
        at = (t * batch * 7) % (text.size - batch - 1)
        here, there = text[at : at + batch], text[at + 1 : at + batch + 1]
        odds = np.exp(p - p.max(1, keepdims=True))
        share = odds / odds.sum(1, keepdims=True)
        seen = np.bincount(here.astype(np.int64) * 256 + there, minlength=65536).reshape(256, 256)
        g = ((seen.sum(1, keepdims=True) * share - seen) / batch).astype(f32)
        p, state = rule.update(p, g, state, t=t, lr=0.05)
    return state["m"], state["v"]
