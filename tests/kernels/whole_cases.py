"""What the passes of rules that see whole tensors are compared with the oracle over."""

from __future__ import annotations

import numpy as np

from refopt_cuda.kernels.whole_rules import WHOLE
from tests.cases import WHOLE as EVERY
from tests.cases import RuleCase

ADAM = {"lr": 0.013, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "wd": 0.11}
FORMS = [
    RuleCase(
        "adafactor-unscaled", "adafactor", ("R", "C"), {"lr": 0.02, "relative_step": False, "scale_parameter": False}
    ),
    RuleCase("adafactor-scaled-momentum", "adafactor", ("R", "C", "m"), {"beta1": 0.7, "wd": 0.4, "clip": 0.8}),
]
"""Forms that none of the tables' cases takes."""
CASES = [*(case for case in EVERY if case.stem in WHOLE), *FORMS]
NUMBERS = ["float32", "bfloat16", "float16"]
SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (255,),
    (257,),
    (70_000,),
    (3, 40),
    (33, 255),
    (5, 300),
    (256, 256),
    (300, 520),
    (2, 3, 512),
    (2, 33, 260),
    (64, 4096),
]
"""Vectors of one and of two chunks; rows shorter than 256, of odd length, of eights; one tile and several; batches."""
HEADS = [(3, 40), (33, 255), (300, 520), (3, 5, 512), (6, 4096), (3, 70_001)]
SPECIAL = np.float32([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-38, 1e-22, 3e38, 1e18, -1e19])


def shapes_of(case: RuleCase, shapes: list[tuple[int, ...]] = SHAPES) -> list[tuple[int, ...]]:
    """Those of `shapes` that a case's rule can step; others where it needs heads."""
    blocks = case.hyper.get("blocks", "rows" if case.stem == "adam_mini" else "")
    if blocks == "heads":
        return [s for s in HEADS if max(s) <= max(max(t, default=0) for t in shapes)]
    return [s for s in shapes if len(s) > 1] if blocks == "rows" else shapes


def numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Magnitudes over fifteen powers of ten, a few zeros."""
    x = rng.standard_normal(shape) * 10 ** rng.uniform(-12, 3, shape)
    return np.asarray(np.where(rng.random(shape) < 0.05, 0.0, x), np.float32)


def weights(rng: np.random.Generator, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    return [np.asarray(rng.standard_normal(s), np.float32) for s in shapes]


def special(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A gradient with NaN, Inf, subnormals, a row of zeros and one of tiny numbers, beside ordinary ones."""
    g = numbers(rng, shape)
    g[rng.integers(0, shape[0] - 2, SPECIAL.size), rng.integers(0, shape[1], SPECIAL.size)] = SPECIAL
    g[-2] = 0.0
    g[-1] *= np.float32(1e-30)
    return g
