"""The host twin against the golden vectors of the specification: words written down, whatever the oracle says today."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")
from refopt_cuda.kernels import step_host
from refopt_cuda.rules import RULES, forms

P0 = [1, -2, 0.5, 0]
GRADIENTS = [[0.1, -0.2, 0.3, 0], [-0.05, 0.4, 0.3, 1e-8], [2, 0, -0.7, -1e-3]]
ADAMW = [
    "3f7d2f1b bffe76c9 3efa9fbf 00000000 | 3c23d70b bca3d70b 3cf5c290 00000000 | 3727c5ae 3827c5ae 38bcbe63 00000000",
    "3f7c3fbf bffead9c 3ef540de bb4a0841 | 3b83126f 3cb43959 3d6978d6 3089705f | 37518c26 3951ac5d 393ca63a 1fec1e4b",
    "3f7a55a5 bffec926 3ef5c169 3b58cfc7 | 3e507c85 3ca2339d bc9930be b8d1b69c | 3b837b1a 395176b0 3a2f90d4 30897061",
]
LION = [
    "3f7d2f1b bffe76c9 3efa9fbf 00000000 | 3a83126f bb03126f 3b449ba6 00000000",
    "3f7f7da7 bfff7d53 3ef540de bc23d70a | 3a007359 3b0461fa 3bc39ffe 2edbe6fe",
    "3f7cace3 c00041cd 3efa20cd 3727c400 | 3ca7d05e 3b030f14 ba8ed440 b727c540",
]


def hexwords(*arrays: np.ndarray) -> str:
    return " | ".join(" ".join(f"{w:08x}" for w in a.view(np.uint32)) for a in arrays)


def steps(rule: str, codecs: tuple[str, ...], states: list[dict[str, np.ndarray]], **hyper):
    p = np.array(P0, np.float32)
    for t, g in enumerate(GRADIENTS, 1):
        s = RULES[rule].scalars(t, lr=1e-2, **hyper)
        step_host.step(rule, codecs, p, np.array(g, np.float32), states, (4,), 256, s)
        yield p


@pytest.mark.parametrize(("rule", "words"), [("adamw", ADAMW), ("lion", LION)])
def test_three_steps(rule, words):
    states = [{"codes": np.zeros(4, np.float32)} for _ in forms(rule)[0].states]
    got = [hexwords(p, *(s["codes"] for s in states)) for p in steps(rule, ("f32",) * len(states), states, wd=0.1)]
    assert got == words


def test_three_steps_of_8_bit_adamw():
    m, v = ({"codes": np.full(4, zero, np.uint8), "scales": np.zeros(1, np.float32)} for zero in (127, 0))
    *_, p = steps("adamw", ("dynamic8", "dynamic8"), [m, v], wd=0.1)
    assert hexwords(p) == "3f7a56cd bffec973 3ef5c17f 3b58d0bf"
    assert (m["codes"].tolist(), hexwords(m["scales"])) == ([255, 190, 66, 116], "3e508077")
    assert (v["codes"].tolist(), hexwords(v["scales"])) == ([255, 91, 136, 1], "3b837b65")


def test_sgd_with_nesterov():
    states = [{"codes": np.zeros(4, np.float32)}]
    *_, p = steps("sgd", ("f32",), states, momentum=0.9, nesterov=True, wd=0.1)
    assert hexwords(p, states[0]["codes"]) == (
        "3f73af07 bffe7371 3efb5440 379f619c | 401395dc beaf6b08 bd5bffc0 ba831222"
    )
