"""Formats of weights, in the hands of an Optimizer: what is kept, what is seen, what a page or a save may change."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state
from tests.cases import WEIGHTS, CodecCase, label
from tests.strategies import f32, follow, runs

formats = pytest.mark.parametrize("case", WEIGHTS, ids=label)
SHAPES = [(), (0,), (1,), (31,), (129,), (3, 40), (2, 3, 17)]


@formats
@given(run=runs(shapes=[(129,), (3, 40), (2, 3, 17)]), page=st.sampled_from([1, 3, 1000]))
def test_paging_changes_no_bit(ref: ModuleType, case: CodecCase, run: Any, page: int) -> None:
    """Nor does the stretch that random bits are drawn for: they belong to the element."""
    p, grads = run
    codecs = {"p": case.record(ref), "m": ref.codecs.dynamic8(block=16), "v": ref.codecs.dynamic8(block=16)}
    want, state = follow(ref.Optimizer("adamw", codecs, lr=0.02), [p], [[g] for g in grads])
    paged = ref.Optimizer("adamw", codecs, ref.places.paged(page_blocks=page), lr=0.02)
    got, other = follow(paged, [p], [[g] for g in grads])
    same_bits(got[0], want[0], "p")
    same_state(other[0], state[0])


@formats
@given(run=runs(shapes=SHAPES))
def test_the_weights_that_are_seen_are_bfloat16(ref: ModuleType, case: CodecCase, run: Any) -> None:
    p, grads = run
    p, _ = follow(ref.Optimizer("lion", {"p": case.record(ref)}, lr=0.01), p, grads)
    assert p.dtype == f32 and not (np.atleast_1d(p).view(np.uint32) & 0xFFFF).any()


@formats
@given(run=runs(shapes=[(3, 40)]))
def test_a_step_changes_none_of_its_inputs_and_a_saved_run_continues(
    ref: ModuleType, case: CodecCase, run: Any
) -> None:
    p, grads = run
    opt = ref.Optimizer("adamw", {"p": case.record(ref)}, lr=0.02)
    q, state = follow(opt, [p], [[grads[0]]])
    before = copy.deepcopy((q, state))
    one, end = opt.step(q, [grads[1]], state)
    same_bits(q[0], before[0][0], "p")
    same_state(state[0], before[1][0])
    other, same = opt.step(q, [grads[1]], pickle.loads(pickle.dumps(state)))
    same_bits(other[0], one[0], "p")
    same_state(same[0], end[0])


@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_that_a_record_promises_are_kept(ref: ModuleType, case: CodecCase, shape: tuple[int, ...]) -> None:
    """Two bytes an element are the weights; what is beyond lies in the state."""
    codec, p = case.record(ref), np.ones(shape, f32)
    _, state = follow(ref.Optimizer("sgd", {"p": codec}), [p], [[p]])
    beyond = sum(a.nbytes for a in state[0]["p"].arrays.values()) if "p" in state[0] else 0
    assert beyond + 2 * p.size == codec.nbytes(shape)
    box = codec.encode(p, random=np.zeros(shape, np.uint16))
    assert box.nbytes == codec.nbytes(shape) and box.codes.shape == shape


@formats
def test_no_state_takes_a_format_of_weights(ref: ModuleType, case: CodecCase) -> None:
    with pytest.raises(ValueError, match=f"Optimizer: {case.stem} is a format of weights; m cannot take it"):
        ref.Optimizer("adamw", {"m": case.record(ref)})


@formats
@given(run=runs(shapes=[(129,)], low=-3, high=3))
def test_other_weights_are_not_touched_without_a_gradient(ref: ModuleType, case: CodecCase, run: Any) -> None:
    p, grads = run
    opt = ref.Optimizer("lion", {"p": case.record(ref)}, lr=0.01)
    q, state = follow(opt, [p, p], [[grads[0], grads[0]]])
    r, later = opt.step(q, [None, grads[1]], state)
    same_bits(r[0], q[0], "p")
    same_state(later[0], state[0])
