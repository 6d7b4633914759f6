"""Resident: the whole tensor is one page."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_everything_is_one_page(ref: ModuleType, blocks: int) -> None:
    assert list(ref.places.resident.pages(blocks, 0)) == ([(0, blocks)] if blocks else [])


def test_it_is_where_states_live_unless_told_otherwise(ref: ModuleType) -> None:
    assert ref.Optimizer("adam").place is ref.places.resident
