"""States of FlashOptim: the layout as its source has it, on a CPU; its own next step, on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import refopt_cuda as rc
from refopt import StateError, codecs
from refopt_cuda import convert
from tests.convert.beside import filled, params_of, quietly, run, same_tree, step_both, twins

ADAMW = {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.11}
SHAPES = [(64, 96), (64, 80), (9,)]


def mine(bits: str = "bf16_ecc") -> Any:
    """States of ours in FlashOptim's formats."""
    return filled(lambda params: rc.optim.AdamW(params, **ADAMW, **in_formats(bits)), torch.bfloat16, SHAPES)


def in_formats(bits: str) -> dict[str, Any]:
    return {"codecs": {"m": "compand8", "v": "compand8", "p": bits}, "min_8bit_size": 0}


def numbers(entry: dict[str, Any], key: str) -> np.ndarray:
    """What FlashOptim reads, in flat groups of 32: x = t / (2 - |t|) s for t = q / 127, and v = (q / 255 s)^2."""
    q = entry[f"{key}::quantized"].numpy().reshape(-1).astype(np.float64)
    s = entry[f"{key}::scales"].view(torch.float16).numpy().astype(np.float64).repeat(32)[: q.size]
    t = q / 127
    return (q / 255 * s) ** 2 if key == "exp_avg_sq" else t / (2 - abs(t)) * s


def test_the_layout_is_what_its_source_reads() -> None:
    """Keys, dtypes, groups of the flattened tensor; (64, 96) and the vector pass as codes, (64, 80) as numbers."""
    opt = mine()
    out, said = quietly(convert.to_flashoptim, opt)
    assert not said
    for k, p in enumerate(params_of(opt)):
        entry, state = out["state"][k], opt.state[p]
        assert entry["step"].dtype == torch.int64 and int(entry["step"]) == 2
        assert entry["error_bits"].dtype == torch.bfloat16 and entry["error_bits"].shape == p.shape
        assert torch.equal(entry["error_bits"].to(torch.int8), state["p.error"])
        for key, role, dtype in (("exp_avg", "m", torch.int8), ("exp_avg_sq", "v", torch.uint8)):
            kept = [state[f"{role}.{part}"].numpy() for part in ("codes", "scales")]
            want = codecs.compand8(signed=role == "m").decode(box(p, role, kept))
            if k == 1:
                assert entry[key].dtype == torch.float32 and np.array_equal(entry[key].numpy(), want)
                continue
            assert entry[f"{key}::quantized"].dtype == dtype and entry[f"{key}::quantized"].shape == p.shape
            assert entry[f"{key}::scales"].dtype == torch.bfloat16 and key not in entry
            np.testing.assert_allclose(numbers(entry, key), want.reshape(-1), rtol=8 * 2**-24)
    group = out["param_groups"][0]
    assert group["master_bytewidth"] == 3 and group["quantize"] is True and group["initial_lr"] == ADAMW["lr"]


def box(p: torch.Tensor, role: str, kept: list[np.ndarray]) -> Any:
    record = codecs.compand8(signed=role == "m")
    made = record.encode(np.zeros(tuple(p.shape), np.float32))
    return type(made)(record, made.shape, dict(zip(("codes", "scales"), kept, strict=True)))


@pytest.mark.parametrize("bits", ["bf16_ecc", "bf16_ecc.16"])
def test_there_and_back_changes_no_bit(bits: str) -> None:
    opt = mine(bits)
    out, _ = quietly(convert.to_flashoptim, opt)
    assert out["param_groups"][0]["master_bytewidth"] == (4 if bits.endswith("16") else 3)
    other = rc.optim.AdamW(twins(opt), **in_formats(bits))
    saved, _ = quietly(convert.from_flashoptim, out, other)
    for k in (0, 2):
        same_tree(saved["state"][k], dict(opt.state[params_of(opt)[k]]), f"state[{k}]")
    assert torch.equal(saved["state"][1]["p.error"], opt.state[params_of(opt)[1]]["p.error"])
    other.load_state_dict(saved)
    assert {name: other.param_groups[0][name] for name in ADAMW} == ADAMW


def test_lion_and_sgd_keep_no_count() -> None:
    for name, key, words in (
        ("Lion", "exp_avg", {"betas": (0.85, 0.95)}),
        ("SGD", "momentum_buffer", {"momentum": 0.85}),
    ):
        codes, scales = torch.full((64, 96), 3, dtype=torch.int8), torch.ones(192, dtype=torch.float16)
        state = {f"{key}::quantized": codes, f"{key}::scales": scales}
        saved = {"state": {0: state}, "param_groups": [{"params": [0], "lr": 0.01, "weight_decay": 0.0, **words}]}
        opt = getattr(rc.optim, name)([torch.nn.Parameter(torch.ones(64, 96))], codecs="compand8")
        opt.load_state_dict(convert.from_flashoptim(saved, opt))
        role = "m" if name == "Lion" else "buf"
        entry = opt.state[params_of(opt)[0]]
        assert entry["step"] == 1 and torch.equal(entry[f"{role}.codes"], codes)
        assert entry[f"{role}.scales"].dtype == torch.float16 and entry[f"{role}.scales"].shape == (64, 3)
        assert "step" not in convert.to_flashoptim(opt)["state"][0]


def test_weights_without_a_state_keep_their_error_bits() -> None:
    """SGD without momentum."""
    bits = torch.randint(-127, 128, (64, 96)).to(torch.bfloat16)
    group = {"params": [0], "lr": 0.01, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0}
    opt = rc.optim.SGD([torch.nn.Parameter(torch.ones(64, 96, dtype=torch.bfloat16))], codecs={"p": "bf16_ecc"})
    opt.load_state_dict(convert.from_flashoptim({"state": {0: {"error_bits": bits}}, "param_groups": [group]}, opt))
    assert torch.equal(opt.state[params_of(opt)[0]]["p.error"], bits.to(torch.int8))
    assert torch.equal(convert.to_flashoptim(opt)["state"][0]["error_bits"], bits)
    assert convert.to_torch(rc.optim.SGD([torch.nn.Parameter(torch.ones(3))]))["state"] == {}


def test_error_bits_without_a_place_are_refused() -> None:
    out, _ = quietly(convert.to_flashoptim, mine())
    params = [torch.nn.Parameter(torch.zeros(s, dtype=torch.bfloat16)) for s in SHAPES]
    with pytest.raises(StateError, match=r"error bits of torch\.bfloat16 weights; bfloat16 weights with codecs"):
        convert.from_flashoptim(out, rc.optim.AdamW(params))
    wide = rc.optim.AdamW(params, codecs={"p": "bf16_ecc.16"})
    wide_bits = {**out["state"][0], "error_bits": out["state"][0]["error_bits"].to(torch.int8)}
    with pytest.raises(StateError, match=r"bits beside the weights are torch\.int8, here torch\.int16"):
        convert.from_flashoptim({**out, "state": {0: wide_bits}}, wide)
    with pytest.raises(StateError, match="has no adagrad; it has sgd"):
        convert.to_flashoptim(rc.optim.Adagrad(params))
    assert any("left behind" in text for text in quietly(convert.to_flashoptim, mine("bf16_rem16"))[1])


UNITS = 2**16 + 64
"""In the last place of a bfloat16 weight's float32 form: the step's rounding may fall on the other side of a tie; and
FlashOptim's powers, roots and quotients are its device's."""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "words"), [("AdamW", ADAMW), ("Lion", {"lr": 0.003, "betas": (0.85, 0.95), "weight_decay": 0.2})]
)
def test_a_run_changes_sides_twice_and_steps_alike(name: str, words: dict[str, Any]) -> None:
    """On aligned tensors, their next step from the same codes and error bits."""
    flash = pytest.importorskip("flashoptim")
    shapes = [(64, 96), (9,)]
    peer = run(lambda params: getattr(flash, "Flash" + name)(params, **words), torch.bfloat16, shapes, "cuda")
    codes = dict.fromkeys(("m", "v") if name == "AdamW" else ("m",), "compand8") | {"p": "bf16_ecc"}
    other = getattr(rc.optim, name)(twins(peer), codecs=codes, min_8bit_size=0)
    saved, said = quietly(convert.from_flashoptim, peer.state_dict(), other)
    assert not said
    other.load_state_dict(saved)
    check(peer, other)
    back = getattr(flash, "Flash" + name)(twins(other), **words)
    back.load_state_dict(quietly(convert.to_flashoptim, other)[0])
    check(back, other)


def check(one: Any, other: Any) -> None:
    for k, (apart, unit) in enumerate(zip(*step_both(one, other), strict=True)):
        assert (apart <= UNITS * unit).all(), (k, (apart / unit).max())
        assert (apart == 0).mean() > 0.99, (k, (apart == 0).mean())
