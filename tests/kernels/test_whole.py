"""The passes of whole.cu on an emulated grid: the words of the oracle, without a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refopt_cuda.kernels import whole_build as build
from refopt_cuda.rules.whole import WHOLE, form_of, forms
from tests.cases import label
from tests.kernels.whole_cases import CASES, NUMBERS, SHAPES, numbers, shapes_of, special, weights
from tests.kernels.whole_emulator import Emulated
from tests.kernels.whole_pair import Host, WholePair

pytestmark = pytest.mark.gxx
BRIEF = [(), (0,), (7,), (257,), (70_000,), (3, 40), (33, 255), (300, 520), (2, 3, 512), (2, 33, 264)]
TURNS = [("float32", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16"), ("bfloat16", "float32")]


@pytest.fixture(scope="module")
def grid(gxx: str, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(gxx, tmp_path_factory.mktemp("whole"))


def pair(case: Any, numbers: tuple[str, str], grid: Emulated, **more: Any) -> WholePair:
    return WholePair(case.stem, case.hyper | more, *numbers, Host, grid)


def steps(both: WholePair, shapes: list[tuple[int, ...]], seed: int = 0) -> None:
    """A step without some tensors, one with two rows of scalars, one of gradients off their alignment."""
    rng = np.random.default_rng(seed)
    both.start(weights(rng, shapes))
    for k in range(3):
        both.step([None if k == 0 and j % 3 == 1 else numbers(rng, s) for j, s in enumerate(shapes)], 2 * (k == 2))


@pytest.mark.parametrize("k", range(len(CASES)), ids=lambda k: CASES[k].label)
def test_every_case_steps_as_the_oracle(k: int, grid: Emulated) -> None:
    case = CASES[k]
    shapes = shapes_of(case, SHAPES if k % 4 == 0 else BRIEF)
    steps(pair(case, TURNS[k % len(TURNS)], grid), shapes)


def test_the_cases_hold_every_form_of_every_rule() -> None:
    from refopt import Optimizer

    taken = {form_of(case.stem, Optimizer(case.stem, **case.hyper).hyper) for case in CASES}
    assert taken == {form for stem in WHOLE for form in forms(stem)}


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.label in {"lamb", "lars", "adafactor", "came", "adam_mini-rows"}], ids=label
)
def test_special_gradients_step_as_the_oracle(case: Any, grid: Emulated) -> None:
    both, rng = pair(case, TURNS[0], grid), np.random.default_rng(3)
    both.start(weights(rng, [(40, 512), (40, 33)]))
    for _ in range(2):
        both.step([special(rng, (40, 512)), special(rng, (40, 33))])


@pytest.mark.parametrize("case", [c for c in CASES if c.label in {"lamb", "adafactor-momentum"}], ids=label)
def test_zero_gradients_and_zero_weights_step_as_the_oracle(case: Any, grid: Emulated) -> None:
    both, zero = pair(case, TURNS[0], grid), np.zeros((5, 300), np.float32)
    both.start([zero, np.ones_like(zero)])
    both.step([np.ones_like(zero), zero])


def test_more_results_of_pieces_than_a_chunk_are_added_in_two_levels(grid: Emulated) -> None:
    case = next(c for c in CASES if c.label == "lars")
    both, rng = pair(case, ("bfloat16", "bfloat16"), grid), np.random.default_rng(4)
    shape = (65_537, 256)
    both.start([np.asarray(rng.standard_normal(shape, np.float32))])
    both.step([np.asarray(rng.standard_normal(shape, np.float32))])


def test_tall_and_wide_matrices_have_more_tiles_than_a_thread_adds(grid: Emulated) -> None:
    case = next(c for c in CASES if c.label == "adafactor")
    both, rng = pair(case, TURNS[0], grid), np.random.default_rng(5)
    shapes = [(2, 33 * 256 + 8), (33 * 256 + 3, 2)]
    both.start(weights(rng, shapes))
    both.step([numbers(rng, s) for s in shapes])


def test_a_sum_in_another_order_would_be_seen(grid: Emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Proof that these comparisons can fail: the last additions of the tree are exchanged."""
    text = build.text

    def changed(path: str) -> str:
        found = text(path)
        one, other = "add64(a[0], a[4]), add64(a[2], a[6])", "add64(a[0], a[2]), add64(a[4], a[6])"
        assert path != "kernels/whole.cu" or one in found
        return found.replace(one, other)

    monkeypatch.setattr(build, "text", changed)
    case = next(c for c in CASES if c.label == "adafactor-vector")
    both = WholePair(case.stem, case.hyper, "float32", "float32", Host, Emulated(grid.gxx, tmp_path))
    with pytest.raises(AssertionError, match="words differ"):
        steps(both, [(70_000,), (4099,), (2051,), (999,)])


@pytest.mark.parametrize("number", NUMBERS)
def test_an_unknown_format_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match="float64"):
        build.Kernel(forms("lamb")[0], number, "float64")
