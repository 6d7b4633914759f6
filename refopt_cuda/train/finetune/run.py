"""One method with one seed: transformers' Trainer with an optimizer of ours, the loss before and after, stopped and
resumed to the same bits."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refopt_cuda import optim
from refopt_cuda.train import clock
from refopt_cuda.train.finetune import methods
from refopt_cuda.train.finetune.data import IGNORED, Blocks
from refopt_cuda.train.finetune.plan import Plan
from refopt_cuda.train.finetune.watch import Watch
from refopt_cuda.train.loop import Stopped

HELD = 64
"""Held-out blocks, at most, of a loss."""
RESULT = "result.json"
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
    peak: int = 0
    done: bool = False

    def save(self, folder: Path) -> None:
        """Write result.json; the old one stays until the new one is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{RESULT}.new"
        new.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
        new.replace(folder / RESULT)


def kept(folder: Path) -> Result | None:
    """What an earlier run left in its folder."""
    path = folder / RESULT
    return Result(**json.loads(path.read_text("utf-8"))) if path.is_file() else None


def evenly(rows: list[Any], most: int) -> list[Any]:
    """At most so many of them, from all over."""
    return rows[:: -(-len(rows) // most)] if rows else []


@torch.no_grad()
def heldout(model: nn.Module, blocks: Blocks, plan: Plan) -> float:
    """Mean loss of the held-out labels."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    held = evenly(blocks.held, HELD)
    for k in range(0, len(held), plan.batch):
        rows = held[k : k + plan.batch]
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


def never() -> bool:
    return False


def run(
    plan: Plan,
    method: str,
    seed: int,
    blocks: Blocks,
    folder: Path,
    tokenizer: Any,
    tick: Tick,
    stop: Callable[[], bool] = never,
) -> Result:
    """Train, and save adapters in peft's format, or the whole model, in `folder`; go on from a checkpoint there.

    Raises Stopped, after saving, once `stop()` is true; InputError where the loss is no number any more.
    """
    methods.forget(plan.device)
    model: Any = methods.build(plan, method, seed)
    result = kept(folder) or Result(method, seed, heldout(model, blocks, plan))
    result.save(folder)
    params = [p for p in model.parameters() if p.requires_grad]
    result.trained = sum(p.numel() for p in params)
    opt = getattr(optim, plan.optimizer)(params, lr=plan.rate(method))
    watch = Watch(plan.device, params, tick, stop)
    trainer = _trainer(plan, seed, model, blocks, opt, folder, watch.callback())
    _train(trainer, result, watch, newest(folder))
    if trainer.state.global_step < plan.steps:
        result.save(folder)
        raise Stopped
    result.counted |= methods.counted(model, opt, result.counted.get("gradients", 0))
    result.after, result.done = heldout(model, blocks, plan), True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result.save(folder)
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    return result


def newest(folder: Path) -> Path | None:
    """The last checkpoint of the Trainer that is whole: its state is written last."""
    whole = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _train(trainer: Any, result: Result, watch: Watch, start: Path | None) -> None:
    """To the last step or to a stop; what was seen on the way goes into the result, beside what was seen before."""
    clock.reset_peak(watch.device)  # of training alone
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    result.seconds += time.perf_counter() - began
    result.losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    for part, most in watch.most.items():
        result.counted[part] = max(result.counted.get(part, 0), most)
    result.peak = max(result.peak, watch.peak, clock.peak(watch.device))


def _trainer(plan: Plan, seed: int, model: Any, blocks: Blocks, opt: Any, folder: Path, callback: Any) -> Any:
    """Half a cosine after a short warm-up; a checkpoint when the callback asks for it, and the last one is kept."""
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
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device == "cuda",
    )
    schedule = get_cosine_schedule_with_warmup(opt, max(1, plan.steps // 20), plan.steps)
    made = Trainer(model=model, args=args, train_dataset=blocks.train, optimizers=(opt, schedule), callbacks=[callback])
    made.remove_callback(PrinterCallback)
    return made
