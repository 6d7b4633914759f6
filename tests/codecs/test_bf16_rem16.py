"""bf16_rem16: no word is lost, what shows is the nearest bfloat16, and a run is the float32 run."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state
from tests.cases import RULES, RuleCase, label
from tests.strategies import arrays, f32, follow, runs

LOW = np.arange(65536, dtype=np.uint32)
HIGH = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x7F80]


@pytest.mark.parametrize("high", [h | sign for h in HIGH for sign in (0, 0x8000)], ids=hex)
def test_every_word_but_nan_comes_back(ref: ModuleType, high: int) -> None:
    """All 65,536 lower halves: below zero, at the ends of binades, up to infinity."""
    x = (np.uint32(high) << 16 | LOW).view(f32)
    x = x[~np.isnan(x)]
    same_bits(ref.codecs.bf16_rem16.encode(x).decode(), x, "decoded")


@given(seed=st.integers(0, 2**32 - 1))
def test_any_word_comes_back(ref: ModuleType, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 2**32, 4096, np.uint32).view(f32)
    box = ref.codecs.bf16_rem16.encode(x)
    same_bits(box.decode(), x, "decoded")
    assert (box.codes.dtype, box.rem.dtype) == (np.uint16, np.int16)


@given(x=arrays([(129,)], low=-44, high=37))
def test_what_shows_is_the_nearest_bfloat16(ref: ModuleType, x: Any) -> None:
    """ml_dtypes' word, but for ties, which go away from zero."""
    got = ref.codecs.bf16_rem16.encode(x).codes
    want = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    tie = (x.view(np.uint32) & 0xFFFF) == 0x8000
    assert (got[~tie] == want[~tie]).all()
    assert (got[tie] == (x[tie].view(np.uint32) >> 16) + 1).all()


def test_ties_show_the_larger_magnitude(ref: ModuleType) -> None:
    x = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x00008000], np.uint32).view(f32)
    box = ref.codecs.bf16_rem16.encode(x)
    assert box.codes.tolist() == [0x3F81, 0x3F82, 0xBF81, 0x0001] and (box.rem == -32768).all()


def test_every_nan_is_one_and_shows_as_one(ref: ModuleType) -> None:
    """0x7FFF8000 rounded up would show as -0, 0xFFFF8000 as +0."""
    x = np.array([0x7F800001, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF, 0xFFFF8000, 0xFFFFFFFF], np.uint32)
    box = ref.codecs.bf16_rem16.encode(x.view(f32))
    assert (box.codes == 0x7FC0).all() and (box.rem == 0).all()
    assert (box.decode().view(np.uint32) == 0x7FC00000).all()


@pytest.mark.parametrize("case", RULES, ids=label)
@given(run=runs(steps=4, shapes=[(31,), (3, 40)]))
def test_a_run_is_the_float32_run_bit_for_bit(ref: ModuleType, case: RuleCase, run: Any) -> None:
    """Of any rule: the states, and the weights that the two halves make; what shows is one half."""
    p, grads = run
    want, plain = follow(case.optimizer(ref), [p], [[g] for g in grads])
    got, state = follow(case.optimizer(ref, {"p": "bf16_rem16"}), [p], [[g] for g in grads])
    whole = ref.codecs.bf16_rem16.encode(want[0])
    same_bits(got[0], ref.codecs.bf16.unpack({"codes": whole.codes}, None, None), "p")
    same_bits(state[0]["p"].rem, whole.rem, "rem")
    same_state({n: s for n, s in state[0].items() if n != "p"}, plain[0])
