"""Rules of whole tensors with coded states: the bits of the reference, resumed too; small tensors keep float32 ones."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.optim import coded, whole_slots
from tests.bits import same_bits
from tests.optim.pairs import exact, give, parameter, weights

CASES: list[tuple[str, dict[str, Any], str, dict[str, Any], dict[str, str]]] = [
    (
        "LAMB8bit",
        {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.06},
        "lamb",
        {"lr": 0.013, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "wd": 0.06},
        {"m": "dynamic8", "v": "dynamic8"},
    ),
    (
        "LARS8bit",
        {"lr": 0.7, "momentum": 0.85, "weight_decay": 0.07, "trust_coefficient": 0.02},
        "lars",
        {"lr": 0.7, "momentum": 0.85, "wd": 0.07, "trust": 0.02},
        {"v": "dynamic8"},
    ),
    (
        "LAMB",
        {"lr": 0.013, "weight_decay": 0.06, "codecs": {"m": "q4", "v": "bf16"}},
        "lamb",
        {"lr": 0.013, "wd": 0.06},
        {"m": "q4", "v": "bf16"},
    ),
    (
        "AdafactorFp8",
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "beta1": 0.8, "weight_decay": 0.2},
        "adafactor",
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "beta1": 0.8, "wd": 0.2},
        {"m": "fp8"},
    ),
    ("CAME8bit", {"lr": 0.003, "weight_decay": 0.2}, "came", {"lr": 0.003, "wd": 0.2}, {"m": "dynamic8"}),
    (
        "AdamMini4bit",
        {"lr": 0.013, "weight_decay": 0.11, "blocks": "whole"},
        "adam_mini",
        {"lr": 0.013, "wd": 0.11, "blocks": "whole"},
        {"m": "q4"},
    ),
]
TURNS = [(1 << 24, *CASES[0]), *((5000, *case) for case in CASES)]
SHAPES = [(64, 128), (33, 200), (16, 8, 40), (63, 64), (7,), (0,)]
"""Coded: whole blocks, ragged rows, three dimensions. Not coded: small ones."""


@pytest.mark.filterwarnings("ignore:.*bitsandbytes")
@pytest.mark.parametrize(("most", "name", "words", "stem", "hyper", "codecs"), TURNS, ids=[c[1] for c in TURNS])
def test_steps_have_the_bits_of_the_reference(
    most: int,
    name: str,
    words: dict,
    stem: str,
    hyper: dict,
    codecs: dict,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All tensors decoded at once, and in batches."""
    monkeypatch.setattr(whole_slots, "MOST", most)
    params = weights(SHAPES, torch.float32, device)
    opt = getattr(rc.optim, name)(params, **words)
    refs = [refopt.Optimizer(stem, codecs=codecs if p.numel() >= 4096 else None, **hyper) for p in params]
    want = [exact(p) for p in params]
    kept = [ref.init(w) for ref, w in zip(refs, want, strict=True)]
    for t in range(3):
        give(params, t)
        opt.step()
        for k, (p, ref) in enumerate(zip(params, refs, strict=True)):
            want[k], kept[k] = ref.step(want[k], exact(p.grad), kept[k])
            same_bits(exact(p), want[k], f"{name} step {t + 1} of {SHAPES[k]}")
    role, coded = next(iter(codecs)), opt.state[params[1]]
    for key in ("codes", "scales"):
        assert np.array_equal(coded[f"{role}.{key}"].cpu().numpy(), getattr(kept[1][0][role], key))
    assert f"{role}.codes" not in opt.state[params[4]]


@pytest.mark.filterwarnings("ignore:.*bitsandbytes")
@pytest.mark.parametrize(("name", "words"), [c[:2] for c in CASES], ids=[c[0] for c in CASES])
def test_resuming_changes_no_bit(name: str, words: dict) -> None:
    params = weights([(64, 128), (7,)], torch.float32, "cpu")
    opt = getattr(rc.optim, name)(params, **words)
    give(params, 0)
    opt.step()
    others = [parameter(p.detach().clone()) for p in params]
    other = getattr(rc.optim, name)(others, **words)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one, some in ((opt, params), (other, others)):
        give(some, 1)
        one.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(x, other.state[q][k]) for k, x in opt.state[p].items() if k != "step")


def test_the_limit_and_the_bits_are_checked() -> None:
    p = [parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="LAMB8bit: min_8bit_size must be a whole number >= 0, got -1"):
        rc.optim.LAMB8bit(p, min_8bit_size=-1)
    with pytest.raises(ValueError, match="LARS8bit: optim_bits must be 8, as the name says, got 4"):
        rc.optim.LARS8bit(p, optim_bits=4)


def test_what_is_held_together_is_never_full_unless_it_is_one() -> None:
    assert list(coded.together([3, 4, 5, 9, 1], lambda some: sum(some) > 8)) == [[3, 4], [5], [9], [1]]
    assert list(coded.together([], bool)) == []
