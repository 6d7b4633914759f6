"""The table of a launch, which its kernel reads instead of shapes, against the oracle's block list: arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refopt.codecs import blocks
from refopt_cuda.kernels.step_cuda import UNIT, Launch, Tensor

Shape = tuple[int, ...]

SHAPES: list[Shape] = [(), (0,), (3, 0), (0, 300), (1,), (7,), (255,), (256,), (257,), (70_000,)]
SHAPES += [(5, 15), (5, 16), (40, 3), (5, 40), (33, 255), (33, 256), (33, 257), (8, 264), (2, 3, 512), (2, 3, 4, 17)]
LARGE: list[Shape] = [(2**31 + 5,), (2**31,), (2**32 + 3, 4), (3, 2**31 + 7), (2, 2**32 - 1), (2**14, 2**20 + 9)]
"""More than 2^31 elements; with blocks of 2^20 their block lists stay short."""


def address(k: int, part: int) -> int:
    """Made up, different for every array and divisible by 16."""
    return (3 * k + part + 1) * 4096


def tensors(shapes: Sequence[Shape], shift: int = 0) -> list[Tensor]:
    """Tensors that no memory holds; every address lies `shift` bytes after a multiple of 16."""
    return [Tensor(address(k, 0) + shift, ((address(k, 1) + shift, address(k, 2)),), s) for k, s in enumerate(shapes)]


def table(shapes: Sequence[Shape], block: int, shift: int = 0) -> tuple[np.ndarray, int]:
    return Launch("lion", ("dynamic8",), "float32", "float32", block)._table(tensors(shapes, shift))


def spans(entry: np.void, count: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Offset and length of each block as `Span` in step.cu finds them: what wraps around there wraps around here."""
    b, row, n = np.arange(count, dtype=np.uint32), entry["row"], entry["n"]
    if entry["per"] == 0:
        offset = b * np.int64(block)
        return offset, np.minimum(block, n - offset)
    r = b // entry["per"]
    c = (b - r * entry["per"]) * np.uint32(block)
    return r * row + c, np.minimum(block, row - c)


def check(shapes: Sequence[Shape], block: int, shift: int = 0) -> None:
    """The oracle's blocks, in one list of units without gaps; those before `whole` need no arithmetic."""
    got, total = table(shapes, block, shift)
    first = got["first"].astype(np.int64)
    assert len(got) == len(shapes) + 1 and total == first[-1]
    for k, shape in enumerate(shapes):
        bounds = blocks.bounds(shape, block)
        assert got["blocks"][k] == len(bounds) - 1, shape
        assert first[k + 1] - first[k] == -(-(len(bounds) - 1) // UNIT), shape
        offset, length = spans(got[k], len(bounds) - 1, block)
        assert (offset == bounds[:-1]).all() and (length == np.diff(bounds)).all(), (shape, block)
        whole = int(got["whole"][k])
        assert 0 <= whole < len(bounds)
        assert (bounds[: whole + 1] == np.arange(whole + 1) * block).all(), (shape, block)
        assert got["p"][k] == address(k, 0) + shift
        assert got["states"][k].tolist() == [[address(k, 1) + shift, address(k, 2)]]


@pytest.mark.parametrize("block", [1, 4, 64, 256, 1000, 2048])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_blocks_of_a_tensor_are_the_oracles(shape: Shape, block: int) -> None:
    check([shape], block)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_more_than_two_to_the_31_elements(shape: Shape) -> None:
    assert math.prod(shape) >= 2**31
    check([shape, (7,), shape], 2**20)


@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3).map(tuple), min_size=1, max_size=8),
    block=st.sampled_from([1, 4, 16, 64, 256]),
    shift=st.sampled_from([0, 2, 16]),
)
def test_several_tensors_share_one_list(shapes: list[Shape], block: int, shift: int) -> None:
    check(shapes, block, shift)


def test_all_shapes_in_one_launch() -> None:
    check(SHAPES, 256)


@pytest.mark.parametrize(("shape", "whole"), [((70_000,), 273), ((33, 256), 33), ((33, 257), 0), ((), 0), ((512,), 2)])
def test_whole_blocks_take_the_short_way_where_16_bytes_can_be_read_at_once(shape: Shape, whole: int) -> None:
    (aligned, _), _ = table([shape], 256)
    (shifted, _), _ = table([shape], 256, shift=8)
    assert (aligned["whole"], aligned["aligned"]) == (whole, 1)
    assert (shifted["whole"], shifted["aligned"]) == (0, 0)


def test_one_misaligned_state_is_enough() -> None:
    launch = Launch("adamw", ("f32", "f32"), "float32", "float32")
    for bad in range(3):
        p, m, v = (4096 * k + 4 * (k == bad) for k in range(3))
        assert launch._table([Tensor(p, ((m, 0), (v, 0)), (512,))])[0]["aligned"][0] == 0
    assert launch._table([Tensor(4096, ((8192, 0), (4, 0)), (512,))])[0]["aligned"][0] == 0
    assert launch._table([Tensor(4096, ((8192, 4), (16, 4)), (512,))])[0]["aligned"][0] == 1


@pytest.mark.parametrize(
    ("shapes", "block", "why"),
    [
        ([(2**35,)], 256, "at most 2\\^35 - 1 are addressed"),
        ([(2**33,)], 1, "at most 2\\^29 - 1 fit a launch"),
        ([(2**35 - 1,)] * 33, 256, "at most 2\\^29 - 1 fit a launch"),
        ([(2, 2**32 + 1)], 256, "rows of 4294967297 elements"),
    ],
    ids=["elements", "blocks", "blocks of all", "row"],
)
def test_what_32_bits_cannot_count_is_refused(shapes: list[Shape], block: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        table(shapes, block)
    largest = [(2**35 - 1,)] * 31 + [(2**34,), (2, 2**32 - 1)]
    assert table(largest, 256)[1] == (31 * 2**27 + 2**26 + 2**25) // UNIT
