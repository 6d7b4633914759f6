"""The Numba-CUDA twin against the oracle, run with NUMBA_ENABLE_CUDASIM=1 in a process of its own; exits 0 if equal."""

from __future__ import annotations

import sys
import warnings

import numpy as np

from refopt_cuda.kernels import step_numba
from refopt_cuda.rules import RULES
from tests.twins.common import HYPERS, assert_same_bits, assert_states_agree, oracle, stored

CASES = [
    ("adamw", ("f32", "f32"), (130,), 64),
    ("adamw", ("dynamic8", "dynamic8"), (300,), 128),
    ("adamw", ("dynamic8", "f32"), (3, 40), 32),
    ("lion", ("f32",), (), 256),
    ("lion", ("dynamic8",), (2, 150), 64),
    ("lion", ("dynamic8",), (0,), 64),
]


def check(rule: str, names: tuple[str, ...], shape: tuple[int, ...], block: int, special: bool) -> None:
    rng = np.random.default_rng(len(shape))
    p, *gradients = (
        np.asarray(rng.standard_normal(shape) * 10 ** rng.uniform(-8, 4, shape), np.float32) for _ in range(3)
    )
    if special and p.size:
        gradients[0].reshape(-1)[0], gradients[1].reshape(-1)[-1] = -0.0, np.nan
    opt = oracle(rule, names, (block,) * len(names))
    state = opt.init(p)
    for g in gradients:
        mine, states = p.copy(), stored(rule, names, state[0])
        p, state = opt.step(p, g, state)
        s = RULES[rule].scalars(state[0]["t"], **HYPERS[rule])
        step_numba.step(rule, names, mine, g, states, shape, block, s)
        assert_same_bits(mine, p, "p")
        assert_states_agree(rule, names, states, state[0])


def main() -> int:
    assert step_numba.simulated(), "NUMBA_ENABLE_CUDASIM=1 must be set before Numba is imported"
    warnings.simplefilter("ignore")
    for case in CASES:
        for special in (False, True):
            check(*case, special)
        print("equal:", *case, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
