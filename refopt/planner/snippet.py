"""The lines that train with a set-up: `model` is yours, of torch or transformers, `batch` what it is called with."""

from __future__ import annotations

from refopt.planner.setups import Setup

ARGUMENTS = {
    "adamw": {"full": "lr=2e-5, weight_decay=0.01", "adapters": "lr=2e-4, weight_decay=0.0"},
    "lion": {"full": "lr=5e-6, weight_decay=0.04", "adapters": "lr=5e-5, weight_decay=0.0"},
    "ademamix": {"full": "lr=2e-5, weight_decay=0.01"},
    "adafactor": {"full": "lr=2e-5, relative_step=False, scale_parameter=False"},
    "came": {"full": "lr=1e-5, weight_decay=0.01"},
}
"""Rates to start from, for fine-tuning 7B to 13B."""


def snippet(s: Setup, rank: int = 16, checkpoint: bool = True, stage: int = 0) -> str:
    """Python that builds the optimizer and takes a step."""
    lines = ["import torch", "import refopt_cuda as rc", *_model(s, rank, stage)]
    if checkpoint:
        lines.append('model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})')
    arguments = ARGUMENTS[s.rule]["full" if s.method == "full" else "adapters"]
    if s.method == "full" and s.weights not in ("f32", "bf16"):
        arguments += f', codecs={{"p": "{s.weights}"}}'
    if s.place == "host":
        arguments += ', place="host"'
    if s.release:
        made = f"lambda ps: rc.optim.{s.cls}(ps, {arguments})"
        stepper = ["stepper = rc.optim.in_backward(", "    model,", f"    {made},", ")"]
        return "\n".join([*lines, *stepper, "model(**batch).loss.backward()"])
    trained = "model.parameters()" if s.method == "full" else "(p for p in model.parameters() if p.requires_grad)"
    lines.append(f"opt = rc.optim.{s.cls}({trained}, {arguments})")
    return "\n".join([*lines, "model(**batch).loss.backward()", "opt.step()", "opt.zero_grad()"])


def _model(s: Setup, rank: int, stage: int) -> list[str]:
    """What becomes of the model first."""
    if s.method == "qlora":
        prepared = 'model = rnn.prepare(model, device="cuda" if torch.cuda.is_available() else "cpu")'
        return ["import refopt_cuda.nn as rnn", prepared, f"model = rnn.adapt(model, r={rank}, alpha={rank})"]
    cast = [f"model = model.to(torch.{'float32' if s.weights == 'f32' else 'bfloat16'})"]
    if s.method == "lora":
        chosen = f"config(r={rank}, lora_alpha={rank})"
        cast.append(f"model = get_peft_model(model, {chosen}, autocast_adapter_dtype=False)")
        return ["from peft import get_peft_model", "from refopt_cuda.nn.peft import config", *cast]
    if stage == 3:
        shard = "from torch.distributed.fsdp import fully_shard"
        return [shard, *cast, "for block in model.model.layers:", "    fully_shard(block)", "fully_shard(model)"]
    return cast
