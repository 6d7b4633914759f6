"""Rules of matrices, and SM3, with a coded momentum or coded moments: the reference's codes, and resumed runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from tests.optim.pairs import exact
from tests.optim.test_checkpoints import resume_alike, through_a_file, twins
from tests.optim.test_muon import give, matrices

SHAPES = [(64, 96), (33, 200), (3, 40)]
"""Coded: whole blocks and ragged rows. Not coded: a small matrix."""


@pytest.mark.parametrize("codec", ["dynamic8", "q4", "bf16"])
@pytest.mark.parametrize(("name", "role"), [("Muon", "B"), ("SM3", "m")])
def test_the_momentum_has_the_references_codes(name: str, role: str, codec: str, device: str) -> None:
    """From weights of zero in every step, since directions differ in their last bits."""
    params = matrices(SHAPES, device=device)
    opt = getattr(rc.optim, name)(params, lr=0.1, momentum=0.8, codecs=codec)
    refs = [
        refopt.Optimizer(name.lower(), {role: codec if p.numel() >= 4096 else "f32"}, lr=0.1, momentum=0.8)
        for p in params
    ]
    kept = [ref.init(exact(p)) for ref, p in zip(refs, params, strict=True)]
    for t in range(4):
        give(params, t)
        for k, (ref, p) in enumerate(zip(refs, params, strict=True)):
            with torch.no_grad():
                p.zero_()
            _, kept[k] = ref.step(exact(p), exact(p.grad), kept[k])
        opt.step()
        for p, (s,) in zip(params, kept, strict=True):
            entry = opt.state[p]
            if f"{role}.codes" in entry:
                for key in ("codes", "scales"):
                    assert np.array_equal(entry[f"{role}.{key}"].cpu().numpy(), getattr(s[role], key)), (t, p.shape)
            else:
                have = s[role].decode() if p.numel() >= 4096 else s[role]
                assert np.array_equal(exact(entry["momentum_buffer"]), have), (t, p.shape)
    assert ("momentum_buffer" in opt.state[params[0]]) == (codec == "bf16")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Muon8bit", {"lr": 0.02}),
        ("SM3", {"codecs": "fp8", "lr": 0.02}),
        ("APOLLOAdamW8bit", {"rank": 24, "min_8bit_size": 1000}),
        ("APOLLOAdamW", {"rank": 24, "codecs": {"v": "q4"}, "min_8bit_size": 1000}),
        ("GaLoreAdamW", {"rank": 24, "codecs": {"m": "q4"}, "min_8bit_size": 1000}),
    ],
)
def test_resuming_changes_no_bit(name: str, words: dict[str, Any], device: str) -> None:
    params, make = matrices(SHAPES[:2], torch.bfloat16, device), getattr(rc.optim, name)
    opt = make(params, **words)
    for t in range(2):
        give(params, t)
        opt.step()
    assert any(key.endswith(".codes") for key in opt.state[params[0]])
    other = make(twins(params, device), **words)
    other.load_state_dict(through_a_file(opt.state_dict()))
    resume_alike(opt, other)


@pytest.mark.parametrize(
    ("name", "words"),
    [("Muon4bit", {}), ("SM3", {}), ("GaLoreAdamW", {"rank": 24}), ("APOLLOAdamWFp8", {"rank": 24})],
)
def test_climbing_is_descending_along_the_other_sign(name: str, words: dict[str, Any]) -> None:
    (p,), (q,) = (matrices([(64, 96)]) for _ in range(2))
    make = getattr(rc.optim, name)
    one, other = make([p], **words, min_8bit_size=1000), make([q], **words, min_8bit_size=1000, maximize=True)
    give([p], 3)
    q.grad = -p.grad
    one.step(), other.step()
    assert torch.equal(p, q) and one.state[p].keys() == other.state[q].keys()
    assert any(key.endswith(".codes") for key in one.state[p]) == name.endswith(("4bit", "Fp8"))
    with pytest.raises(TypeError, match=f"{name}: maximize must be True or False, got 1"):
        make([p], maximize=1)


@pytest.mark.parametrize("words", [{}, {"rank": 24}], ids=["whole", "projected"])
def test_apollo_in_8_bits_steps_from_what_its_codes_stand_for(words: dict[str, Any], device: str) -> None:
    """As the float32 class does from the same moments; what it leaves is encoded."""
    params, others = (matrices([(64, 96)], device=device) for _ in range(2))
    coded = rc.optim.APOLLOAdamW8bit(params, **words, min_8bit_size=1000)
    plain = rc.optim.APOLLOAdamW(others, **words)
    for t in range(3):
        give([*params], t), give([*others], t)
        coded.step(), plain.step()
        assert torch.equal(params[0], others[0]), t
        for role, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            codec = "dynamic8" if role == "m" else "dynamic8.unsigned"
            q = rc.quantize(plain.state[others[0]][key], codec)
            entry = coded.state[params[0]]
            assert torch.equal(q.codes, entry[f"{role}.codes"]) and torch.equal(q.scales, entry[f"{role}.scales"])
            plain.state[others[0]][key].copy_(rc.dequantize(q))
