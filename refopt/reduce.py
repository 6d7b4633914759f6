"""Canonical reductions: float64 sums in one fixed order, which a GPU can follow and get the same bits.

`np.sum` leaves its order open, and float addition is not associative: two sums of the same numbers may differ. Here 256
lanes each add every 256th element from left to right, then a tree of halves adds the lanes. The inputs are float32, so
their squares are exact in float64.

>>> import numpy as np
>>> from refopt.reduce import r256, rms
>>> x = (np.arange(1, 1001) / 3).astype(np.float32)
>>> r256(x).hex()
'0x1.45d8aaab00400p+17'
>>> print(rms(np.float32([3, 4])))
3.535534
"""

from __future__ import annotations

import numpy as np

from refopt.accelerate import lanes
from refopt.spec import Array

f32, f64 = np.float32, np.float64
LANES = 256
CHUNK = 65536
TILE = 256


def tree(x: Array) -> Array:
    """Add the halves of the last axis until one is left; its length is a power of two."""
    w = x.shape[-1]
    while w > 1:
        w //= 2
        x = x[..., :w] + x[..., w:]
    return x[..., 0]


def r256_rows(x: Array) -> Array:
    """R256 of every row of a matrix (rows, k), float64. A lane that has run out adds +0, which changes nothing."""
    return tree(lanes(x, LANES))


def r256(x: Array) -> float:
    """R256 of all elements, in row-major order."""
    return float(r256_rows(x.reshape(1, -1))[0])


def total(x: Array) -> float:
    """R of a tensor: its rows first where they have 256 elements or more, else chunks of 65536 elements."""
    while x.size > CHUNK or (x.ndim >= 2 and x.shape[-1] >= LANES):
        if x.ndim >= 2 and x.shape[-1] >= LANES:
            x = r256_rows(x.reshape(-1, x.shape[-1]))
            continue
        flat = x.reshape(-1)
        whole = flat.size // CHUNK * CHUNK
        parts = [r256_rows(flat[:whole].reshape(-1, CHUNK)), r256_rows(flat[whole:].reshape(1, -1))]
        x = np.concatenate(parts if whole < flat.size else parts[:1])
    return r256(x)


def squares(x: Array) -> Array:
    """x * x in float64: exact for a float32 x."""
    wide = x.astype(f64)
    return wide * wide


def mean(x: Array) -> np.float32:
    """R / n, rounded to float32 once."""
    return f32(total(x) / x.size)


def rms(x: Array) -> np.float32:
    """sqrt(R(x^2) / n), rounded to float32 once."""
    return f32(np.sqrt(total(squares(x)) / x.size))


def norm64(x: Array) -> float:
    """sqrt(R(x^2)), kept in float64."""
    return float(np.sqrt(total(squares(x))))


def row_and_column_sums(x: Array) -> tuple[Array, Array]:
    """Sums over the columns (one a row) and over the rows (one a column) of a matrix (m, n), float64, in one reading.

    Tiles of 256 x 256. A row of a tile is 32 groups of 8 neighbours, each added left to right, then a tree of groups; a
    column is 8 strips of 32, each added top to bottom, then a tree of strips; R256 adds the tiles' results.
    """
    m, n = x.shape
    down, across = -(-m // TILE), -(-n // TILE)
    tiles = np.zeros((down * TILE, across * TILE), f64)
    tiles[:m, :n] = x
    tiles = tiles.reshape(down, TILE, across, TILE)
    groups = _in_order(tiles.reshape(down, TILE, across, 32, 8), -1)
    strips = _in_order(tiles.reshape(down, 8, 32, across, TILE), 2)
    rows = r256_rows(tree(groups).reshape(down * TILE, across))
    columns = r256_rows(np.moveaxis(tree(np.moveaxis(strips, 1, -1)), 0, -1).reshape(across * TILE, down))
    return rows[:m], columns[:n]


def row_and_column_means(x: Array) -> tuple[Array, Array]:
    """Means over the columns (..., m) and over the rows (..., n) of each matrix of the last two axes, float32."""
    m, n = x.shape[-2:]
    sums = [row_and_column_sums(matrix) for matrix in x.reshape(-1, m, n)]
    rows, columns = np.array([r for r, _ in sums]) / n, np.array([c for _, c in sums]) / m
    return rows.reshape(x.shape[:-1]).astype(f32), columns.reshape(*x.shape[:-2], n).astype(f32)


def _in_order(x: Array, axis: int) -> Array:
    """Add along an axis from first to last, beginning at +0."""
    x = np.moveaxis(x, axis, 0)
    out = np.zeros(x.shape[1:], f64)
    for part in x:
        out = out + part
    return out
