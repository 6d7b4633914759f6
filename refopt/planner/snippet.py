"""The lines that train with a set-up: `model` is yours, of torch or transformers, `batch` what it is called with."""

from __future__ import annotations

from refopt.planner.setups import Setup

ARGUMENTS = {
    "adamw": {"full": "lr=2e-5, weight_decay=0.01", "adapters": "lr=2e-4, weight_decay=0.0"},
    "lion": {"full": "lr=5e-6, weight_decay=0.04", "adapters": "lr=5e-5, weight_decay=0.0"},
    "ademamix": {"full": "lr=2e-5, weight_decay=0.01"},
    "adafactor": {"full": "lr=2e-5, relative_step=False, scale_parameter=False"},
    "came": {"full": "lr=1e-5, weight_decay=0.01"},
    "adam_mini": {"full": "lr=2e-5, weight_decay=0.01"},
    "lamb": {"full": "lr=1e-3, weight_decay=0.01"},
    "sm3": {"full": "lr=1e-4, momentum=0.9"},
    "muon": {"full": 'lr=2e-5, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"'},
    "galore": {"full": "rank={rank}, lr=1e-4, weight_decay=0.01"},
    "apollo": {"full": "rank={rank}, lr=4e-5, weight_decay=0.01"},
}
"""Rates to start from, for fine-tuning 7B to 13B."""
MINI = 'rank=1, scale=128.0, scale_type="tensor", lr=1e-4, weight_decay=0.01'
INSIDE = """\
blocks = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
inside = {id(p) for p in blocks.parameters() if p.ndim == 2}"""
"""Which parameters are matrices inside the blocks."""


def snippet(s: Setup, rank: int = 16, checkpoint: bool = True, stage: int = 0, directions: int = 128) -> str:
    """Python that builds the optimizer and takes a step; directions: the rank of GaLore and APOLLO."""
    lines = ["import torch", "import refopt_cuda as rc", *_model(s, rank, stage)]
    if checkpoint:
        lines.append('model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})')
    lines += building(s, directions)
    if s.release:
        return "\n".join([*lines, "model(**batch).loss.backward()"])
    names = ["opt", "rest"] if s.beside else ["opt"]
    steps = [f"{name}.{call}()" for call in ("step", "zero_grad") for name in names]
    return "\n".join([*lines, "model(**batch).loss.backward()", *steps])


def building(s: Setup, directions: int = 128) -> list[str]:
    """The lines that make `opt`, and `rest` where another class steps the rest, or a `stepper`, of `model`."""
    lines = INSIDE.splitlines() if s.beside else []
    if s.release:
        made = ["stepper = rc.optim.in_backward(", "    model,", f"    lambda ps: {_each(s, directions)},", ")"]
        return [*lines, *made]
    return [*lines, *_optimizers(s, directions)]


def _arguments(s: Setup, directions: int) -> str:
    """What the class is called with beside parameters."""
    if s.name == "APOLLO-Mini":
        return MINI
    out = ARGUMENTS[s.rule]["full" if s.method == "full" else "adapters"].format(rank=directions)
    if s.method == "full" and s.weights not in ("f32", "bf16"):
        out += f', codecs={{"p": "{s.weights}"}}'
    return out + (', place="host"' if s.place == "host" else "")


def _optimizers(s: Setup, directions: int) -> list[str]:
    """The lines that build one optimizer, or two."""
    said = _arguments(s, directions)
    if s.beside:
        ours, theirs = (f"[p for p in model.parameters() if id(p) {word} inside]" for word in ("in", "not in"))
        return [
            f"opt = rc.optim.{s.cls}({ours}, {said})",
            f"rest = rc.optim.{s.beside}({theirs}, {ARGUMENTS['adamw']['full']})",
        ]
    if s.rule == "adam_mini":
        return [
            "rows, vectors = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))",
            f'opt = rc.optim.{s.cls}([{{"params": rows}}, {{"params": vectors, "blocks": "whole"}}], {said})',
        ]
    trained = "model.parameters()" if s.method == "full" else "(p for p in model.parameters() if p.requires_grad)"
    return [f"opt = rc.optim.{s.cls}({trained}, {said})"]


def _each(s: Setup, directions: int) -> str:
    """The optimizer of a list of one parameter."""
    said = _arguments(s, directions)
    if s.beside:
        rest = f"rc.optim.{s.beside}(ps, {ARGUMENTS['adamw']['full']})"
        return f"rc.optim.{s.cls}(ps, {said})\n    if id(ps[0]) in inside\n    else {rest}"
    if s.rule == "adam_mini":
        said += ', blocks="rows" if ps[0].ndim > 1 else "whole"'
    return f"rc.optim.{s.cls}(ps, {said})"


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
