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
A, float16, anew as Q A Q           1.9e-3    5.5e-3     2.9e-2               5.6e-2
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

from refopt.memory.scratch import LONG, PIECE
from refopt_cuda.kernels import muon as kernels
from refopt_cuda.optim.checks import NUMBERS

Coefficients = tuple[float, float, float]
UNITS = {torch.float16: 4096.0, torch.bfloat16: 1.0, torch.float32: 1.0}
"""What a stack and a Gram matrix hold of an entry 1: entries of a matrix of norm 1 are small for float16."""
SEGMENT = 3
"""Steps that the Gram matrix in float16 is good for."""
ANCHORED = 8.0
"""Ratio of the sides from which on a Gram matrix that is kept costs still fewer products than from LONG on."""
FAR = 8.0
"""A polynomial whose apex lies further out, from 4 on, is not written as a square."""
STRIPES, STRIPED = 4, 1024
"""Products that are symmetric are computed in stripes, each from the diagonal on, from this many rows on."""
WIDE = "dtype" in torch.ops.aten.bmm.overloads()
"""Whether products can be wider than their factors: torch 2.8 or newer."""
FINE = 2048.0
"""The unit of the second half of a number that is kept in two of float16."""


class Way(NamedTuple):
    """How a stack is stepped: steps a segment, and what a segment steps.

    "X"         the stack itself
    "A"         its Gram matrix, found anew from X where a segment begins
    "anchored"  its Gram matrix, found anew as Q A Q from the first, which is kept in two halves of float16
    """

    segments: tuple[int, ...]
    steps: str


def way(m: int, n: int, dtype: torch.dtype, steps: int) -> Way:
    """The cheapest way that keeps its precision, for m <= n."""
    if dtype != torch.float16 or n <= LONG * m or steps < 2:
        return Way((1,) * steps, "X")
    count = -(-steps // SEGMENT)
    anchored = count == 2 and n >= ANCHORED * m and WIDE
    return Way(tuple((steps + k) // count for k in reversed(range(count))), "anchored" if anchored else "A")


def products(m: int, n: int, found: Way, symmetric: float = 1.0) -> float:
    """Floating-point operations a matrix, where symmetric products cost this part of others."""
    r, chain = n / m, sum(max(4 * k - 3, 1) for k in found.segments)
    if found.steps == "anchored":
        return 2 * m**3 * (r * (1 + symmetric) + symmetric * (chain + 1) + 4)
    return 2 * m**3 * (len(found.segments) * r * (1 + symmetric) + symmetric * chain)


def extra(m: int, n: int, dtype: torch.dtype, found: Way) -> int:
    """Bytes a matrix beside the stack."""
    squares = {"X": 2, "A": 5, "anchored": 12}[found.steps]
    return min(m * n * dtype.itemsize, PIECE) + squares * m * m * dtype.itemsize


def orthogonal(X: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """The stack after `steps` steps, in its own memory or in new.

    X   (count, m, n) with m <= n, UNITS[dtype] times matrices of norm 1; overwritten
    """
    found, spare = way(X.shape[1], X.shape[2], X.dtype, steps), None
    with exact_sums():
        if found.steps == "anchored":
            return _apply(_anchored(X, coefficients, found.segments), X)
        for k in found.segments:
            A = _symmetric(X, X.mT, 1 / UNITS[X.dtype], _square(X))
            if X.dtype == torch.bfloat16:  # a + b A + c A^2 would be rounded at a
                new = _apply(_rest(A, coefficients), X, spare, coefficients[0])
            else:
                new = _apply(_gathered(A, coefficients, k), X, spare)
            X, spare = new, spare if new is X else X
    return X


def _rest(A: Tensor, coefficients: Coefficients, shift: float = 0.0) -> Tensor:
    """shift + b A + c A^2."""
    _, b, c = coefficients
    unit = UNITS[A.dtype]
    return _symmetric(A, A, c / unit**2, _square(A), b / unit, shift)


def _polynomial(A: Tensor, coefficients: Coefficients) -> Tensor:
    """P = a + b A + c A^2 = c (A - h)^2 + a - c h^2, h = -b / 2 c: a product and two diagonals, no sum that cancels."""
    a, b, c = coefficients
    if abs(b) > FAR * abs(c):
        return _rest(A, coefficients, a)
    unit, h, diagonal = UNITS[A.dtype], -b / (2 * c), A.diagonal(dim1=1, dim2=2)
    own = diagonal.clone()
    diagonal.sub_(unit * h)
    P = _symmetric(A, A, c / unit**2, _square(A), shift=a - c * h * h)
    diagonal.copy_(own)
    return P


def _gathered(A: Tensor, coefficients: Coefficients, steps: int, Q: Tensor | None = None) -> Tensor:
    """Q, the product of the P of all steps and of the Q of before; A is overwritten."""
    P = _polynomial(A, coefficients)
    Q = P if Q is None else _symmetric(P, Q, 1, torch.empty_like(A))
    T = torch.empty_like(A)
    for _ in range(steps - 1):
        A = _symmetric(_symmetric(P, A, 1, T), P, 1, A)
        P = _polynomial(A, coefficients)
        Q, T = _symmetric(P, Q, 1, T), torch.empty_like(A)
    return Q


def _anchored(X: Tensor, coefficients: Coefficients, segments: tuple[int, ...]) -> Tensor:
    """Q of two segments. A is exact in its two halves, so that Q A Q is what X would give."""
    high, low = _halves(_symmetric(X, X.mT, 1 / UNITS[X.dtype], _square(X, torch.float32)), X.dtype)
    Q = _gathered(high.clone(), coefficients, segments[0])
    wide = _product(Q, high, 1, _square(X, torch.float32))
    wide.add_(_product(Q, low, 1 / FINE, torch.empty_like(wide)))
    high, low = _halves(wide, X.dtype)
    A = _product(low, Q, 1 / FINE, torch.empty_like(low))
    return _gathered(_product(high, Q, 1, A, 1.0, A), coefficients, segments[1], Q)


def _halves(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 as a sum of two, the second in units of 1 / FINE; x is used up."""
    high = x.to(dtype)
    return high, x.sub_(high).mul_(FINE).to(dtype)


def _apply(Q: Tensor, X: Tensor, spare: Tensor | None = None, own: float = 0.0) -> Tensor:
    """Q X + own X, in `spare` or new memory; a matrix that is very large is overwritten piece by piece."""
    if X[0].numel() * X.itemsize <= PIECE:
        return _product(Q, X, 1, torch.empty_like(X) if spare is None else spare, own, X)
    width = max(PIECE * X.shape[2] // (X.numel() * X.itemsize) // 64 * 64, 64)
    for piece in X.split(width, dim=2):
        piece.copy_(_product(Q, piece, 1, torch.empty_like(piece), own, piece))
    return X


def _square(X: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return X.new_empty((X.shape[0], X.shape[1], X.shape[1]), dtype=dtype)


def _symmetric(x: Tensor, y: Tensor, scale: float, out: Tensor, own: float = 0.0, shift: float = 0.0) -> Tensor:
    """out = scale x y + own x + shift I, known to be symmetric: below the diagonal it is copied from above."""
    m = out.shape[1]
    if not out.is_cuda or m < STRIPED:
        _product(x, y, scale, out, own)
        if shift:
            out.diagonal(dim1=1, dim2=2).add_(shift)
        return out
    _upper(x, y, scale, out, own)
    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream(out.device).cuda_stream
        kernels.mirror(out.data_ptr(), len(out), m, NUMBERS[out.dtype], shift, stream)
    return out


def _upper(x: Tensor, y: Tensor, scale: float, out: Tensor, own: float) -> None:
    """The product from the diagonal on, and a little below it."""
    m = out.shape[1]
    cuts = [m * k // STRIPES // 64 * 64 for k in range(STRIPES)] + [m]
    for low, high in zip(cuts, cuts[1:], strict=False):
        whole = x[:, low:high, low:] if own else None
        _product(x[:, low:high], y[:, :, low:], scale, out[:, low:high, low:], own, whole)


def _product(x: Tensor, y: Tensor, scale: float, out: Tensor, own: float = 0.0, beside: Tensor | None = None) -> Tensor:
    """out = scale x y + own beside; sums in float32, rounded once. `beside` is x unless it is given."""
    beside = out if not own else x if beside is None else beside
    if out.dtype == x.dtype and (out.is_cuda or out.dtype == torch.float32):
        return torch.baddbmm(beside, x, y, beta=own, alpha=scale, out=out)
    if out.is_cuda:  # wider than its factors
        return out.copy_(torch.bmm(x, y, out_dtype=out.dtype).mul_(scale))
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
