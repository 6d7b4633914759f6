"""The passes of rules that see whole tensors against the oracle, bit for bit, on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cases import label
from tests.kernels.whole_cases import CASES, NUMBERS, SHAPES, numbers, shapes_of, special, weights
from tests.kernels.whole_pair import WholePair

pytestmark = pytest.mark.gpu

LARGE = [(1600, 1000), (4099, 768), (3, 700, 1032), (1_000_003,)]
"""More pieces and tiles than one round of the grid takes."""


@pytest.mark.parametrize("grad", NUMBERS)
@pytest.mark.parametrize("weight", NUMBERS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_passes_equal_the_oracle_bit_for_bit(case: Any, weight: str, grad: str) -> None:
    rng, shapes = np.random.default_rng(0), shapes_of(case)
    both = WholePair(case.stem, case.hyper, weight, grad)
    both.start(weights(rng, shapes))
    for k in range(3):  # the second step has two rows of scalars
        both.step([None if k == 0 and j % 3 == 1 else numbers(rng, s) for j, s in enumerate(shapes)])


@pytest.mark.parametrize("shift", [1, 2, 4, 8, 15])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.label in {"lamb", "adafactor", "came", "adam_mini-rows"}], ids=label
)
def test_a_gradient_may_start_at_any_address(case: Any, shift: int) -> None:
    rng, shapes = np.random.default_rng(1), shapes_of(case)
    for grad in NUMBERS:
        both = WholePair(case.stem, case.hyper, "bfloat16", grad)
        both.start(weights(rng, shapes))
        both.step([numbers(rng, s) for s in shapes], shift)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_large_tensors_equal_the_oracle_bit_for_bit(case: Any) -> None:
    rng = np.random.default_rng(2)
    shapes = shapes_of(case, LARGE)
    both = WholePair(case.stem, case.hyper, "bfloat16", "bfloat16")
    both.start(weights(rng, shapes))
    for _ in range(2):
        both.step([numbers(rng, s) for s in shapes])


@pytest.mark.parametrize("case", [c for c in CASES if not c.label.endswith(("heads", "vector"))], ids=label)
def test_special_gradients_give_the_oracles_bits(case: Any) -> None:
    rng = np.random.default_rng(3)
    both = WholePair(case.stem, case.hyper, "float32", "float32")
    both.start(weights(rng, [(40, 512), (40, 33)]))
    for _ in range(3):
        both.step([special(rng, (40, 512)), special(rng, (40, 33))])


def test_more_rows_than_a_chunk_are_added_in_two_levels() -> None:
    rng, shape = np.random.default_rng(4), (65_600, 256)
    for stem in ("lamb", "adafactor"):
        both = WholePair(stem, {}, "bfloat16", "bfloat16")
        both.start([np.asarray(rng.standard_normal(shape, np.float32))])
        both.step([np.asarray(rng.standard_normal(shape, np.float32))])


@pytest.mark.parametrize("case", [c for c in CASES if c.label in {"lamb", "adafactor", "came"}], ids=label)
def test_a_step_repeats_its_bits(case: Any) -> None:
    """No sum depends on which warp comes first."""
    rng = np.random.default_rng(5)
    params, grads = weights(rng, SHAPES), [numbers(rng, s) for s in SHAPES]
    words = []
    for _ in range(3):
        both = WholePair(case.stem, case.hyper, "float32", "float32")
        both.start(params)
        both.step(grads)
        words.append([p.get().view(np.uint32) for p in both.p])
    assert all(np.array_equal(a, b) for one in words[1:] for a, b in zip(words[0], one, strict=True))


def test_a_step_can_be_captured() -> None:
    """A graph refuses whatever would make the host wait for the stream; the passes wait for nothing."""
    import cupy

    from refopt_cuda.kernels.whole_rules import rows

    rng, shapes = np.random.default_rng(6), [(512, 512), (300,)]
    both = WholePair("came", {}, "float32", "float32")
    both.start(weights(rng, shapes))
    both.step([numbers(rng, s) for s in shapes])  # compiles
    grads = [numbers(rng, s) for s in shapes]
    device = [cupy.asarray(g) for g in grads]
    made = [rows("came", 2, vector, both.opt.hyper) for vector in (False, True)]
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        both.whole.run([g.data.ptr for g in device], made, [0, 1], stream.ptr)
        graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    both.expect([g.view(np.uint32) for g in grads])
    both.compare()
