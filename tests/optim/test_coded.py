"""Launches over coded states: bound once for all places that they are given, and no more of them kept than that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refopt_cuda.codecs import named
from refopt_cuda.kernels.transfer import LOAD, STORE
from refopt_cuda.optim import coded
from refopt_cuda.optim.coded import Direct, Launched
from refopt_cuda.optim.settings import Coding

CODING = Coding(named("dynamic8"), 256)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What is bound, in order, without a device; runs do nothing."""
    out: list[Launched] = []
    monkeypatch.setattr(Launched, "bind", lambda self: out.append(self) or len(out))
    monkeypatch.setattr(Launched, "run", lambda self, made, x=0: None)
    return out


def arrays() -> tuple[list[Any], torch.Tensor]:
    codes, scales = torch.zeros(4, 256, dtype=torch.uint8), torch.zeros(4)
    return [codes, scales], torch.zeros(4, 256)


def test_a_launch_is_bound_once_for_the_same_places(bound: list[Launched]) -> None:
    direct, (state, x), (other, y) = Direct(), arrays(), arrays()
    for _ in range(3):
        direct._run(LOAD, CODING, state, x)
        direct._run(STORE, CODING, state, x)
        direct._run(STORE, CODING, state, y)  # what is encoded may lie anywhere
    assert [key.transfer for key in bound] == [LOAD, STORE]
    assert bound[0].x == x.data_ptr() and bound[1].x == 0 and bound[0].codes == state[0].data_ptr()
    direct._run(LOAD, CODING, state, y)
    direct._run(LOAD, CODING, other, x)
    direct._run(LOAD, Coding(CODING.form, 128), state, x)
    assert len({*bound}) == len(bound) == 5


def test_launches_do_not_pile_up(bound: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "MOST_BOUND", 2)
    direct, places = Direct(), [arrays() for _ in range(3)]
    for state, x in places * 2:
        direct._run(LOAD, CODING, state, x)
        assert len(direct.bound) <= 2
    assert len(bound) == 6
