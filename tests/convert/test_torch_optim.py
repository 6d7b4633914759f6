"""States of torch.optim: float32 ones pass bit for bit, coded ones are encoded and decoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt import StateError
from refopt_cuda import convert
from tests.convert.beside import params_of, quietly, run, same_tree, step_both, twins

ADAM = {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", ADAM | {"weight_decay": 0.11}),
    ("SGD", {"lr": 0.03, "momentum": 0.85, "dampening": 0.2, "weight_decay": 0.07}),
]
UNITS = 16
"""In the last place of the largest of old weight, new weight and step; torch interpolates where ours adds."""


@pytest.mark.parametrize(("name", "words"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_run_changes_sides_twice_and_steps_alike(name: str, words: dict[str, Any]) -> None:
    peer = run(lambda params: getattr(torch.optim, name)(params, **words))
    mine = getattr(rc.optim, name)(twins(peer))
    saved, said = quietly(convert.from_torch, peer.state_dict(), mine)
    assert not said
    mine.load_state_dict(saved)
    check(peer, mine)
    back = getattr(torch.optim, name)(twins(mine))
    back.load_state_dict(convert.to_torch(mine))
    check(back, mine)
    assert back.param_groups[0].keys() == peer.param_groups[0].keys()


def check(one: Any, other: Any) -> None:
    for k, (apart, unit) in enumerate(zip(*step_both(one, other), strict=True)):
        assert (apart <= UNITS * unit).all(), (k, (apart / unit).max())


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_there_and_back_changes_no_bit(name: str) -> None:
    more = {"momentum": 0.85} if name in ("SGD", "RMSprop") else {"amsgrad": True} if "Adam" in name else {}
    more |= {"centered": True} if name == "RMSprop" else {}
    peer = run(lambda params: getattr(torch.optim, name)(params, lr=0.013, **more))
    mine = getattr(rc.optim, name)(twins(peer))
    mine.load_state_dict(convert.from_torch(peer.state_dict(), mine))
    same_tree(convert.to_torch(mine), peer.state_dict())


def test_a_run_in_float32_goes_on_in_8_bits_and_back() -> None:
    peer = run(lambda params: torch.optim.AdamW(params, **ADAM))
    mine = rc.optim.AdamW8bit(twins(peer))
    saved, said = quietly(convert.from_torch, peer.state_dict(), mine)
    assert any("rounded anew: 2, numbers there and dynamic8.signed in blocks of 256 here" in text for text in said)
    mine.load_state_dict(saved)
    exact, again = peer.state[params_of(peer)[1]], convert.to_torch(mine)["state"][1]
    rows = exact["exp_avg"].abs().amax(-1, keepdim=True)
    assert ((again["exp_avg"] - exact["exp_avg"]).abs() <= 0.0071 * rows).all()
    assert torch.equal(convert.to_torch(mine)["state"][2]["exp_avg_sq"], peer.state[params_of(peer)[2]]["exp_avg_sq"])


def test_what_has_no_meaning_there_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(64, 256))
    with pytest.raises(StateError, match=r"torch\.optim has no lion"):
        convert.to_torch(rc.optim.Lion([p]))
    with pytest.raises(StateError, match="no eps_at"):
        convert.to_torch(rc.optim.AdamW([p], eps_at="inside"))
    coupled = run(lambda params: torch.optim.Adam(params, weight_decay=0.1), shapes=[(64, 256)])
    with pytest.raises(StateError, match="decoupled_weight_decay False, which is not adamw"):
        convert.from_torch(coupled.state_dict(), rc.optim.AdamW([p]))
    nadam = run(lambda params: torch.optim.NAdam(params), shapes=[(64, 256)])
    with pytest.raises(StateError, match="has 'mu_product', which adam does not keep"):
        convert.from_torch(nadam.state_dict(), rc.optim.Adam([p]))
    with pytest.raises(TypeError, match="element-wise optimizer"):
        convert.to_torch(rc.optim.LAMB([p]))
