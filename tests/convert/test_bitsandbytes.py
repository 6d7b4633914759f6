"""States of bitsandbytes, proved by bitsandbytes: its next step is ours, and ours is its."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import refopt_cuda as rc
from refopt import ShapeError, StateError
from refopt_cuda import convert
from tests.convert.beside import ALIGNED, frozen, params_of, quietly, run, same_tree, step_both, twins

bnb = pytest.importorskip("bitsandbytes")

ADAMW = {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.11}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW8bit", ADAMW),
    ("Lion8bit", {"lr": 0.003, "betas": (0.85, 0.95), "weight_decay": 0.2}),
    ("SGD8bit", {"lr": 0.03, "momentum": 0.85, "weight_decay": 0.07}),
    ("AdEMAMix8bit", {"lr": 0.013, "betas": (0.8, 0.97, 0.995), "alpha": 3.5}),
]
UNITS = 16
"""In the last place of the largest of old weight, new weight and step. Their moments are sums with an FMA, their bias
corrections divide; where a first moment nearly cancels, its last bits weigh more."""


def theirs(name: str, words: dict[str, Any]) -> Any:
    return run(lambda params: getattr(bnb.optim, name)(params, **words))


def ours(name: str, words: dict[str, Any], params: Any) -> Any:
    return getattr(rc.optim, name)(params, **words)


@pytest.mark.parametrize(("name", "words"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_run_changes_sides_twice_and_steps_alike(name: str, words: dict[str, Any]) -> None:
    """Tensors of whole blocks pass as the same bytes, so the next step parts by roundings alone."""
    peer = theirs(name, words)
    mine = getattr(rc.optim, name)(twins(peer))
    saved, said = quietly(frozen, peer, lambda: convert.from_bitsandbytes(peer.state_dict(), mine))
    assert all("no whole blocks of 256" in text for text in said) and said
    mine.load_state_dict(saved)
    assert {k: mine.param_groups[0][k] for k in words} == words
    check(peer, mine)
    back = getattr(bnb.optim, name)(twins(mine), lr=1.0, **({"momentum": 0.5} if name == "SGD8bit" else {}))
    back.load_state_dict(quietly(frozen, mine, lambda: convert.to_bitsandbytes(mine))[0])
    assert back.param_groups[0]["lr"] == words["lr"]
    check(back, mine)


def check(one: Any, other: Any, units: int = UNITS) -> None:
    apart, unit = step_both(one, other)
    for k in ALIGNED:
        assert (apart[k] <= units * unit[k]).all(), (k, (apart[k] / unit[k]).max())
    assert np.isfinite(apart[1]).all()


@pytest.mark.parametrize(("name", "words"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_there_and_back_changes_no_bit(name: str, words: dict[str, Any]) -> None:
    """Codes, scales and the map itself, of tensors of whole blocks and of those in float32."""
    peer = theirs(name, words)
    mine = getattr(rc.optim, name)(twins(peer), **words)
    mine.load_state_dict(quietly(convert.from_bitsandbytes, peer.state_dict(), mine)[0])
    again = quietly(convert.to_bitsandbytes, mine)[0]
    for k in ALIGNED:
        flat = peer.state[params_of(peer)[k]]
        same_tree(again["state"][k], {key: flat[key] for key in again["state"][k]}, f"state[{k}]")


@pytest.mark.parametrize("name", ["RMSprop8bit", "Adagrad8bit"])
def test_a_second_moment_in_the_signed_map_is_decoded_exactly(name: str) -> None:
    """Float32 states here: what their map says, not what ours would."""
    peer = theirs(name, {"lr": 0.013})
    mine = getattr(rc.optim, name.removesuffix("8bit"))(twins(peer))
    saved, said = quietly(convert.from_bitsandbytes, peer.state_dict(), mine)
    assert not said
    key = "square_avg" if name == "RMSprop8bit" else "sum"
    for p, entry in zip(params_of(peer), saved["state"].values(), strict=True):
        state = peer.state[p]
        want = state["state1"]
        if want.dtype == torch.uint8:
            want = torch.ops.bitsandbytes.dequantize_blockwise(
                want, state["absmax1"], state["qmap1"], 256, torch.float32
            )
        assert torch.equal(entry[key], want)
    mine.load_state_dict(saved)
    coded = getattr(rc.optim, name)(twins(peer))
    saved, said = quietly(convert.from_bitsandbytes, peer.state_dict(), coded)
    assert "another code book" in said[0] and "rounded anew: 2" in said[0]
    coded.load_state_dict(saved)
    out, said = quietly(convert.to_bitsandbytes, coded)
    assert "rounded anew: 2, dynamic8.signed" in said[0] and (out["state"][0]["qmap1"] < 0).any()


def test_the_wrapping_of_newer_releases_is_taken_with_or_without() -> None:
    peer = theirs("AdamW8bit", ADAMW)
    saved = peer.state_dict()
    assert convert.bitsandbytes.WRAPPED in saved["state"][0]
    bare = copy.deepcopy(saved)
    bare["state"] = {k: dict(peer.state[p]) for k, p in enumerate(params_of(peer))}
    mine = rc.optim.AdamW8bit(twins(peer))
    same_tree(*(quietly(convert.from_bitsandbytes, side, mine)[0] for side in (saved, bare)))


@pytest.mark.parametrize("codecs", ["f32", "q4", {"m": "bf16", "v": "dynamic8"}, {"p": "bf16_rem16"}], ids=str)
def test_any_codecs_take_their_states(codecs: Any) -> None:
    """And weights a format that bitsandbytes has not: its bits begin at zero."""
    peer = run(lambda params: bnb.optim.AdamW8bit(params, **ADAMW), torch.bfloat16)
    mine = rc.optim.AdamW8bit(twins(peer), codecs=codecs)
    mine.load_state_dict(quietly(convert.from_bitsandbytes, peer.state_dict(), mine)[0])
    state = mine.state[params_of(mine)[0]]
    assert state["step"] == 2
    if "p.rem" in state:
        assert not state["p.rem"].any()
        assert any("left behind: what lies beside" in text for text in quietly(convert.to_bitsandbytes, mine)[1])


def test_32_bit_states_pass_bit_for_bit_both_ways() -> None:
    peer = theirs("AdamW32bit", ADAMW)
    mine = rc.optim.AdamW(twins(peer))
    saved, said = quietly(convert.from_bitsandbytes, peer.state_dict(), mine)
    mine.load_state_dict(saved)
    out, more = quietly(convert.to_bitsandbytes, mine)
    assert not said and not more
    for k, p in enumerate(params_of(peer)):
        same_tree(out["state"][k], dict(peer.state[p]))
    same_tree(out["param_groups"], peer.state_dict()["param_groups"])


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("Signum8bit", "to", {}, "no signum; it has sgd"),
    ("Adam8bit", "to", {"weight_decay": 0.1}, "coupled here"),
    ("AdamW8bit", "to", {"amsgrad": True}, "no amsgrad"),
    ("SGD8bit", "to", {"momentum": 0.9, "nesterov": True}, "no nesterov"),
    ("AdamW8bit", "to", {"maximize": True}, "no maximize"),
    ("AdamW8bit", "to", {"decay_order": "additive"}, "no decay_order"),
    ("SGD8bit", "to", {}, "a momentum above 0"),
    ("RMSprop8bit", "to", {"centered": True}, "no centered"),
    ("Lion8bit", "from", {}, "no tensor|has"),
    ("Adam8bit", "from", {}, "AdamW here"),
]


@pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")
@pytest.mark.parametrize(("name", "way", "words", "text"), REFUSED, ids=str)
def test_what_has_no_meaning_there_is_refused(name: str, way: str, words: dict[str, Any], text: str) -> None:
    mine = getattr(rc.optim, name)([torch.nn.Parameter(torch.ones(64, 256))], **words)
    saved = {"state": {0: {"step": 1}}, "param_groups": [{"params": [0], **ADAMW}]}
    with pytest.raises(StateError, match=text):
        convert.to_bitsandbytes(mine) if way == "to" else convert.from_bitsandbytes(saved, mine)


def test_other_shapes_groups_and_holes_are_refused() -> None:
    peer = theirs("AdamW8bit", ADAMW)
    saved = peer.state_dict()
    wide = rc.optim.AdamW8bit([torch.nn.Parameter(torch.ones(s)) for s in [(256, 64), (64, 80), (9,)]])
    with pytest.raises(ShapeError, match=r"m is of shape \(64, 256\), the parameter of \(256, 64\)"):
        convert.from_bitsandbytes(saved, wide)
    few = rc.optim.AdamW8bit(twins(peer)[:2])
    with pytest.raises(ShapeError, match="have \\[3\\] tensors, this optimizer's have \\[2\\]"):
        convert.from_bitsandbytes(saved, few)
    mine = rc.optim.AdamW8bit(twins(peer))
    for key, text in (("qmap1", "no 'qmap1'"), ("absmax2", "no 'qmap2'"), ("state2", "no tensor 'state2'")):
        holed = copy.deepcopy(saved)
        del holed["state"][0][convert.bitsandbytes.WRAPPED][key]
        with pytest.raises(StateError, match=text):
            convert.from_bitsandbytes(holed, mine)
    odd = copy.deepcopy(saved)
    odd["state"][0][convert.bitsandbytes.WRAPPED]["absmax1"] = torch.ones(5)
    with pytest.raises(StateError, match="has 5 scales"):
        convert.from_bitsandbytes(odd, mine)
    with pytest.raises(TypeError, match="element-wise optimizer"):
        convert.from_bitsandbytes(saved, peer)


def test_a_map_of_another_kind_is_decoded_and_rounded_anew() -> None:
    """A linear map, as an older option had it: the values are what the file says."""
    peer = theirs("AdamW8bit", ADAMW)
    saved = copy.deepcopy(peer.state_dict())
    inner = saved["state"][0][convert.bitsandbytes.WRAPPED]
    inner["qmap1"] = torch.linspace(-1, 1, 256)
    mine = rc.optim.AdamW8bit(twins(peer))
    out, said = quietly(convert.from_bitsandbytes, saved, mine)
    assert any("rounded anew: 1, in another code book" in text for text in said)
    plain = rc.optim.AdamW(twins(peer))
    exact = convert.from_bitsandbytes(saved, plain)["state"][0]["exp_avg"]
    want = inner["qmap1"][inner["state1"].long()] * inner["absmax1"].repeat_interleave(256).reshape(64, 256)
    assert torch.equal(exact, want)
    mine.load_state_dict(out)


@pytest.mark.gpu
def test_a_run_on_cuda_changes_sides_twice_and_steps_alike() -> None:
    """There it decays after the step, and its roots and quotients are approximate."""
    peer = run(lambda params: bnb.optim.AdamW8bit(params, **ADAMW), device="cuda")
    mine = rc.optim.AdamW8bit(twins(peer), decay_order="after")
    mine.load_state_dict(quietly(convert.from_bitsandbytes, peer.state_dict(), mine)[0])
    check(peer, mine, 8 * UNITS)
    back = bnb.optim.AdamW8bit(twins(mine))
    back.load_state_dict(quietly(convert.to_bitsandbytes, mine)[0])
    check(back, mine, 8 * UNITS)
