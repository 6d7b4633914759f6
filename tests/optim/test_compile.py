"""A training step under torch.compile around the optimizer's: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import refopt_cuda as rc
from tests.optim.test_backward import model


@pytest.mark.parametrize("name", ["LAMB", "AdamW8bit"])
def test_a_compiled_training_step_has_the_bits_of_a_plain_one(name: str, device: str) -> None:
    """The step is a break in the graph; what comes before and after is compiled."""
    one, other = model().to(device), model().to(device)
    opts = [getattr(rc.optim, name)(net.parameters(), lr=0.01) for net in (one, other)]

    def train(net: Any, opt: Any, x: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        out = (net(x) ** 2).mean()
        out.backward()
        opt.step()
        return out

    compiled = torch.compile(train, backend="eager")
    for t in range(3):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(t)).to(device)
        assert torch.equal(compiled(one, opts[0], x), train(other, opts[1], x))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert opts[0].state[next(one.parameters())]["step"] == 3
