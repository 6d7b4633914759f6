"""Two loops that NumPy runs slowly, compiled by Numba where it is installed and the array is large: same bits.

The readable form stands first in each function. `REFOPT_NUMBA=0` in the environment keeps to it.

>>> import numpy as np
>>> count_below(np.float32([0.25, 0.5]), np.float32([0.25, 0.3, 9, np.nan])).tolist()
[0, 1, 2, 2]
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import numpy as np

LEAST = 1 << 20
"""Elements below which compiling costs more than it saves."""


@cache
def installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def wanted(size: int) -> bool:
    """Whether an array of this size takes the compiled loop."""
    return size >= LEAST and os.environ.get("REFOPT_NUMBA", "1") != "0" and installed()


def count_below(points: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How many of the ascending `points` are below each y; all of them for NaN."""
    if not wanted(y.size):
        return np.searchsorted(points, y, side="left")
    return _loops()["count"](points, y.reshape(-1)).reshape(y.shape)


def lanes(x: np.ndarray, wide: int) -> np.ndarray:
    """(rows, wide): lane j of a row adds elements j, j + wide, ... of the row from left to right, in float64."""
    rows, k = x.shape
    if wanted(x.size):
        return _loops()["lanes"](x, wide)
    steps = -(-k // wide)
    padded = np.zeros((rows, steps * wide), np.float64)
    padded[:, :k] = x
    out = np.zeros((rows, wide), np.float64)
    for step in range(steps):
        out = out + padded[:, step * wide : (step + 1) * wide]
    return out


@cache
def _loops() -> dict[str, Any]:
    import numba

    @numba.njit(nogil=True)
    def count(points: Any, y: Any) -> Any:
        out = np.empty(y.size, np.int64)
        for i in range(y.size):
            low, high = 0, points.size
            while low < high:
                middle = (low + high) // 2
                if points[middle] >= y[i]:
                    high = middle
                else:
                    low = middle + 1
            out[i] = low
        return out

    @numba.njit(nogil=True)
    def added(x: Any, wide: int) -> Any:
        rows, k = x.shape
        out = np.zeros((rows, wide), np.float64)
        for row in range(rows):
            for start in range(0, k, wide):
                for j in range(min(wide, k - start)):
                    out[row, j] += x[row, start + j]
        return out

    return {"count": count, "lanes": added}
