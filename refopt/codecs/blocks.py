"""Block lists: which elements of a tensor share a scale, and the scale's measure, the block's largest magnitude.

The list is decided by the tensor's whole shape. Layout ``rows`` (tensors of two or more dimensions with at least 16
elements a row) cuts each row into blocks of B, so that sharding any other dimension never splits a block; ``flat`` cuts
the flattened tensor. A row's ragged tail, or the tensor's, is a block of its own. Where the row length is a multiple
of B both give the same list.
"""

from __future__ import annotations

import math

import numpy as np

from refopt.spec import Array, NonFiniteError

f32 = np.float32
TINY = f32(2.0**-100)
"""A block whose largest magnitude is below this is stored as zeros: every stored scale is 0, NaN or normal."""


def layout_of(shape: tuple[int, ...], layout: str | None = None) -> str:
    """The layout used for a tensor of this shape, "rows" or "flat", unless the caller chose one."""
    if layout == "rows" and not shape:
        return "flat"
    return layout or ("rows" if len(shape) >= 2 and shape[-1] >= 16 else "flat")


def grid(shape: tuple[int, ...], block: int, layout: str | None = None) -> tuple[int, ...]:
    """The shape of a tensor's array of scales, one for each block."""
    n = math.prod(shape)
    if layout_of(shape, layout) == "flat":
        return (-(-n // block),)
    return (*shape[:-1], -(-shape[-1] // block))


def bounds(shape: tuple[int, ...], block: int, layout: str | None = None) -> Array:
    """Offsets of a tensor's blocks in row-major order, int64; the last entry is the number of elements."""
    n = math.prod(shape)
    if n == 0:
        return np.zeros(1, np.int64)
    row = n if layout_of(shape, layout) == "flat" else shape[-1]
    starts = np.arange(0, row, block, dtype=np.int64)
    offsets = np.arange(0, n, row, dtype=np.int64)
    return np.append((offsets[:, None] + starts).reshape(-1), n)


def absmax(x: Array, bounds: Array, nonfinite: str = "propagate") -> Array:
    """Largest magnitude of each block, float32: compared as integers, so that NaN > Inf > any number, in any order.

    Blocks below 2^-100 give +0, blocks with NaN or Inf give NaN (or raise NonFiniteError).
    """
    if len(bounds) == 1:
        return np.zeros(0, f32)
    bits = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
    a = np.maximum.reduceat(bits, bounds[:-1]).view(f32)
    if nonfinite == "raise" and not np.isfinite(a).all():
        k = int(np.argmin(np.isfinite(a)))
        raise NonFiniteError(f"encode: block {k} (elements {bounds[k]} to {bounds[k + 1] - 1}) holds NaN or Inf")
    a = np.where(a < TINY, f32(0), a)
    return np.where(np.isfinite(a), a, f32(np.nan))


def spread(scales: Array, bounds: Array) -> Array:
    """One value a block, repeated for every element of the block."""
    return np.repeat(scales, np.diff(bounds))


def normalise(x: Array, a: Array, bounds: Array) -> tuple[Array, Array]:
    """(y, live): y = x * fl32(1 / absmax), |y| <= 1 + 2^-22; live is False in zero and non-finite blocks (y = 0)."""
    live = a > 0
    inv = np.zeros_like(a)
    np.divide(f32(1), a, out=inv, where=live)
    alive = spread(live, bounds)
    y = np.where(alive, x, f32(0)) * spread(inv, bounds)
    return y, alive


def byte_starts(bounds: Array) -> Array:
    """Where each block's bytes begin when two codes share a byte and every block begins a new one; the last entry is
    the number of bytes."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum((np.diff(bounds) + 1) // 2)])


def pack_nibbles(codes: Array, bounds: Array, pad: int, low_first: bool = False) -> Array:
    """Two 4-bit codes a byte: the earlier element in the high half (the low half if `low_first`); a block of odd
    length ends with `pad` in the half left over."""
    sizes, starts = np.diff(bounds), byte_starts(bounds)
    halves = np.full(2 * int(starts[-1]), pad, np.uint8)
    at = np.repeat(2 * starts[:-1] - bounds[:-1], sizes) + np.arange(len(codes))
    halves[at] = codes
    first, second = halves[0::2], halves[1::2]
    return second << 4 | first if low_first else first << 4 | second


def unpack_nibbles(packed: Array, bounds: Array, low_first: bool = False) -> Array:
    """The 4-bit codes of every element, uint8."""
    high, low = packed >> 4, packed & 15
    halves = np.stack([low, high] if low_first else [high, low], 1).reshape(-1)
    sizes, starts = np.diff(bounds), byte_starts(bounds)
    return halves[np.repeat(2 * starts[:-1] - bounds[:-1], sizes) + np.arange(int(bounds[-1]))]
