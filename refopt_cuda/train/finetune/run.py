"""One method with one seed: transformers' Trainer with an optimizer of ours, the loss before and after."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refopt import memory
from refopt_cuda import optim
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.finetune import methods
from refopt_cuda.train.finetune.data import IGNORED, Blocks
from refopt_cuda.train.finetune.plan import Plan

HELD = 64
"""Held-out blocks, at most, of a loss."""
Tick = Callable[[int, float], None]


@dataclass
class Result:
    """What one run came to; losses in nats a token."""

    method: str
    seed: int
    before: float
    after: float = float("nan")
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    trained: int = 0
    counted: dict[str, int] = field(default_factory=dict)
    predicted: memory.Bytes | None = None
    peak: int = 0


@torch.no_grad()
def heldout(model: nn.Module, blocks: Blocks, plan: Plan) -> float:
    """Mean loss of the held-out labels."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    for k in range(0, min(len(blocks.held), HELD), plan.batch):
        rows = blocks.held[k : k + plan.batch]
        batch = {n: torch.stack([r[n] for r in rows]).to(plan.device) for n in rows[0]}
        labels = batch.pop("labels")[:, 1:]
        with torch.autocast(plan.device, plan.dtype, enabled=plan.device == "cuda"):
            logits = model(**batch).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total, count = total + float(loss), count + int((labels != IGNORED).sum())
    model.train(training)
    return total / max(count, 1)


def run(plan: Plan, method: str, seed: int, blocks: Blocks, folder: Path, tokenizer: Any, tick: Tick) -> Result:
    """Train, and save adapters in peft's format, or the whole model, in `folder`."""
    methods.forget(plan.device)
    model = methods.build(plan, method, seed)
    result = Result(method, seed, heldout(model, blocks, plan), predicted=methods.predicted(plan, method))
    params = [p for p in model.parameters() if p.requires_grad]
    result.trained = sum(p.numel() for p in params)
    opt = getattr(optim, plan.optimizer)(params, lr=plan.rate(method))
    trainer = _trainer(plan, seed, model, blocks, opt, folder, _Watch(result, params, tick).callback())
    start = time.perf_counter()
    trainer.train()
    result.seconds = time.perf_counter() - start
    result.counted = methods.counted(model, opt, result.counted.get("gradients", 0))
    result.peak = methods.peak_bytes(plan.device)
    result.after = heldout(model, blocks, plan)
    saved: Any = model
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return result


def _trainer(plan: Plan, seed: int, model: Any, blocks: Blocks, opt: Any, folder: Path, callback: Any) -> Any:
    """Half a cosine after a short warm-up; no checkpoints of its own."""
    from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup
    from transformers.trainer_callback import PrinterCallback

    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        max_grad_norm=plan.clip,
        bf16=plan.device == "cuda",
        use_cpu=plan.device == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device == "cuda",
    )
    schedule = get_cosine_schedule_with_warmup(opt, max(1, plan.steps // 20), plan.steps)
    made = Trainer(model=model, args=args, train_dataset=blocks.train, optimizers=(opt, schedule), callbacks=[callback])
    made.remove_callback(PrinterCallback)
    return made


class _Watch:
    """What is noted while the Trainer runs."""

    def __init__(self, result: Result, params: list[nn.Parameter], tick: Tick) -> None:
        self.result, self.params, self.tick = result, params, tick

    def callback(self) -> Any:
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(self, *given: Any, **more: Any) -> None:
                held = methods.bytes_of(p.grad for p in watch.params if p.grad is not None)
                watch.result.counted["gradients"] = max(watch.result.counted.get("gradients", 0), held)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
                if logs and "loss" in logs:
                    watch.result.losses.append(float(logs["loss"]))
                    watch.tick(state.global_step, watch.result.losses[-1])
                    if not torch.isfinite(torch.tensor(watch.result.losses[-1])):
                        raise InputError(f"the loss is {logs['loss']} at step {state.global_step}; try a smaller --lr")

        return Callback()
