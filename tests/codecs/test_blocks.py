"""Block lists: rows where a matrix has rows of 16 or more, flat elsewhere; nothing overlaps, nothing is left out."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import f32


def reference(shape: tuple[int, ...], block: int, rows: bool) -> list[int]:
    """The list by counting: a block ends when it is full, where its row ends, and where the tensor ends."""
    n = int(np.prod(shape, dtype=int))
    starts, length = [], 0
    for i in range(n):
        if length == block or (rows and i % shape[-1] == 0):
            length = 0
        starts += [i] if length == 0 else []
        length += 1
    return [*starts, n]


@given(
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    block=st.integers(1, 50),
    layout=st.sampled_from([None, "rows", "flat"]),
)
def test_block_lists_are_those_found_by_counting(
    ref: ModuleType, shape: tuple[int, ...], block: int, layout: str | None
) -> None:
    rows = layout == "rows" if layout else len(shape) >= 2 and shape[-1] >= 16
    codec = ref.codecs.dynamic8(block=block, layout=layout)
    got = codec.bounds(shape)
    assert got.dtype == np.int64 and got.tolist() == reference(shape, block, rows and len(shape) > 0)
    assert codec.encode(np.ones(shape, f32)).scales.size == len(got) - 1


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((), (1,)),
        ((5,), (1,)),
        ((300,), (2,)),
        ((40, 15), (3,)),
        ((40, 16), (40, 1)),
        ((2, 300), (2, 2)),
        ((2, 3, 600), (2, 3, 3)),
    ],
    ids=str,
)
def test_scales_have_the_shape_of_the_tensor_with_blocks_for_columns(ref: ModuleType, shape: Any, scales: Any) -> None:
    assert ref.codecs.int8_linear.encode(np.ones(shape, f32)).scales.shape == scales


def test_where_rows_are_whole_blocks_both_layouts_are_the_same_bytes(ref: ModuleType) -> None:
    x = np.random.default_rng(0).standard_normal((4, 128)).astype(f32)
    one, other = (ref.codecs.dynamic8.encode(x, block=32, layout=layout) for layout in ("rows", "flat"))
    assert one.codes.tobytes() == other.codes.tobytes() and one.scales.tobytes() == other.scales.tobytes()
