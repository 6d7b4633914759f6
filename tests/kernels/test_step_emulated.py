"""The text of step.cu and its parts, built by g++ and run on an emulated grid, against the oracle."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from refopt import codecs
from refopt_cuda.kernels import step_cuda
from refopt_cuda.kernels.step_cuda import Launch, Tensor
from refopt_cuda.random import step_word
from refopt_cuda.rules import RULES
from tests.kernels.gpu_step import Pair, narrow
from tests.kernels.step_emulator import Host

pytestmark = pytest.mark.gxx

HYPER: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "wd": 0.1},
    "lion": {"lr": 1e-2, "wd": 0.1},
    "ademamix": {"lr": 1e-2, "wd": 0.1},
}
RAGGED = [(5, 264), (4, 1000), (3, 2056), (9, 40), (70, 24), (2, 48), (1, 264), (33, 1032), (3, 5, 104)]
OTHERS = [(), (0,), (7,), (256,), (2500,), (3, 2048), (64, 16), (5, 128), (33, 255), (9, 17), (3, 16)]
CASES: list[tuple[str, tuple[str, ...], str, Any]] = [
    ("adamw", ("dynamic8", "dynamic8"), "bfloat16", 256),
    ("adamw", ("q4", "q4"), "float32", 128),
    ("adamw", ("dynamic8", "f32"), "bf16_rem16", (64, 256)),
    ("adamw", ("dynamic8", "int8_linear"), "bf16_sr", (256, 32)),
    ("lion", ("compand8",), "bf16_kahan", 16),
    ("ademamix", ("dynamic8", "bf16", "dynamic8"), "float32", 256),
    ("adamw", ("dynamic8", "int8_linear"), "float32", (2048, 512)),
    ("lion", ("dynamic8",), "float32", 100),
]


@pytest.fixture(scope="module")
def host(gxx: str, tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(gxx, tmp_path_factory.mktemp("step"))


def numbers(rng: np.random.Generator, shape: tuple[int, ...], spread: float = 4.0) -> np.ndarray:
    """Magnitudes over several decades, and zeros."""
    x = rng.standard_normal(shape) * 10 ** rng.uniform(-spread, spread, shape)
    return np.asarray(np.where(rng.random(shape) < 0.1, 0.0, x), np.float32)


def started(host: Host, case: Any, shapes: list[tuple[int, ...]], grad: str = "bfloat16") -> tuple[Pair, Any]:
    rule, codecs, weight, block = case
    rng = np.random.default_rng(0)
    both = Pair(rule, codecs, weight, grad, HYPER[rule], block, device=host)
    both.start([np.asarray(rng.standard_normal(s), np.float32) for s in shapes])
    return both, rng


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_way_through_the_kernel_has_the_oracles_bits(host: Host, case: Any) -> None:
    """Whole tiles, ragged rows and others in one launch; a tensor without gradient, and gradients at odd addresses."""
    shapes = RAGGED + OTHERS
    both, rng = started(host, case, shapes)
    for shift in (0, 2):
        both.step([None if k == 3 and shift else numbers(rng, s) for k, s in enumerate(shapes)], shift)


@pytest.mark.parametrize("most", [1, 2, 16])
def test_ragged_rows_may_be_cut_into_any_pieces(host: Host, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of so many tiles, with blocks that begin in one and end in the next; 16 warps take two rounds of units."""
    monkeypatch.setattr(step_cuda, "piece", lambda tiles: most)
    shapes = [(130 * most, 1000), (40, 264), (9, 40)]
    both, rng = started(host, CASES[0], shapes)
    both.step([numbers(rng, s) for s in shapes])


@pytest.mark.parametrize("row", [33, 264, 1001])
def test_pieces_of_rows_draw_the_bits_of_the_whole(host: Host, row: int) -> None:
    rng = np.random.default_rng(7)
    p, g = (narrow(np.asarray(rng.standard_normal((12, row)), np.float32), "bfloat16") for _ in range(2))
    scalars, drawn = RULES["lion"].scalars(1, lr=1e-3)[None], [step_word(0, 1)]
    found = []
    for cuts in ([0, 12], [0, 1, 6, 12]):
        launch, pieces, grads, kept = Launch("lion", ("dynamic8",), "bf16_sr", "bfloat16"), [], [], []
        for lo, hi in pairwise(cuts):
            stored = codecs.dynamic8.encode(np.zeros((hi - lo, row), np.float32))
            mine = [host.upload(x) for x in (p[lo:hi], stored.codes, stored.scales, g[lo:hi])]
            kept.append(mine)
            states = ((mine[1].ptr, mine[2].ptr),)
            pieces.append(Tensor(mine[0].ptr, states, (hi - lo, row), number=2, first=lo * row))
            grads.append(mine[3].ptr)
        host.bind(launch, pieces)
        host.run(launch, grads, scalars, [0] * len(grads), drawn)
        found.append([np.concatenate([mine[k].get() for mine in kept]) for k in range(2)])
    assert all((one == other).all() for one, other in zip(*found, strict=True))
    assert (found[0][0] != p).mean() > 0.3


@pytest.mark.parametrize("row", [24, 40, 88, 136, 248, 264, 272, 384, 496, 504, 520, 1000])
@pytest.mark.parametrize("block", [16, 64, 256])
def test_rows_of_any_number_of_eights(host: Host, row: int, block: int) -> None:
    both, rng = started(host, ("lion", ("dynamic8",), "float32", block), [(37, row), (2, row)])
    for _ in range(2):
        both.step([numbers(rng, (37, row)), numbers(rng, (2, row))])


@pytest.mark.parametrize("row", [264, 257, 256])
def test_special_gradients(host: Host, row: int) -> None:
    """What leaves the range of the fast cores is stepped with care, and the tile's other elements as ever."""
    special = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-38, 3e38, 1e18, -1e19])
    both, rng = started(host, CASES[0], [(40, row)], "float32")
    for _ in range(3):
        g = numbers(rng, (40, row))
        g[rng.integers(0, 40, 10), rng.integers(0, row, 10)] = special
        g[35] = 0.0
        g[36] *= np.float32(1e-30)
        both.step([g])
