"""The model of each method, and the bytes that it takes: counted from the tensors, and predicted by `refopt.memory`."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import refopt
from refopt import memory, models
from refopt_cuda.nn import checkpoint, scratch
from refopt_cuda.nn import peft as adapters
from refopt_cuda.train import subjects
from refopt_cuda.train.finetune.plan import Plan

CODECS = {"8bit": "dynamic8", "4bit": "q4", "Fp8": "fp8"}
"""What the states are kept in, by the end of a class's name."""


def build(plan: Plan, method: str, seed: int, progress: bool = False) -> nn.Module:
    """The model, ready to train: weights in 4 bits and adapters, plain weights and adapters, or all weights."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    if method == "qlora":
        model: Any = checkpoint.load(
            plan.model, device=plan.device, dtype=plan.dtype, quant_type=plan.quant_type, progress=progress
        )
    else:
        dtype = torch.float32 if method == "full" else plan.dtype
        model = AutoModelForCausalLM.from_pretrained(plan.model, dtype=dtype)
        model.to(plan.device)
    if method != "full":
        chosen = adapters.config(r=plan.rank, lora_alpha=plan.alpha, lora_dropout=plan.dropout, task_type="CAUSAL_LM")
        model = get_peft_model(model, chosen)
    model.config.use_cache = False
    if plan.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def counted(model: nn.Module, opt: torch.optim.Optimizer, gradients: int) -> dict[str, int]:
    """Bytes of weights that train, of those that do not, of gradients at the step, of states, and of the room in which
    frozen weights are decoded."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in trained]
    return {
        "weights": bytes_of(p for p in model.parameters() if p.requires_grad),
        "frozen": bytes_of(rest),
        "gradients": gradients,
        "states": subjects.state_bytes(opt),
        "scratch": scratch.held(next(model.parameters()).device),
    }


def predicted(plan: Plan, method: str, most: bool = False) -> memory.Bytes | None:
    """What `refopt.memory` says of the same set-up, each part at its largest, or (`most`) the largest moment of a step;
    None for a family whose shapes it does not know."""
    try:
        model = models.from_config(Path(plan.model))
    except ValueError:
        return None
    kept = next((codec for end, codec in CODECS.items() if plan.optimizer.endswith(end)), None)
    rule = plan.optimizer.removeprefix("Paged").removesuffix("32bit")
    for end in CODECS:
        rule = rule.removesuffix(end)
    rule = {"AdamMini": "adam_mini"}.get(rule, rule.lower())
    place = "paged" if plan.optimizer.startswith("Paged") else "resident"
    opt = refopt.Optimizer(rule, kept, place=place, min_size=4096)
    setup: dict[str, Any] = {"batch": plan.batch, "sequence": plan.context, "checkpoint": plan.checkpointing}
    if method == "qlora":
        double = refopt.codecs.double(base=plan.quant_type)
        setup |= {"lora": plan.rank, "base": double}
    if method == "lora":
        setup |= {"lora": plan.rank, "base": "bf16" if plan.dtype == torch.bfloat16 else "f32"}
    if most:
        return memory.peak(model, opt, activation_bytes=plan.dtype.itemsize, **setup)
    return memory.train(model, opt, **setup)


def forget(device: str) -> None:
    """Give memory back before the next method."""
    gc.collect()
    scratch.release()
    if device == "cuda":
        torch.cuda.empty_cache()
