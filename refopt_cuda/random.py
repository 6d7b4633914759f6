"""Counted random bits (splitmix64; Steele, Lea & Flood 2014): host scalars, and the bits of an element for Numba.

Written apart from the oracle's own on purpose: `refopt.rng` says what they are, tests hold both together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["key", "make", "mixer", "step_word"]

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    z = (z + GOLDEN) & MASK
    z = (z ^ z >> 30) * FIRST & MASK
    z = (z ^ z >> 27) * SECOND & MASK
    return z ^ z >> 31


def step_word(seed: int, t: int) -> int:
    """The word of step `t` (counted from 1) that all tensors' keys of that step are made of, 64 bits."""
    return _mix((seed ^ t * GOLDEN) & MASK)


def key(word: int, tensor: int) -> int:
    """The key of one tensor at that step; `tensor` is its number among the parameters."""
    return _mix(word ^ tensor)


def mixer(jit: Callable) -> Callable:
    """One scrambling of a uint64 word: those of a key's stream, key + 0, key + 1, ..., serve four elements each."""
    golden, first, second = np.uint64(GOLDEN), np.uint64(FIRST), np.uint64(SECOND)
    s27, s30, s31 = np.uint64(27), np.uint64(30), np.uint64(31)

    @jit
    def mixed(z):
        z = np.uint64(z + golden)
        z = np.uint64(np.uint64(z ^ np.uint64(z >> s30)) * first)
        z = np.uint64(np.uint64(z ^ np.uint64(z >> s27)) * second)
        return np.uint64(z ^ np.uint64(z >> s31))

    return mixed


def make(jit: Callable) -> tuple[Callable, Callable]:
    """`key(step_word, tensor)` and `r16(key, i)`, 16 random bits of element i, over uint64 words."""
    mixed, s16 = mixer(jit), np.uint64(16)
    two, three, low = np.uint64(2), np.uint64(3), np.uint64(0xFFFF)

    @jit
    def key(word, tensor):
        return mixed(np.uint64(np.uint64(word) ^ np.uint64(tensor)))

    @jit
    def r16(key, i):
        i = np.uint64(i)
        word = mixed(np.uint64(np.uint64(key) + np.uint64(i >> two)))
        return np.uint32(np.uint64(word >> np.uint64(s16 * np.uint64(i & three))) & low)

    return key, r16
