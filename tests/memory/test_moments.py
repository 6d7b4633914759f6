"""Moments of a step: those of torch and transformers, operation by operation, and what follows from the formula."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from tests.memory.steps import TRACED, Step

WITHIN = 0.002
"""Tensors of a few bytes a token, and of a few in all, are not counted."""


def said(ref: ModuleType, step: Step) -> dict[str, int]:
    """Activations and gradients at each moment; what is always there is the weights."""
    kv = step.kv or None
    model = ref.models.llama("traced", step.hidden, step.layers, step.heads, step.ffn, step.vocab, kv, step.tied)
    weights = "bf16" if step.each == 2 else "f32"
    setup = {"checkpoint": step.checkpoint, "lora": step.lora, "base": weights, "blas": 0}
    opt = ref.Optimizer("sgd", {"p": weights})
    found = ref.memory.moments(model, opt, batch=step.batch, sequence=step.sequence, **setup)
    return {name: need.activations + need.gradients for name, need in found.items()}


@pytest.mark.parametrize(("step", "moment", "most"), TRACED)
def test_the_largest_moment_is_the_one_that_was_traced(ref: ModuleType, step: Step, moment: str, most: int) -> None:
    found = said(ref, step)
    assert max(found, key=lambda name: found[name]) == moment
    assert found[moment] == pytest.approx(most, rel=WITHIN)


@pytest.mark.parametrize("k", [4, 6, 13])
def test_transformers_still_goes_through_the_step_that_was_traced(k: int) -> None:
    pytest.importorskip("transformers", reason="traces transformers' Llama")
    from tests.memory.traced import traced

    step, _, most = TRACED[k]
    assert traced(step) == pytest.approx(most, rel=WITHIN)


QWEN = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "most"), [({}, 2895333480), ({"lora": 16}, 2464383080), ({"checkpoint": True}, 923319840)]
)
def test_heads_that_are_normed_are_counted(ref: ModuleType, setup: dict[str, Any], most: int) -> None:
    """Traced of transformers' Qwen 3 on four sequences of 2048 tokens."""
    model, opt = ref.models.from_config(QWEN), ref.Optimizer("sgd", {"p": "bf16"})
    found = ref.memory.moments(model, opt, batch=4, sequence=2048, blas=0, **setup).values()
    assert max(n.activations + n.gradients for n in found) == pytest.approx(most, rel=WITHIN)
    assert not ref.memory.timeline.tied(model)


QLORA = {"lora": 64, "base": "double", "batch": 1, "sequence": 512, "checkpoint": True}


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-2-13b", "llama-33b"])
def test_the_peak_of_qlora_is_its_first_block_written_out(ref: ModuleType, name: str) -> None:
    """One block of it all, recomputed; gradients of all adapters but those before the first block's last matrix."""
    model, opt = ref.models.named(name), ref.Optimizer("adamw", {"p": "bf16"})
    need, whole = ref.memory.peak(model, opt, **QLORA), ref.memory.train(model, opt, **QLORA)
    always = whole.weights + whole.frozen + whole.states + whole.scratch + 2 * 32 * 2**20
    h, f = model.hidden, model.ffn
    block = 2 * (6 * h + 4) + 2 * (4 * h + 4 * f) + 4 * model.heads + 2 * 64 * 7
    missing = 64 * (4 * 2 * h + 2 * (h + f))
    tokens = 512 * (block + 2 * h + 2 * (2 * f + h))
    assert need.total == always + whole.gradients - 2 * missing + tokens < whole.total


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "muon", "lion"])
def test_a_peak_grows_with_everything(ref: ModuleType, rule: str, checkpoint: bool) -> None:
    model, opt = ref.models.named("llama-3.2-1b"), ref.Optimizer(rule, {"p": "bf16"})
    setups: list[dict[str, Any]] = [{"batch": 1, "sequence": 64}, {"batch": 1, "sequence": 4096}]
    setups += [{"batch": 8, "sequence": 4096}, {"batch": 8, "sequence": 4096, "flash": False}]
    totals = [ref.memory.peak(model, opt, checkpoint=checkpoint, **setup).total for setup in setups]
    assert totals == sorted(totals) and totals[0] < totals[-1]
    with pytest.raises(TypeError, match="a Model is needed"):
        ref.memory.peak([(4, 4)], opt, batch=1, sequence=1)


def test_float32_adapters_may_train_beside_bfloat16_activations(ref: ModuleType) -> None:
    model, setup = ref.models.named("llama-2-7b"), QLORA | {"blas": 0}
    thin, wide = (ref.Optimizer("sgd", {"p": p}) for p in ("bf16", "f32"))
    kept = [
        max(m.activations for m in ref.memory.moments(model, o, **setup, **w).values())
        for o, w in ((thin, {}), (wide, {"activation_bytes": 2}), (wide, {}))
    ]
    assert kept[0] == kept[1] < kept[2]
    with pytest.raises(ValueError, match="activation_bytes must be 2 or 4, got 3"):
        ref.memory.moments(model, wide, activation_bytes=3, **setup)


def test_shards_and_released_gradients_take_less_at_every_moment(ref: ModuleType) -> None:
    model, opt = ref.models.named("llama-2-7b"), ref.Optimizer("adamw", {"p": "bf16"})
    tokens = {"batch": 1, "sequence": 512, "checkpoint": True}
    plain = ref.memory.moments(model, opt, **tokens)
    for less in ({"release": True}, {"ranks": 4, "stage": 2}, {"ranks": 8, "stage": 3}):
        found = ref.memory.moments(model, opt, **tokens, **less)
        assert all(found[name].total < need.total for name, need in plain.items() if name not in ("loss", "norm"))


def test_fsdp_gathers_blocks_around_the_one_that_runs(ref: ModuleType) -> None:
    """Three blocks in bfloat16 (two of weights, one of gradients), embedding and head twice; not in the step."""
    model, opt = ref.models.named("llama-2-7b"), ref.Optimizer("adamw", {"p": "bf16"})
    found = ref.memory.moments(model, opt, batch=1, sequence=8, ranks=8, stage=3, blas=0)
    outside = 2 * 32000 * 4096 + 4096
    block = (model.size - outside) // 32
    assert found["loss"].scratch == 2 * (3 * block + 2 * outside)
    assert found["step"].scratch == 0
