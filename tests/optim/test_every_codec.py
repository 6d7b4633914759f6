"""Every codec for every role through the drop-ins, beside the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.codecs import WEIGHTS
from tests.kernels.covering import CODECS, words_of
from tests.optim.pairs import Case, give, snapshot, unchanged, walk, weights
from tests.optim.test_checkpoints import twins

MORE = [
    Case("Signum", "signum", {"lr": 0.003, "momentum": 0.85, "weight_decay": 0.2}),
    Case("RMSprop", "rmsprop", {"lr": 0.013, "alpha": 0.96, "eps": 1e-7, "momentum": 0.85, "centered": True}),
    Case("Adagrad", "adagrad", {"lr": 0.013, "initial_accumulator_value": 0.003, "eps": 1e-7}),
    Case("AdEMAMix", "ademamix", {"lr": 0.013, "betas": (0.8, 0.97, 0.995), "alpha": 3.5, "t_alpha": 3, "t_beta3": 5}),
    Case("AdamW", "adamw", {"lr": 0.013, "betas": (0.8, 0.97), "amsgrad": True, "decay_order": "after"}),
]
SUFFIXES = {"8bit": "dynamic8", "4bit": "q4", "Fp8": "fp8", "32bit": "f32"}
SHAPES = [(64, 128), (33, 200), (300, 16), (63, 65), (7,), (70000,)]
ADAMW = Case("AdamW", "adamw", {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.11})


def reference(case: Case) -> Case:
    """The same hyper-parameters by the names that the reference knows."""
    new = {"momentum": "beta"} if case.rule == "signum" else {"initial_accumulator_value": "init_acc"}
    words = {new.get(k, k): v for k, v in case.words.items()}
    if len(words.get("betas", ())) == 3:
        words |= dict(zip(("beta1", "beta2", "beta3"), words.pop("betas"), strict=True)) | {"wd": 1e-2}
    return case._replace(words=words)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_of_states(codec: str, device: str) -> None:
    params = weights(SHAPES, torch.bfloat16, device)
    walk(ADAMW, params, 3, ADAMW.make(params, codecs=codec), m=codec, v=codec)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("codec", words_of(WEIGHTS))
def test_every_format_of_weights(codec: str, device: str) -> None:
    """The float32 tensor beside them keeps its own format; random bits go by the tensor's number."""
    params = weights(SHAPES, torch.bfloat16, device) + weights([(64, 128)], torch.float32, device)
    opt = ADAMW.make(params, codecs={"p": codec, "v": "q4:64"})
    walk(ADAMW, params, 4, opt, p=codec, v="q4:64")
    assert ("p.rem" in opt.state[params[0]]) == (codec == "bf16_rem16")
    assert not any(key.startswith("p.") for key in opt.state[params[-1]])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
@pytest.mark.parametrize("case", MORE, ids=str)
def test_every_name_is_its_rule_with_its_codec(case: Case, suffix: str, device: str) -> None:
    params = weights(SHAPES[:3], torch.float32, device)
    opt = case._replace(name=case.name + suffix).make(params)
    usual = SUFFIXES.get(suffix, "f32")
    walk(reference(case), params, 3, opt, **dict.fromkeys(("m", "v", "w", "s", "buf", "a", "m1", "m2"), usual))


@pytest.mark.parametrize(
    "codecs",
    [{"p": "bf16_sr"}, {"p": "bf16_kahan"}, {"p": "bf16_rem16", "m": "fp8.e5m2"}, "q4", "compand8.bf16"],
    ids=str,
)
def test_a_run_that_was_saved_goes_on_to_the_same_bits(codecs: Any) -> None:
    params = weights(SHAPES, torch.bfloat16, "cpu")
    opt = ADAMW.make(params, codecs=codecs, seed=3)
    for t in range(2):
        give(params, t)
        opt.step()
    copies = twins(params)
    other = ADAMW.make(copies, codecs=codecs, seed=3)
    other.load_state_dict(opt.state_dict())
    for t in range(2, 4):
        for side, one in ((params, opt), (copies, other)):
            give(side, t)
            one.step()
    unchanged(other, [(p.detach(), opt.state[p]) for p in params])


def test_float32_weights_carry_on_without_their_format() -> None:
    p = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    opt = rc.optim.AdamW8bit([p], lr=1e-4, codecs={"p": "bf16_rem16"})
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    exact = (p.detach().view(torch.int16).to(torch.int32) << 16) + opt.state[p]["p.rem"].to(torch.int32)
    assert torch.equal(
        exact.view(torch.float32), torch.full_like(exact, 0).view(torch.float32) + exact.view(torch.float32)[0, 0]
    )
    assert 0.9996 < float(exact.view(torch.float32)[0, 0]) < 0.9998
    assert snapshot(opt)[0][1]["step"] == 3
