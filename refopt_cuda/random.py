"""Random bits by an element's place: splitmix64 (Steele, Lea & Flood 2014) over a key for each tensor and step.

r16(i) of an element is 16 bits of the word sm(key + i // 4): its low ones for i % 4 == 0, then upward. Written apart
from the oracle's own on purpose, as `refopt_cuda.scalars` is; `kernels/random.cuh` is the same in CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["key", "mixer", "splitmix64", "step_word"]

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = (1 << 64) - 1


def splitmix64(z: int) -> int:
    """A 64-bit word scrambled."""
    z = z + GOLDEN & MASK
    z = (z ^ z >> 30) * FIRST & MASK
    z = (z ^ z >> 27) * SECOND & MASK
    return z ^ z >> 31


def step_word(seed: int, step: int) -> int:
    """What all tensors of a step share; steps are counted from 1."""
    return splitmix64((seed ^ step * GOLDEN) & MASK)


def key(step_word: int, tensor: int) -> int:
    """The key of one tensor at that step; `tensor` is its number among the parameters."""
    return splitmix64(step_word ^ tensor)


def mixer(o: Any) -> Callable:
    """`splitmix64` as a scalar form over uint64."""
    golden, first, second = np.uint64(GOLDEN), np.uint64(FIRST), np.uint64(SECOND)
    a, b, c = np.uint64(30), np.uint64(27), np.uint64(31)

    @o.jit
    def mix(z):
        z = np.uint64(z + golden)
        z = np.uint64(np.uint64(z ^ np.uint64(z >> a)) * first)
        z = np.uint64(np.uint64(z ^ np.uint64(z >> b)) * second)
        return np.uint64(z ^ np.uint64(z >> c))

    return mix
