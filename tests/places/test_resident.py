"""Resident: the whole tensor is one page."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from tests.places.laws import observed
from tests.strategies import f32


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_everything_is_one_page(ref: ModuleType, blocks: int) -> None:
    assert list(ref.places.resident.pages(blocks, 0)) == ([(0, blocks)] if blocks else [])


def test_it_is_where_states_live_unless_told_otherwise(ref: ModuleType) -> None:
    assert ref.Optimizer("adam").place is ref.places.resident


def test_nothing_moves(ref: ModuleType) -> None:
    params = [np.ones(5, f32), np.ones((3, 40), f32)]
    opt = ref.Optimizer("adamw", "dynamic8")
    assert observed(opt, params, params)[0] == [] == opt.schedule(params)


def test_the_device_holds_everything(ref: ModuleType) -> None:
    assert ref.Optimizer("adamw").peak(np.ones((3, 40), f32)) == (16 * 120, 0, 0)
