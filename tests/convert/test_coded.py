"""What conversions are made of: which blocks are the same blocks, and what codes of others stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from refopt.codecs import CODECS, blocks
from refopt.rules import RULES
from refopt_cuda.codecs import named
from refopt_cuda.convert import coded
from refopt_cuda.convert.coded import Coded, Losses
from refopt_cuda.optim import states
from refopt_cuda.optim.settings import Coding
from tests.strategies import log_uniform

SHAPES = [
    (64, 256),
    (64, 80),
    (1, 300),
    (1, 1, 300),
    (3, 5, 128),
    (300, 15),
    (700,),
    (),
    (2, 0),
    (0, 64),
    (16, 16),
    (1, 40),
]
FORMS = ["dynamic8", "dynamic8.unsigned", "q4", "q4.unsigned", "fp8", "compand8"]


@pytest.mark.parametrize("block", [16, 32, 128, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_the_same_where_the_block_lists_are(shape: tuple[int, ...], block: int) -> None:
    lists = [blocks.bounds(shape, block, layout) for layout in (None, "flat")]
    if coded.same_blocks(shape, block) or math.prod(shape):
        assert coded.same_blocks(shape, block) == np.array_equal(*lists)


@pytest.mark.parametrize("text", FORMS)
def test_codes_of_the_flattened_tensor_stand_for_what_the_reference_says(text: str) -> None:
    """By our form, and by the table that a file brings; then cut along rows, where that is another list of blocks."""
    form, shape = named(text), (33, 80)
    x = log_uniform(np.random.default_rng(3), shape, -5, 0)
    x = abs(x) if form.options.get("signed") is False else x
    record = CODECS[form.stem]
    block = record.block or 0
    made = record(**form.options, layout="flat").encode(x)
    arrays = [torch.from_numpy(a.copy()) for a in made.arrays.values()]
    table = coded.book(form)
    ways = [Coded(arrays[0], arrays[1], block, shape, form)]
    ways += (
        [Coded(arrays[0], arrays[1], block, shape, None, torch.from_numpy(table.copy()))] if table is not None else []
    )
    for kept in ways:
        assert np.array_equal(coded.values(kept).numpy(), made.decode().reshape(-1))
    losses, parts = Losses(), rows_of(text, shape)
    out = coded.fit(ways[0], Coding(form, block), parts, shape, losses)
    assert sum(losses.values()) == 1 and "no whole blocks" in next(iter(losses))
    want = record(**form.options).encode(made.decode().reshape(shape))
    for x_, array in zip(out.values(), want.arrays.values(), strict=True):
        assert np.array_equal(x_.numpy(), array)


def rows_of(text: str, shape: tuple[int, ...]) -> tuple[states.Part, ...]:
    """The tensors in which a state of this form is kept."""
    group = {"codecs": {"m": text}, "block": None, "min_size": 0}
    return states.layout_of(RULES["lion"].states, group, torch.empty(shape)).parts[0]


@pytest.mark.parametrize("text", ["dynamic8", "dynamic8.unsigned", "q4", "q4.unsigned"])
def test_a_book_three_units_away_is_another(text: str) -> None:
    form = named(text)
    table = torch.from_numpy(coded.book(form).copy())  # type: ignore[union-attr]
    assert coded.reads(form, table)
    for units, same in ((2, True), (3, False)):
        moved = table.clone().view(torch.int32)
        moved[5] += units
        assert coded.reads(form, moved.view(torch.float32)) == same
    assert not coded.reads(form, table[:-1])
    assert not coded.reads(named("fp8"), table)
