"""Adafactor of torch.optim and of transformers, and torch.optim.Muon: states that change sides, and the next steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt import ShapeError, StateError
from refopt_cuda import convert
from tests.convert.beside import run, same_tree, step_both, twins

SHAPES = [(64, 80), (9,), (3, 5, 40)]
UNITS = 32
"""In the last place of the largest of old weight, new weight and step: sums are in other orders."""
TORCH = {"lr": 4e-3, "weight_decay": 0.3, "d": 1.5, "beta2_decay": -0.6}
HUGGING = {"lr": 0.02, "relative_step": False, "beta1": 0.8, "weight_decay": 0.2, "clip_threshold": 0.8}


def sides(name: str) -> tuple[Any, Any, Any, Any, Any]:
    """Makers of the peer and of ours, both conversions, and the shapes."""
    if name == "Muon":
        words = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.3}
        made = (lambda p: torch.optim.Muon(p, **words)), (lambda p: rc.optim.Muon(p, ns_dtype="bfloat16"))
        return *made, convert.from_torch, convert.to_torch, SHAPES[:1]
    if name == "torch":
        made = (lambda p: torch.optim.Adafactor(p, **TORCH)), (lambda p: rc.optim.Adafactor(p, variant="torch"))
        return *made, convert.from_torch, convert.to_torch, SHAPES
    peer = pytest.importorskip("transformers.optimization").Adafactor
    made = (lambda p: peer(p, **HUGGING)), (lambda p: rc.optim.Adafactor(p, beta1=0.8))
    return *made, convert.from_transformers, convert.to_transformers, SHAPES


@pytest.mark.parametrize("name", ["torch", "transformers", "Muon"])
def test_a_run_changes_sides_twice_and_steps_alike(name: str) -> None:
    theirs, ours, take, give_back, shapes = sides(name)
    peer = run(theirs, shapes=shapes)
    mine = ours(twins(peer))
    mine.load_state_dict(take(peer.state_dict(), mine))
    same_tree(states_of(give_back(mine)), states_of(peer.state_dict()))
    check(peer, mine, name)
    back = theirs(twins(mine))
    back.load_state_dict(give_back(mine))
    check(back, mine, name)


def states_of(saved: Any) -> Any:
    """Without what transformers keeps of the step before."""
    return {k: {n: x for n, x in entry.items() if n != "RMS"} for k, entry in saved["state"].items()}


def check(one: Any, other: Any, name: str) -> None:
    for k, (apart, unit) in enumerate(zip(*step_both(one, other), strict=True)):
        if name == "Muon":  # both round products to bfloat16: directions part by 3 % of their length
            assert (apart**2).mean() ** 0.5 <= 0.03 * 0.02
        else:
            assert (apart <= UNITS * unit).all(), (k, (apart / unit).max())


def test_what_the_peer_does_not_have_is_refused() -> None:
    params = [torch.nn.Parameter(torch.ones(64, 80))]
    saved = torch.optim.Adafactor(params).state_dict()
    adafactor, muon = rc.optim.Adafactor(params), rc.optim.Muon8bit(params)
    refused: list[tuple[type[Exception], str, Any]] = [
        (
            StateError,
            "from_torch: group 0: torch.optim has variant='torch' alone, here it is 'transformers'",
            lambda: convert.from_torch(saved, adafactor),
        ),
        (
            StateError,
            "to_torch: group 0 has codecs {'B': 'dynamic8'}; torch.optim keeps float32",
            lambda: convert.to_torch(muon),
        ),
        (
            StateError,
            "to_torch: group 0: torch.optim has maximize=False alone, here it is True",
            lambda: convert.to_torch(rc.optim.Muon(params, maximize=True)),
        ),
        (
            TypeError,
            "to_transformers: opt must be Adafactor of refopt_cuda.optim, got Muon8bit",
            lambda: convert.to_transformers(muon),
        ),
        (
            ShapeError,
            r"from_transformers: its parameter groups have \[0\] tensors, this optimizer's have \[1\]",
            lambda: convert.from_transformers({"state": {}, "param_groups": [{"params": []}]}, adafactor),
        ),
        (
            StateError,
            r"from_transformers: state\[0\] has 'momentum', which Adafactor does not keep",
            lambda: convert.from_transformers(
                {"state": {0: {"momentum": torch.ones(3)}}, "param_groups": [{"params": [0]}]}, adafactor
            ),
        ),
    ]
    for error, words, make in refused:
        with pytest.raises(error, match=words):
            make()
