"""Paged: no page size changes a bit, for any rule, any mixture of codecs, any layout."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state
from tests.cases import RULES, STEMS, RuleCase, label
from tests.strategies import assignments, f32, follow, records, runs

SIZES = [1, 7, 10**9]
every_rule = pytest.mark.parametrize("case", RULES, ids=label)


@every_rule
@pytest.mark.parametrize("size", SIZES)
@given(run=runs(), data=st.data())
def test_paging_changes_no_bit(ref: ModuleType, case: RuleCase, size: int, run: Any, data: Any) -> None:
    p, grads = run
    codecs = records(ref, data.draw(assignments(case.states))) | {"p": data.draw(st.sampled_from(["f32", "bf16"]))}
    one, state = follow(case.optimizer(ref, codecs), [p], [[g] for g in grads])
    other, paged = follow(case.optimizer(ref, codecs, ref.places.paged(page_blocks=size)), [p], [[g] for g in grads])
    same_bits(other[0], one[0], "p")
    same_state(paged[0], state[0])


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("stem", ["int8_linear", "dynamic8"])
@given(run=runs(shapes=[(3, 40), (5, 3), (129,), ()]))
def test_paging_changes_no_bit_in_either_layout(ref: ModuleType, layout: str, stem: str, run: Any) -> None:
    p, grads = run
    codec = ref.codecs.CODECS[stem](block=16, layout=layout)
    one, state = follow(ref.Optimizer("adamw", codec), [p], [[g] for g in grads])
    other, paged = follow(ref.Optimizer("adamw", codec, ref.places.paged(page_blocks=1)), [p], [[g] for g in grads])
    same_bits(other[0], one[0], "p")
    same_state(paged[0], state[0])


@pytest.mark.parametrize("stem", STEMS)
def test_many_steps_of_paging_change_no_bit(ref: ModuleType, stem: str) -> None:
    rng = np.random.default_rng(8)
    p, *grads = rng.standard_normal((31, 6, 100)).astype(f32)
    hyper = {"codecs": stem, "lr": 0.01}
    one, state = follow(ref.Optimizer("adamw", **hyper), [p], [[g] for g in grads])
    other, paged = follow(
        ref.Optimizer("adamw", place=ref.places.paged(page_blocks=3), **hyper), [p], [[g] for g in grads]
    )
    same_bits(other[0], one[0], "p")
    same_state(paged[0], state[0])


@given(blocks=st.integers(0, 200), size=st.integers(1, 50))
def test_pages_cover_every_block_once_in_order(ref: ModuleType, blocks: int, size: int) -> None:
    place = ref.places.paged(page_blocks=size)
    pages = list(place.pages(blocks, place.page_blocks))
    assert [k for first, last in pages for k in range(first, last)] == list(range(blocks))
    assert all(0 < last - first <= size for first, last in pages)
    assert all(last - first == size for first, last in pages[:-1])
