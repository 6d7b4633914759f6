"""Paged: no page size changes a bit, for any rule, any mixture of codecs, any layout."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state
from tests.cases import EVERY, STEMS, RuleCase, label
from tests.places.laws import SIZES, keeps_its_schedule, observed, same_run, some_codecs
from tests.strategies import SHAPES, f32, follow, runs

every_rule = pytest.mark.parametrize("case", EVERY, ids=label)


@every_rule
@given(size=st.sampled_from(SIZES), data=st.data())
def test_paging_changes_no_bit(ref: ModuleType, case: RuleCase, size: int, data: Any) -> None:
    run = data.draw(runs(shapes=case.shapes or SHAPES))
    same_run(ref, case, ref.places.paged(page_blocks=size), run, some_codecs(ref, case, data))


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


@every_rule
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stem", STEMS)
def test_the_moves_are_those_of_the_schedule(ref: ModuleType, case: RuleCase, stem: str, size: int) -> None:
    keeps_its_schedule(ref, case, ref.places.paged(page_blocks=size), list(case.shapes) or [(5, 3), (700,)], stem)


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_the_device_holds_weights_gradients_and_the_ring(ref: ModuleType, buffers: int) -> None:
    """The largest page that is seen to move, once a buffer; all states are on the host."""
    params = [np.ones(n, f32) for n in (1000, 5000)]
    opt = ref.Optimizer("adamw", {"m": "dynamic8"}, ref.places.paged(page_blocks=2, buffers=buffers))
    seen, _ = observed(opt, params, params)
    assert [m.what for m in seen[:4]] == ["m", "v", "m", "v"]
    page = max(seen[k].bytes + seen[k + 1].bytes for k in range(0, len(seen), 2))
    states = sum(m.bytes for m in seen if m.way == "host>device")
    assert opt.peak(params) == (8 * 6000 + buffers * page, states, 0)


def test_a_page_of_coded_adam_is_two_bytes_and_two_scales(ref: ModuleType) -> None:
    opt = ref.Optimizer("adamw", "dynamic8", ref.places.paged(page_blocks=3))
    first = opt.schedule(np.ones(10_000, f32))[0]
    assert (first.what, first.way, first.bytes) == ("m", "host>device", 3 * 256 + 3 * 4)
