"""Counter-based random bits: the bits of an element depend on its place alone, never on who asks for them, or when.

Splitmix64 (Steele, Lea & Flood 2014) scrambles a 64-bit counter. A key is made once for a tensor and a step; one
scrambling then serves four neighbouring elements with 16 bits each.

>>> from refopt.rng import key, r16
>>> r16(key(seed=0, step=1, tensor=0), 0, 8).tolist()
[6190, 44062, 59394, 32939, 62404, 52952, 56494, 61144]
"""

from __future__ import annotations

import numpy as np

from refopt.spec import Array

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def splitmix64(z: Array) -> Array:
    """Scramble 64-bit words; arithmetic is modulo 2^64."""
    z = z + np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix(z: int) -> int:
    return int(splitmix64(np.array([z & MASK], np.uint64))[0])


def key(seed: int, step: int, tensor: int) -> int:
    """The key of one tensor at one step; `step` counts from 1, `tensor` is its number among the parameters."""
    return _mix(_mix(seed ^ (step * GOLDEN & MASK)) ^ tensor)


def words(key: int, first: int, count: int) -> Array:
    """Scrambled words `first` to `first + count - 1` of a key's stream, uint64."""
    return splitmix64(np.uint64(key) + np.arange(first, first + count, dtype=np.uint64))


def r16(key: int, first: int, count: int) -> Array:
    """16 random bits for each of the elements first .. first + count - 1 of a tensor, uint16."""
    i = np.arange(first, first + count, dtype=np.uint64)
    if not count:
        return np.zeros(0, np.uint16)
    mixed = words(key, first // 4, (first + count - 1) // 4 - first // 4 + 1)
    word = mixed[(i // np.uint64(4)).astype(np.int64) - first // 4]
    return (word >> (np.uint64(16) * (i % np.uint64(4))) & np.uint64(0xFFFF)).astype(np.uint16)


def normals(key: int, count: int) -> Array:
    """Standard normal numbers, float64: Box and Muller's transform of pairs of words, from word 2^48 on, where no r16
    of the same key comes. They end at 8.6, the root of -2 log 2^-53."""
    upper = (words(key, 1 << 48, count + count % 2) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((upper[0::2] + 1.0) * 2.0**-53))
    angle = 2.0 * np.pi * (upper[1::2] * 2.0**-53)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count]
