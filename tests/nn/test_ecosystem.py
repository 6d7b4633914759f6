"""transformers, peft and bitsandbytes: one folder that all load, adapters that train, save and merge under peft."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from refopt import StateError
from refopt_cuda.nn import Linear4bit, checkpoint, merge, prepare
from refopt_cuda.nn import peft as adapters

os.environ["HF_HUB_OFFLINE"] = "1"
transformers: Any = pytest.importorskip("transformers", reason="needs transformers: pip install 'refopt[finetune]'")
peft: Any = pytest.importorskip("peft", reason="needs peft: pip install 'refopt[finetune]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'refopt[finetune]'")

PEER = "needs bitsandbytes: pip install 'refopt[peers]'"
X = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def llama(tied: bool = False) -> Any:
    """Widths that are multiples of 64: bitsandbytes' CPU kernels are wrong for others."""
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    return model(X).logits.detach()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def coded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    checkpoint.save(checkpoint.load(plain), folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_is_loaded_coded_saved_and_loaded_again(tmp_path: Path, tied: bool) -> None:
    model = llama(tied)
    model.save_pretrained(tmp_path / "plain")
    wanted = logits(prepare(model))
    loaded = checkpoint.load(tmp_path / "plain")
    checkpoint.save(loaded, tmp_path / "coded")
    for made in (loaded, checkpoint.load(tmp_path / "coded")):
        assert torch.equal(logits(made), wanted)
        assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
        assert not isinstance(made.lm_head, Linear4bit)


def test_a_merged_model_is_an_ordinary_one(coded: Path, tmp_path: Path) -> None:
    model = checkpoint.load(coded)
    wanted = logits(model)
    merge(model).save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), wanted)


def test_bitsandbytes_loads_ours_with_the_same_logits(coded: Path) -> None:
    """In training mode, where its CPU path computes in float32, as asked; in evaluation it takes bfloat16 kernels."""
    bnb = pytest.importorskip("bitsandbytes", reason=PEER)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(coded).train()
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    torch.testing.assert_close(logits(theirs), logits(checkpoint.load(coded)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("fp4", False)])
def test_ours_loads_bitsandbytes_with_the_same_logits(plain: Path, tmp_path: Path, kind: str, nested: bool) -> None:
    pytest.importorskip("bitsandbytes", reason=PEER)
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=how).train()
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path)
    layers = [m for m in ours.modules() if isinstance(m, Linear4bit)]
    assert {(m.quant_type, m.compress_statistics) for m in layers} == {(kind, nested)}
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_are_bitsandbytes_own(kind: str) -> None:
    """Every code of a normal matrix, but for FP4's two zeros: what rounds to zero is +0 or -0 by its sign here, and the
    other way about there; both decode to zero."""
    functional = pytest.importorskip("bitsandbytes.functional", reason=PEER)
    w = torch.randn(256, 320, generator=torch.Generator().manual_seed(5))
    layer = Linear4bit(320, 256, False, quant_type=kind, compress_statistics=False)
    layer.store(w)
    theirs, state = functional.quantize_4bit(w, quant_type=kind, blocksize=64)
    assert torch.equal(layer.absmax, state.absmax)
    ours, other = (torch.stack([c >> 4, c & 15]).view(-1) for c in (layer.weight, theirs))
    zero = (ours % 8 == 0) & (other % 8 == 0) if kind == "fp4" else torch.zeros_like(ours, dtype=torch.bool)
    assert torch.equal(ours[~zero], other[~zero])


@pytest.fixture
def tuned(coded: Path) -> Any:
    """A peft model whose adapters have been trained."""
    model = peft.get_peft_model(checkpoint.load(coded), adapters.config(r=4))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=X, labels=X).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


def test_adapters_train_save_and_load_under_peft(tuned: Any, coded: Path, tmp_path: Path) -> None:
    """The 4-bit bytes stay, and the folder is peft's own, which loads on any base."""
    base, wanted = checkpoint.load(coded).state_dict(), logits(tuned)
    for name, layer in tuned.named_modules():
        if isinstance(layer, Linear4bit):
            key = name.removeprefix("base_model.model.").replace("base_layer", "weight")
            assert torch.equal(layer.weight, base[key])
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(checkpoint.load(coded), tmp_path)
    assert torch.equal(logits(again), wanted)


def test_merging_under_peft_is_exact_and_can_be_undone(tuned: Any) -> None:
    wanted = logits(tuned)
    tuned.merge_adapter()
    torch.testing.assert_close(logits(tuned), wanted, rtol=1e-4, atol=1e-5)
    tuned.unmerge_adapter()
    assert torch.equal(logits(tuned), wanted)
    plain = tuned.merge_and_unload()
    assert type(plain.model.layers[1].mlp.gate_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)


def test_a_plain_config_trains_and_refuses_to_merge(coded: Path) -> None:
    """peft would add to the stored bytes: their shape stops it."""
    model = peft.get_peft_model(checkpoint.load(coded), peft.LoraConfig(r=4, target_modules="all-linear"))
    model(input_ids=X, labels=X).loss.backward()
    with pytest.raises(RuntimeError):
        model.merge_and_unload()


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(ValueError, match="there must be one"):
        checkpoint.save(llama(), tmp_path)
    mixed = prepare(prepare(llama(), skip=["*.mlp.*", "lm_head"]), quant_type="fp4")
    with pytest.raises(ValueError, match="coded alike"):
        checkpoint.save(mixed, tmp_path)
    with pytest.raises(StateError, match="holds no"):
        checkpoint.Folder(tmp_path)


def test_gpt2_s_transposed_layers_are_coded_too() -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100)).eval()
    before = logits(model)
    made = prepare(model)
    assert isinstance(made.transformer.h[0].attn.c_attn, Linear4bit)
    assert (logits(made) - before).norm() < 0.2 * before.norm()
