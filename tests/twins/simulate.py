"""The Numba-CUDA twin against the oracle, run with NUMBA_ENABLE_CUDASIM=1 in a process of its own; exits 0 if equal."""

from __future__ import annotations

import sys
import warnings

import numpy as np

from refopt_cuda.kernels import step_numba
from tests.twins.combinations import EACH
from tests.twins.common import Case, check, log_uniform

SHAPES = ((2, 75), (130,))
MORE = [
    (Case("adamw", ("dynamic8", "q4"), "bf16_sr", block=(30, 15)), (3, 70)),
    (Case("lion", ("dynamic8",)), ()),
    (Case("lion", ("q4",)), (0,)),
]
"""Blocks of two sizes, of odd length, with tails; a scalar; nothing."""


def checked(case: Case, shape: tuple[int, ...], special: bool) -> None:
    """One step, or one with a negative zero and a NaN in its gradient."""
    rng = np.random.default_rng(len(shape))
    p, g = (log_uniform(rng, shape) for _ in range(2))
    if special and p.size:
        g.reshape(-1)[0], g.reshape(-1)[-1] = -0.0, np.nan
    check(case, step_numba.step, p, [g])


def main() -> int:
    assert step_numba.simulated(), "NUMBA_ENABLE_CUDASIM=1 must be set before Numba is imported"
    warnings.simplefilter("ignore")
    for k, case in enumerate(EACH):
        checked(case, SHAPES[k % 2], special=k % 4 == 3)
        print("equal:", case, flush=True)
    for case, shape in MORE:
        checked(case, shape, special=True)
        print("equal:", case, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
