"""Newton-Schulz steps over a stack of matrices, with as few products as their shape and number format allow.

Every step takes X to P X, P = a + b A + c A^2, A = X X^T. A wide matrix is left alone meanwhile: its Gram matrix A goes
to P A P, and Q gathers the product of all P, three or four products of m x m matrices a step instead of two that are n
long; in the end X is Q X. The rounding of A must not be carried far, as small singular values drown in it: in float16
every third step begins with X again (`segments`), in bfloat16 already the first would be too far. Measured against
float64 (512 x 2048; parts of the norm of X):

==================================  ========  =========  ===================  =================
products                            Gaussian  sigma 1/k  8 large, rest 1e-2   8 large, rest 1e-3
==================================  ========  =========  ===================  =================
X, bfloat16 (as torch.optim.Muon)   1.2e-2    3.0e-2     1.7e-1               3.4e-1
X, float16                          1.5e-3    3.8e-3     2.2e-2               4.2e-2
A, float16, anew after three steps  1.9e-3    3.8e-3     1.7e-2               3.3e-2
A, float16, never anew              1.6e-3    1.9e-1     1.4e-1               1.4e-1
A, bfloat16, anew after two steps   1.3e-2    6.6e-2     1.4e-1               2.7e-1
X, float32                          2.1e-6    1.9e-6     1.0e-5               2.0e-5
==================================  ========  =========  ===================  =================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]
UNITS = {torch.float16: 4096.0, torch.bfloat16: 1.0, torch.float32: 1.0}
"""What a stack and a Gram matrix hold of an entry 1: entries of a matrix of norm 1 are small for float16."""
SEGMENT = 3
"""Steps that the Gram matrix in float16 is good for."""
LONG = 1.5
"""From this ratio of the sides on the Gram matrix costs fewer products."""
FAR = 8.0
"""A polynomial whose apex lies further out, from 4 on, is not written as a square."""
STRIPES, STRIPED = 4, 1024
"""Products that are symmetric are computed in stripes, each from the diagonal on, from this many rows on."""
PIECE = 2**28
"""Bytes of a stack whose last product is made in place, piece by piece, instead of beside it."""


class Way(NamedTuple):
    """How a stack is stepped: steps a segment, and whether a segment goes by the Gram matrix."""

    segments: tuple[int, ...]
    gram: bool


def way(m: int, n: int, dtype: torch.dtype, steps: int) -> Way:
    """The cheapest way that keeps its precision, for m <= n."""
    if dtype != torch.float16 or n <= LONG * m or steps < 2:
        return Way((1,) * steps, False)
    count = -(-steps // SEGMENT)
    return Way(tuple((steps + k) // count for k in reversed(range(count))), True)


def products(m: int, n: int, found: Way) -> float:
    """Floating-point operations a matrix."""
    r = n / m
    return 2 * m**3 * sum(2 * r + max(4 * k - 3, 1) for k in found.segments)


def extra(m: int, n: int, dtype: torch.dtype, found: Way) -> int:
    """Bytes a matrix beside the stack."""
    beside = min(m * n * dtype.itemsize, PIECE) if found.gram else m * n * dtype.itemsize
    return beside + (5 if found.gram else 2) * m * m * dtype.itemsize


def orthogonal(X: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """The stack after `steps` steps, in its own memory or in new.

    X   (count, m, n) with m <= n, UNITS[dtype] times matrices of norm 1; overwritten
    """
    found = way(X.shape[1], X.shape[2], X.dtype, steps)
    with exact_sums():
        for k in found.segments:
            A = gram(X)
            if X.dtype == torch.bfloat16:  # a + b A + c A^2 would be rounded at a
                X = _product(_rest(A, coefficients), X, 1, torch.empty_like(X), coefficients[0], X)
            else:
                X = _apply(_gathered(A, coefficients, k), X)
    return X


def gram(X: Tensor) -> Tensor:
    """A = X X^T."""
    return _symmetric(X, X.mT, 1 / UNITS[X.dtype], _square(X))


def _rest(A: Tensor, coefficients: Coefficients) -> Tensor:
    """b A + c A^2."""
    _, b, c = coefficients
    unit = UNITS[A.dtype]
    return _symmetric(A, A, c / unit**2, _square(A), b / unit)


def _polynomial(A: Tensor, coefficients: Coefficients) -> Tensor:
    """P = a + b A + c A^2 = c (A - h)^2 + a - c h^2, h = -b / 2 c: a product and two diagonals, no sum that cancels."""
    a, b, c = coefficients
    unit = UNITS[A.dtype]
    if abs(b) > FAR * abs(c):
        P, h = _rest(A, coefficients), 0.0
    else:
        h, diagonal = -b / (2 * c), A.diagonal(dim1=1, dim2=2)
        own = diagonal.clone()
        diagonal.sub_(unit * h)
        P = _symmetric(A, A, c / unit**2, _square(A))
        diagonal.copy_(own)
    P.diagonal(dim1=1, dim2=2).add_(a - c * h * h)
    return P


def _gathered(A: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """Q, the product of the P of all steps; A is overwritten."""
    Q = P = _polynomial(A, coefficients)
    T = torch.empty_like(A)
    for _ in range(steps - 1):
        A = _symmetric(_symmetric(P, A, 1, T), P, 1, A)
        P = _polynomial(A, coefficients)
        Q, T = _symmetric(P, Q, 1, T), Q if Q is not P else torch.empty_like(A)
    return Q


def _apply(Q: Tensor, X: Tensor) -> Tensor:
    """Q X."""
    if X.numel() * X.itemsize <= PIECE or Q.shape[1] * 2 > X.shape[2]:
        return _product(Q, X, 1, torch.empty_like(X))
    width = max(PIECE * X.shape[2] // (X.numel() * X.itemsize) // 64 * 64, 64)
    for piece in X.split(width, dim=2):
        piece.copy_(_product(Q, piece, 1, torch.empty_like(piece)))
    return X


def _square(X: Tensor) -> Tensor:
    return X.new_empty(X.shape[0], X.shape[1], X.shape[1])


def _symmetric(x: Tensor, y: Tensor, scale: float, out: Tensor, own: float = 0.0) -> Tensor:
    """out = scale x y + own x, known to be symmetric: below the diagonal it is copied from above."""
    m = out.shape[1]
    if not out.is_cuda or m < STRIPED:
        return _product(x, y, scale, out, own)
    cuts = [m * k // STRIPES for k in range(STRIPES + 1)]
    for low, high in zip(cuts, cuts[1:], strict=False):
        whole = x[:, low:high, low:] if own else None
        _product(x[:, low:high], y[:, :, low:], scale, out[:, low:high, low:], own, whole)
        out[:, high:, low:high].copy_(out[:, low:high, high:].mT)
    return out


def _product(x: Tensor, y: Tensor, scale: float, out: Tensor, own: float = 0.0, beside: Tensor | None = None) -> Tensor:
    """out = scale x y + own beside; sums in float32, rounded once. `beside` is x unless it is given."""
    beside = out if not own else x if beside is None else beside
    if out.is_cuda or out.dtype == torch.float32:
        return torch.baddbmm(beside, x, y, beta=own, alpha=scale, out=out)
    total = torch.bmm(x.float(), y.float()).mul_(scale)
    return out.copy_(total.add_(beside.float(), alpha=own) if own else total)


@contextmanager
def exact_sums() -> Iterator[None]:
    """Parts of a sum in float16 or bfloat16 are added in float32, whatever the program has set."""
    flags = torch.backends.cuda.matmul
    names = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
    before = [getattr(flags, name) for name in names]
    try:
        for name in names:
            setattr(flags, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(flags, name, value)
