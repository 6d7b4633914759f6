"""States of torchao, proved by torchao: its next step is ours, and ours is its."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt import StateError
from refopt_cuda import convert
from tests.convert.beside import ALIGNED, frozen, params_of, quietly, run, same_tree, step_both, twins

ao = pytest.importorskip("torchao.optim")

WORDS = {"lr": 0.0078125, "betas": (0.75, 0.96875), "eps": 1e-7, "weight_decay": 0.125}
"""Numbers of few bits: torchao keeps its learning rate in float32."""
SHAPES = [(64, 256), (64, 80), (9,)]
UNITS = 27
"""In the last place of the largest of old weight, new weight and step: 16 as for other libraries whose first moment may
cancel, and 1 / (1 - beta2^3) more, because 1 - beta2^t is a difference of float32 numbers there."""
KINDS = ["8bit", "4bit", "Fp8"]


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """torchao's step as it is written: compiling it for every shape takes half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(kind: str, rule: str = "AdamW", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return run(lambda params: getattr(ao, rule + kind)(params, **(WORDS | more)), dtype)


def flat(x: Any) -> Any:
    """A subclass as the tensors that it is made of."""
    if not hasattr(x, "__tensor_flatten__"):
        return x
    names, rest = x.__tensor_flatten__()
    bits = [getattr(x, name) for name in names]
    return [b.view(torch.uint8) if b.dtype == torch.float8_e4m3fn else b for b in bits], list(rest)


def check(one: Any, other: Any) -> None:
    apart, unit = step_both(one, other)
    for k in ALIGNED:
        assert (apart[k] <= UNITS * unit[k]).all(), (k, (apart[k] / unit[k]).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_changes_sides_twice_and_steps_alike(kind: str) -> None:
    peer = theirs(kind)
    mine = getattr(rc.optim, "AdamW" + kind)(twins(peer))
    saved, said = quietly(frozen, mine, lambda: convert.from_torchao(peer.state_dict(), mine))
    assert len(said) == 1 and "rounded anew: 2, of rows that are no whole blocks" in said[0]
    mine.load_state_dict(saved)
    assert {k: mine.param_groups[0][k] for k in WORDS} == WORDS
    check(peer, mine)
    back = getattr(ao, "AdamW" + kind)(twins(mine))
    back.load_state_dict(quietly(frozen, mine, lambda: convert.to_torchao(mine))[0])
    check(back, mine)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_changes_no_bit(kind: str) -> None:
    """Of tensors of whole blocks, and of float32 ones; their maps are made anew, and are theirs."""
    peer = theirs(kind)
    mine = getattr(rc.optim, "AdamW" + kind)(twins(peer))
    mine.load_state_dict(quietly(convert.from_torchao, peer.state_dict(), mine)[0])
    again = quietly(convert.to_torchao, mine)[0]
    for k in ALIGNED:
        want = peer.state[params_of(peer)[k]]
        assert again["state"][k].keys() == want.keys()
        for key, x in again["state"][k].items():
            assert type(x) is type(want[key])
            same_tree(flat(x), flat(want[key]), f"state[{k}].{key}")


def test_bfloat16_weights_and_plain_adam() -> None:
    """torchao's plain states are bfloat16 then; here they are widened."""
    peer = theirs("8bit", "Adam", torch.bfloat16, weight_decay=0.0)
    mine = rc.optim.Adam8bit(twins(peer))
    mine.load_state_dict(quietly(convert.from_torchao, peer.state_dict(), mine)[0])
    entry = peer.state[params_of(peer)[2]]
    assert entry["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(mine.state[params_of(mine)[2]]["exp_avg"], entry["exp_avg"].float())
    back = ao.Adam8bit(twins(mine))
    back.load_state_dict(quietly(convert.to_torchao, mine)[0])
    assert type(back.state[params_of(back)[0]]["exp_avg"]).__name__ == "OptimState8bit"
    back.step()


def test_float32_states_become_what_is_asked_for() -> None:
    mine = run(lambda params: rc.optim.AdamW(params, **WORDS))
    with pytest.raises(ValueError, match="kind must say for which class"):
        convert.to_torchao(mine)
    with pytest.raises(ValueError, match="got '2bit'"):
        convert.to_torchao(mine, "2bit")
    out, said = quietly(convert.to_torchao, mine, "4bit")
    assert any("q4.signed in flat blocks of 128" in text for text in said)
    back = ao.AdamW4bit(twins(mine))
    back.load_state_dict(out)
    p = params_of(mine)[0]
    near = back.state[params_of(back)[0]]["exp_avg"].dequantize()
    assert (near - mine.state[p]["exp_avg"]).abs().max() <= 0.12 * mine.state[p]["exp_avg"].abs().max()
    assert torch.equal(back.state[params_of(back)[2]]["exp_avg"], mine.state[params_of(mine)[2]]["exp_avg"])


def test_what_has_no_meaning_there_is_refused() -> None:
    peer = theirs("8bit")
    lion = rc.optim.Lion8bit(twins(peer))
    with pytest.raises(StateError, match="torchao has no lion; it has adam, adamw"):
        convert.from_torchao(peer.state_dict(), lion)
    with pytest.raises(StateError, match="torchao has no lion"):
        convert.to_torchao(lion)
    after = rc.optim.AdamW8bit(twins(peer), decay_order="after")
    with pytest.raises(StateError, match="no decay_order, here it is 'after'"):
        convert.to_torchao(after)
    odd = peer.state_dict()
    odd["state"][0] = {**odd["state"][0], "momentum": torch.ones(3)}
    with pytest.raises(StateError, match="has 'momentum'; torchao keeps exp_avg"):
        convert.from_torchao(odd, rc.optim.AdamW8bit(twins(peer)))
