"""QLoRA: a linear layer whose weights are frozen in 4 bits, with a trained correction of low rank beside them.

LoRA (Hu et al., arXiv 2106.09685, equation 3) and QLoRA (Dettmers et al., arXiv 2305.14314, equations 5 and 6). What
fine-tuning adds to a weight matrix has a low rank, so two thin matrices are trained instead; the weights themselves
are only read, and may be stored in a format that could not be trained::

    x    tokens (..., in)           W    (out, in), frozen: an array, or a Box of nf4, fp4 or double
    A    (r, in), uniform           B    (out, r), zeros at first, so that the layer begins as it was
    s    alpha / r, or alpha / sqrt(r) (rank-stabilized, Kalajdzievski, arXiv 2312.03732)
    y    x W' + s (drop(x) A') B'   drop multiplies by `mask`, 0 or 1 / (1 - p)

W is decoded for each use, forward and backward, and rounded to bfloat16 once; there is no gradient of W, and no
memory for one. Results have the dtype of x, float32 or float64.

>>> import numpy as np
>>> from refopt import qlora
>>> W = qlora.store(np.float32([[0.7, -0.2, 0.1, 0.4], [0.3, 0.9, -0.5, 0.0]]))
>>> A, B = qlora.init((2, 4), rank=1, seed=3)
>>> x, s = np.float32([[1, 2, 3, 4]]), qlora.scale(alpha=16, rank=1)
>>> print(qlora.forward(x, W, A, B, s), (qlora.weights(W) @ x[0]).round(3))
[[2.121582   0.68359375]] [2.122 0.684]
>>> dx, dA, dB = qlora.backward(np.float32([[1, -1]]), x, W, A, B, s)
>>> print(dx.round(3), dA.round(3), dB.T.round(3))
[[ 0.348 -1.064  0.544  0.396]] [[0. 0. 0. 0.]] [[-14.716  14.716]]
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refopt.codecs import CODECS
from refopt.lines import Lines, stepping, traced
from refopt.rng import key, words
from refopt.spec import Array, Box, ShapeError

STORES = ("nf4", "fp4", "double")
FLOATS = (np.float32, np.float64)


def store(W: Array, codec: str = "double", block: int = 64, **options: Any) -> Box:
    """Freeze W (out, in) float32 as "nf4", "fp4" or "double" (NF4 whose scales are coded as well; `base="fp4"`).

    Raises ValueError for another codec or a block that checkpoints do not have, ShapeError unless W is a matrix."""
    if codec not in STORES:
        raise ValueError(f"qlora.store: codec must be one of {', '.join(STORES)}, got {codec!r}")
    if np.ndim(W) != 2:
        raise ShapeError(f"qlora.store: W must be a matrix (out, in), got shape {np.shape(W)}")
    return CODECS[codec].encode(W, block=block, **options)


def weights(W: Array | Box) -> Array:
    """What the layer multiplies by, float32 (out, in): a Box is decoded and rounded to bfloat16, an array is itself."""
    return CODECS["bf16"].encode(W.decode()).decode() if isinstance(W, Box) else W


def init(shape: tuple[int, int], rank: int, seed: int = 0) -> tuple[Array, Array]:
    """A (rank, in) uniform within 1 / sqrt(in), and B (out, rank) of zeros, float32, for W of this shape (out, in).

    Raises ValueError unless 1 <= rank <= min(out, in)."""
    out, into = shape
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(out, into):
        raise ValueError(f"qlora.init: rank must be whole, 1 to {min(out, into)} for W of shape {shape}, got {rank!r}")
    u = (words(key(seed, 0, 0), 0, rank * into) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    A = ((2 * u - 1) / math.sqrt(into)).astype(np.float32).reshape(rank, into)
    return A, np.zeros((out, rank), np.float32)


def scale(alpha: float, rank: int, stabilized: bool = False) -> float:
    """s = alpha / rank, or alpha / sqrt(rank). ValueError for an alpha that is not finite, or a rank below 1."""
    if not math.isfinite(alpha):
        raise ValueError(f"qlora.scale: alpha must be finite, got {alpha!r}")
    if rank < 1:
        raise ValueError(f"qlora.scale: rank must be >= 1, got {rank!r}")
    return alpha / (math.sqrt(rank) if stabilized else rank)


def dropout(shape: tuple[int, ...], p: float, seed: int, step: int) -> Array:
    """A mask of this shape, float32: 0 with probability p, else 1 / (1 - p). The bits are counted (`refopt.rng`)."""
    if not 0 <= p < 1:
        raise ValueError(f"qlora.dropout: p must be >= 0 and < 1, got {p!r}")
    u = (words(key(seed, step, 0), 0, math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.where(u < p, 0, 1 / (1 - p)).astype(np.float32).reshape(shape)


def forward(x: Array, W: Array | Box, A: Array, B: Array, s: float, mask: Array | None = None) -> Array:
    """y (..., out). `mask`, of the shape of x, is dropout's; None in evaluation. Raises as `backward`."""
    _check("forward", x, W, A, B, mask)
    return _forward(x, W, A, B, x.dtype.type(s), mask)


def backward(
    dy: Array, x: Array, W: Array | Box, A: Array, B: Array, s: float, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """(dx, dA, dB) from dy (..., out), the loss's gradient by y, and what `forward` was given.

    Raises TypeError for numbers that are not float32 or float64, ShapeError for shapes that do not go together."""
    _check("backward", x, W, A, B, mask, dy)
    return _backward(dy, x, W, A, B, x.dtype.type(s), mask)


def trace(dy: Array, x: Array, W: Array | Box, A: Array, B: Array, s: float, mask: Array | None = None) -> Lines:
    """Both passes as they happen: yields `Line(name, equation, value, where)`; returns (y, (dx, dA, dB)), with the bits
    of `forward` and `backward`, whose lines these are."""
    _check("trace", x, W, A, B, mask, dy)
    given = x, W, A, B, x.dtype.type(s), mask
    y = yield from _lines(_forward, *given)
    return y, (yield from _lines(_backward, dy, *given))


def merge(W: Array | Box, A: Array, B: Array, s: float) -> Array:
    """W + s B A (out, in), float32: the layer without an adapter. Storing it in 4 bits again loses part of it."""
    _check("merge", None, W, A, B)
    return weights(W) + np.float32(s) * (B @ A)


def _forward(x: Array, W: Array | Box, A: Array, B: Array, s: Any, mask: Array | None) -> Array:
    W_hat = weights(W)
    x_A = x if mask is None else x * mask
    h = x_A @ A.T
    y = x @ W_hat.T + s * (h @ B.T)
    return y


def _backward(
    dy: Array, x: Array, W: Array | Box, A: Array, B: Array, s: Any, mask: Array | None
) -> tuple[Array, Array, Array]:
    W_hat = weights(W)
    x_A = x if mask is None else x * mask
    h = x_A @ A.T
    dB = s * (_rows(dy).T @ _rows(h))
    dh = s * (dy @ B)
    dA = _rows(dh).T @ _rows(x_A)
    dx_A = dh @ A
    dx = dy @ W_hat + (dx_A if mask is None else dx_A * mask)
    return dx, dA, dB


def _rows(a: Array) -> Array:
    """All tokens, one a row."""
    return a.reshape(-1, a.shape[-1])


def _lines(function: Callable[..., Any], *args: Any) -> Lines:
    names = list(inspect.signature(function).parameters)
    return (yield from traced(function, stepping(function)(**dict(zip(names, args, strict=True)))))


def _check(
    call: str,
    x: Array | None,
    W: Array | Box,
    A: Array,
    B: Array,
    mask: Array | None = None,
    dy: Array | None = None,
) -> None:
    """Formats, then shapes, named."""
    given = {"x": x, "A": A, "B": B, "mask": mask, "dy": dy} | ({} if isinstance(W, Box) else {"W": W})
    for name, a in given.items():
        if a is not None and (not isinstance(a, np.ndarray) or a.dtype.type not in FLOATS):
            raise TypeError(f"qlora.{call}: {name} must be a float32 or float64 array, got {getattr(a, 'dtype', a)!r}")
    if len(W.shape) != 2:
        raise ShapeError(f"qlora.{call}: W must be a matrix (out, in), got shape {W.shape}")
    out, into = W.shape
    if A.ndim != 2 or not 1 <= len(A) <= min(out, into):
        raise ShapeError(f"qlora.{call}: A must be (r, in) with r from 1 to {min(out, into)}, got shape {A.shape}")
    wanted: dict[str, tuple[int, ...]] = {"A": (len(A), into), "B": (out, len(A))}
    if x is not None:
        wanted |= {"x": (*x.shape[:-1], into), "mask": x.shape, "dy": (*x.shape[:-1], out)}
    for name, shape in wanted.items():
        a = given[name]
        if a is not None and a.shape != shape:
            raise ShapeError(f"qlora.{call}: {name} must be of shape {shape}, got {a.shape}")
