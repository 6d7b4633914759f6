"""The table of a launch, which its kernel reads instead of shapes, against the oracle's block list: arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refopt.codecs import blocks
from refopt_cuda.kernels.build import Kernel
from refopt_cuda.kernels.step_cuda import LONGEST, UNIT, Launch, Tensor, piece

Shape = tuple[int, ...]

SHAPES: list[Shape] = [(), (0,), (3, 0), (0, 300), (1,), (7,), (255,), (256,), (257,), (5_000,)]
SHAPES += [(5, 15), (5, 16), (40, 3), (5, 40), (33, 255), (33, 256), (33, 257), (8, 264), (2, 3, 512), (2, 3, 4, 17)]
LARGE: list[Shape] = [(2**31 + 5,), (2**31,), (2**32 + 3, 4), (3, 2**31 - 7), (2**14, 2**20 + 8)]
"""2^31 elements and more."""


def address(k: int, part: int) -> int:
    """Made up, different for every array and divisible by 16."""
    return (3 * k + part + 1) * 4096


def tensors(shapes: Sequence[Shape], shift: int = 0) -> list[Tensor]:
    """Tensors that no memory holds; every address lies `shift` bytes after a multiple of 16."""
    return [Tensor(address(k, 0) + shift, ((address(k, 1) + shift, address(k, 2)),), s) for k, s in enumerate(shapes)]


def launch(block: int | tuple[int, ...]) -> Launch:
    """One coded state, or one for each block size."""
    if isinstance(block, int):
        return Launch("lion", ("dynamic8",), "float32", "float32", block)
    return Launch("adamw", ("dynamic8",) * len(block), "float32", "float32", block)


def table(shapes: Sequence[Shape], block: int | tuple[int, ...], shift: int = 0) -> tuple[np.ndarray, int, bool]:
    of = launch(block)
    made = [t._replace(states=t.states * len(of.codecs)) for t in tensors(shapes, shift)]
    return of._table(made)


def stretches(entry: np.void, tile: int, kernel: Kernel) -> Iterator[tuple[int, int, int]]:
    """(row, first element in it, elements) of what a warp steps in one tile, as step.cu has it."""
    size, per, row, n = kernel.tile, int(entry["per"]), int(entry["row"]), int(entry["n"])
    if per:
        r, column = divmod(tile, per)
        if column * size < row:
            yield r, column * size, min(size, row - column * size)
    elif entry["aligned"] & 4:
        at, end = tile * size, min((tile + 1) * size, n)
        while at < end:
            r, within = divmod(at, row)
            yield r, within, min(row - within, end - at)
            at += min(row - within, end - at)
    else:
        yield 0, tile * size, min(size, n - tile * size)


def check(shapes: Sequence[Shape], block: int | tuple[int, ...], shift: int = 0) -> None:
    """Every element is stepped once, beside the scale that the oracle's block list gives it; one list without gaps."""
    of = launch(block)
    got, total, ragged = table(shapes, block, shift)
    kernel, first = of._kernel(64), got["first"].astype(np.int64)
    assert len(got) == len(shapes) + 1 and total == first[-1] and ragged == (got["aligned"] >= 4).any()
    for k, shape in enumerate(shapes):
        entry, n = got[k], math.prod(shape)
        unit = UNIT // kernel.group * int(entry["piece"])
        assert first[k + 1] - first[k] == -(-int(entry["tiles"]) // unit) and unit % UNIT == 0, shape
        seen, scales = np.zeros(n, np.int64), np.zeros((len(of.blocks), n), np.int64)
        for tile in range(int(entry["tiles"])):
            for r, within, length in stretches(entry, tile, kernel):
                at = r * int(entry["row"]) + within
                seen[at : at + length] += 1
                for j, slot in enumerate(entry["states"]):
                    i = np.arange(within, within + length)
                    size = 8 << int(slot["shift"]) if kernel.quick else int(slot["block"])
                    scales[j, at : at + length] = r * int(slot["per"]) + i // size
                    assert (i // int(slot["block"]) == i // size).all()
        assert (seen == 1).all(), (shape, block)
        for j, size in enumerate(of.blocks):
            bounds = blocks.bounds(shape, size)
            assert (scales[j] == np.searchsorted(bounds, np.arange(n), side="right") - 1).all(), (shape, size)
        whole = int(entry["whole"])
        assert whole * kernel.tile <= n and (whole == 0 or (entry["per"] == 0 and kernel.quick))
        assert entry["p"] == address(k, 0) + shift
        assert entry["states"]["codes"].tolist() == [address(k, 1) + shift] * len(of.blocks)


@pytest.mark.parametrize("block", [1, 4, 16, 64, 256, 1000, 2048, (64, 256), (2048, 128), (50, 200)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_blocks_of_a_tensor_are_the_oracles(shape: Shape, block: int | tuple[int, ...]) -> None:
    check([shape], block)


@pytest.mark.parametrize("block", [256, 2048])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_more_than_two_to_the_31_elements(shape: Shape, block: int) -> None:
    """The tiles at either end, and some between: neighbours leave no gap, and eights of elements fit 32 bits."""
    assert math.prod(shape) >= 2**31
    (entry, _), *_ = table([shape], block)
    kernel, tiles = launch(block)._kernel(64), int(entry["tiles"])
    for tile in (0, 1, tiles // 3, tiles // 2, tiles - 2, tiles - 1):
        for r, within, length in stretches(entry, tile, kernel):
            assert 0 <= r * int(entry["row"]) + within < r * int(entry["row"]) + within + length <= math.prod(shape)
            assert (r * int(entry["row"]) + within) // 8 < 2**32
    spans = [s for tile in range(tiles - 40, tiles) for s in stretches(entry, tile, kernel)]
    assert spans[-1][0] * int(entry["row"]) + spans[-1][1] + spans[-1][2] == math.prod(shape)


@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3).map(tuple), min_size=1, max_size=8),
    block=st.sampled_from([1, 4, 16, 64, 256, 512, (16, 32)]),
    shift=st.sampled_from([0, 2, 16]),
)
def test_several_tensors_share_one_list(shapes: list[Shape], block: int | tuple[int, ...], shift: int) -> None:
    check(shapes, block, shift)


def test_all_shapes_in_one_launch() -> None:
    check(SHAPES, 256)


@pytest.mark.parametrize(
    ("shape", "whole", "flags"),
    [
        ((70_000,), 273, 3),
        ((33, 256), 33, 3),
        ((33, 264), 0, 5),  # ragged
        ((33, 257), 0, 4),  # likewise, and not in eights
        ((33, 128), 16, 1),  # blocks are shorter than the kernel was compiled for
        ((), 0, 3),
        ((512,), 2, 3),
    ],
)
def test_tiles_take_their_way_where_16_bytes_can_be_read_at_once(shape: Shape, whole: int, flags: int) -> None:
    (aligned, _), *_ = table([shape], 256)
    (shifted, _), *_ = table([shape], 256, shift=8)
    assert (aligned["whole"], aligned["aligned"]) == (whole, flags)
    assert (shifted["whole"], shifted["aligned"]) == (0, flags & 4)


def test_one_misaligned_state_is_enough() -> None:
    of = Launch("adamw", ("f32", "f32"), "float32", "float32")
    for bad in range(3):
        p, m, v = (4096 * k + 4 * (k == bad) for k in range(3))
        assert of._table([Tensor(p, ((m, 0), (v, 0)), (512,))])[0]["aligned"][0] == 0
    assert of._table([Tensor(4096, ((8192, 0), (4, 0)), (512,))])[0]["aligned"][0] == 0
    assert of._table([Tensor(4096, ((8192, 4), (16, 4)), (512,))])[0]["aligned"][0] == 3


@pytest.mark.parametrize(
    ("shapes", "block", "why"),
    [
        ([(2**35,)], 256, "at most 2\\^35 - 1 are addressed"),
        ([(2**33,)], 1, "at most 2\\^29 - 1 fit a launch"),
        ([(2**35 - 1,)] * 33, 256, "at most 2\\^29 - 1 fit a launch"),
        ([(2, 2**31 + 1)], 256, "rows of 2147483649 elements"),
    ],
    ids=["elements", "blocks", "blocks of all", "row"],
)
def test_what_32_bits_cannot_count_is_refused(shapes: list[Shape], block: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        table(shapes, block)
    largest = [(2**35 - 1,)] * 31 + [(2**34,), (2, 2**31 - 1)]
    assert table(largest, 256)[1] == (31 * 2**27 + 2**26) // UNIT + 2**24 // (UNIT * LONGEST)


def test_the_last_tiles_of_ragged_rows_can_be_counted() -> None:
    """Numbers of eights beyond the last element must fit 32 bits as well."""
    table([(2**20 - 1, 2**15 - 8)], 256)
    with pytest.raises(ValueError, match="34359738336 elements in ragged rows; at most 2\\^35 - 512"):
        table([(31, 1_108_378_656)], 256)


def test_pieces_of_ragged_rows_are_longer_where_there_are_enough_for_all_warps() -> None:
    assert [piece(n) for n in (0, 1, 99_999, 100_000, 300_000, 800_000, 2**30)] == [1, 1, 1, 2, 4, 16, LONGEST]
    (one, two, _), *_ = table([(2**12, 1000), (2**18, 2**10)], 256)
    assert (one["piece"], two["piece"]) == (16, 1), "of all tiles of the launch; others are as they were"


@pytest.mark.parametrize(
    ("codec", "block", "row", "ragged"),
    [
        ("dynamic8", 256, 1000, True),
        ("dynamic8", 256, 1001, True),
        ("dynamic8", 256, 96, True),
        ("dynamic8", 256, 128, False),  # a power of two: shorter blocks
        ("dynamic8", 256, 1024, False),
        ("dynamic8", 512, 1000, False),  # blocks of several tiles
        ("dynamic8", 100, 1000, False),
        ("dynamic8", 16, 1000, True),
        ("q4", 128, 896, False),  # whole blocks
        ("q4", 128, 904, True),
    ],
)
def test_rows_that_end_within_blocks_are_ragged(codec, block, row, ragged):
    of = Launch("lion", (codec,), "bfloat16", "bfloat16", block)
    got, _, some = of._table(tensors([(12, row)]))
    assert some is ragged and bool(got[0]["aligned"] & 4) is ragged
    assert bool(got[0]["aligned"] & 1) is (row % 8 == 0 or not ragged)
