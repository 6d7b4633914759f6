"""Which combinations the twins are held against the oracle in: there are far too many for all of them.

`EACH` has every case of a rule, every codec in every form and every format of weights and gradients at least once;
`pairs` has every two of them together (a quarter of an hour of compiling: HYPOTHESIS_PROFILE=nightly).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.rules import RULES
from tests.cases import RULES as RULE_CASES
from tests.kernels.covering import CODECS, WEIGHT_FORMATS, pairwise
from tests.kernels.gpu_step import TO_WORDS
from tests.twins.common import Case

LABELS = {case.label: case for case in RULE_CASES if case.stem in RULES}
BLOCKS = (32, 64, 128)
"""Block sizes that every codec takes."""


def combined(label: str, first: int, weight: str, grad: str, block: int) -> Case:
    """A case of a rule, and codecs from number `first` on for its states."""
    rule = LABELS[label]
    codecs = tuple(CODECS[(first + 3 * k) % len(CODECS)] for k in range(len(rule.states)))
    return Case(rule.stem, codecs, weight, grad, block, rule.hyper)


def pairs() -> list[Case]:
    """Every two of rule, first codec, formats and block together."""
    factors: dict[str, Any] = {"label": [*LABELS], "first": range(len(CODECS)), "weight": WEIGHT_FORMATS}
    return [combined(**row) for row in pairwise({**factors, "grad": [*TO_WORDS], "block": BLOCKS})]


def sampled(count: int, seed: int = 13) -> list[Case]:
    """Combinations of the full product, drawn once and for all."""
    rng = np.random.default_rng(seed)
    every = [[*LABELS], range(len(CODECS)), WEIGHT_FORMATS, [*TO_WORDS], BLOCKS]
    return [combined(*(choices[rng.integers(len(choices))] for choices in every)) for _ in range(count)]


def _each() -> list[Case]:
    """Rules in turn, and as often as needed; codecs, weights and gradients in steps that share no factor."""
    grads, labels = [*TO_WORDS], [*LABELS]
    count = max(len(labels), len(CODECS), len(WEIGHT_FORMATS))
    return [
        combined(labels[k % len(labels)], k * 5, WEIGHT_FORMATS[(k + k // 8) % len(WEIGHT_FORMATS)],
                 grads[(k + k // 3) % 3], BLOCKS[k % 3])
        for k in range(count)
    ]  # fmt: skip


EACH = _each()
