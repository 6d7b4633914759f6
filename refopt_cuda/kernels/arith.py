"""The arithmetic that rules and codecs are written over: float32, round to nearest even, never contracted.

Each namespace has `mul add sub rcp sqrt sgn maximum` (float32 to float32), the bit casts `bits` (to uint32) and `real`
(from uint32), `jit`, which makes a function callable from a kernel of that back end, and `over_root`, which has one
function for each place of a rule's eps: 1 over the scaled root of z.

`host()`       Numba on the CPU: LLVM contracts nothing without fast-math.
`cuda()`       Numba-CUDA: `libdevice.*_rn`, since the compiler fuses a bare `a * b + c` and has no switch against it.
`simulator()`  the CUDA simulator, where a kernel is plain Python over NumPy scalars and libdevice does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

__all__ = ["INNER", "OUTER", "cuda", "host", "plain", "simulator"]

ZERO = np.float32(0)
ONE = np.float32(1)
OUTER: dict[str, Any] = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
"""Numba's options for what Python calls."""
INNER: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""For what only compiled functions call: entries from Python and C, each with the whole function inlined, take long
to compile."""


def plain(jit: Callable) -> SimpleNamespace:
    """The namespace over Python's own operators, each passed through `jit`."""

    @jit
    def mul(a, b):
        return a * b

    @jit
    def add(a, b):
        return a + b

    @jit
    def sub(a, b):
        return a - b

    @jit
    def rcp(a):
        return ONE / a

    @jit
    def sqrt(a):
        return np.sqrt(a)

    @jit
    def sgn(a):
        return np.float32(a > ZERO) - np.float32(a < ZERO)

    @jit
    def bits(a):
        return np.float32(a).view(np.uint32)

    @jit
    def real(a):
        return np.uint32(a).view(np.float32)

    o = SimpleNamespace(jit=jit, mul=mul, add=add, sub=sub, rcp=rcp, sqrt=sqrt, sgn=sgn, bits=bits, real=real)
    return _complete(o)


def _complete(o: SimpleNamespace) -> SimpleNamespace:
    """What is made of the namespace's own functions: `maximum`, NaN if either is, and `over_root`."""
    mul, add, rcp, sqrt, jit = o.mul, o.add, o.rcp, o.sqrt, o.jit

    @jit
    def maximum(a, b):
        return b if a < b or b != b else a

    @jit
    def outside(z, scale, eps):
        return rcp(add(mul(sqrt(z), scale), eps))

    @jit
    def uncorrected(z, scale, eps):
        return rcp(mul(add(sqrt(z), eps), scale))

    @jit
    def inside(z, scale, eps):
        return rcp(mul(sqrt(add(z, eps)), scale))

    o.maximum = maximum
    o.over_root = {"outside": outside, "uncorrected": uncorrected, "inside": inside}
    return o


@cache
def host() -> SimpleNamespace:
    """Arithmetic of the Numba host kernels."""
    import numba

    return plain(numba.njit(**INNER))


@cache
def simulator() -> SimpleNamespace:
    """Arithmetic of kernels in the CUDA simulator: NumPy scalars, silent where IEEE is silent."""

    def quiet(function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            with np.errstate(all="ignore"):
                return function(*args)

        return call

    return plain(quiet)


@cache
def cuda() -> SimpleNamespace:
    """Arithmetic of Numba-CUDA kernels: the round-to-nearest intrinsics of libdevice."""
    import numba.cuda
    from numba.cuda import libdevice

    jit = numba.cuda.jit(device=True)

    @jit
    def sub(a, b):
        return libdevice.fsub_rn(a, b)

    @jit
    def sgn(a):
        return libdevice.fsub_rn(np.float32(a > ZERO), np.float32(a < ZERO))

    @jit
    def bits(a):
        return np.uint32(libdevice.float_as_int(a))

    @jit
    def real(a):
        return libdevice.int_as_float(np.int32(a))

    o = SimpleNamespace(
        jit=jit,
        mul=libdevice.fmul_rn,
        add=libdevice.fadd_rn,
        sub=sub,
        rcp=libdevice.frcp_rn,
        sqrt=libdevice.fsqrt_rn,
        sgn=sgn,
        bits=bits,
        real=real,
    )
    return _complete(o)
