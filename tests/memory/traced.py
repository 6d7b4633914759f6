"""A step of transformers' Llama on tensors without data, and the most bytes that lie beside its weights.

Every operation runs on torch's meta device, which has shapes and no memory; a storage counts from the operation that
makes it until Python and autograd have let go of it. Attention is torch's fused kernel for 16 bits, as on a GPU.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.memory.steps import Step

QUERIES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Held(TorchDispatchMode):
    """Bytes of the storages that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, out)
        self.peak = max(self.peak, self.now)
        return out

    def see(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.drop, key)
        return x

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def flash(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **_: Any) -> tuple[Any, None]:
    """Causal attention by the fused kernel of 16 bits."""
    assert mask is None
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


def built(step: Step) -> nn.Module:
    """Llama on the meta device, with adapters if the step has any."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("flash_without_data", flash)
    config = LlamaConfig(
        hidden_size=step.hidden,
        intermediate_size=step.ffn,
        num_hidden_layers=step.layers,
        num_attention_heads=step.heads,
        num_key_value_heads=step.kv or step.heads,
        vocab_size=step.vocab,
        tie_word_embeddings=step.tied,
        use_cache=False,
        max_position_embeddings=step.sequence,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if step.each == 2 else torch.float32).train()
    model.config._attn_implementation = "flash_without_data"
    if step.lora:
        adapted(model, step.lora)
    if step.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def adapted(model: Any, rank: int) -> None:
    """Adapters on every matrix inside the blocks; all else is frozen."""
    from refopt_cuda.nn import LoRALinear

    model.requires_grad_(False)
    for layer in model.model.layers:
        for part, names in ((layer.self_attn, QUERIES), (layer.mlp, MLP)):
            for name in names:
                setattr(part, name, LoRALinear(getattr(part, name), r=rank))


def traced(step: Step) -> int:
    """The most bytes beside the weights in a step without an optimizer."""
    model, held = built(step), Held()
    ids = torch.zeros(step.batch, step.sequence, dtype=torch.int64, device="meta")
    with held:
        for p in model.parameters():
            held.see(p)
        weights = held.now
        model(input_ids=ids, labels=ids).loss.backward()
    return held.peak - weights
