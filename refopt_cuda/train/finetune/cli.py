"""`refopt finetune`: the command line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft  # noqa: F401
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from refopt_cuda.train.cli import INTERRUPTED, many
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.finetune import data, report
from refopt_cuda.train.finetune.plan import METHODS, OPTIMIZER, Plan, make
from refopt_cuda.train.finetune.run import Result, run
from refopt_cuda.train.job import folder_for

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def finetune(
    model: Annotated[str, typer.Argument(help="a folder of transformers: config.json, *.safetensors, tokenizer")],
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 files")] = None,
    chat: Annotated[
        list[Path] | None, typer.Option(help='JSON lines: {"messages": [{"role": ..., "content": ...}]}')
    ] = None,
    qlora: Annotated[bool, typer.Option("--qlora", help="4-bit weights and adapters (the default)")] = False,
    lora: Annotated[bool, typer.Option("--lora", help="plain weights and adapters")] = False,
    full: Annotated[bool, typer.Option("--full", help="all weights train")] = False,
    steps: Annotated[int | None, typer.Option(help="steps of each run [100]")] = None,
    batch: Annotated[int | None, typer.Option(help="blocks in a step [4]")] = None,
    context: Annotated[int | None, typer.Option(help="tokens in a block [256]")] = None,
    lr: Annotated[float | None, typer.Option(help="highest learning rate [2e-4; 2e-5 for --full]")] = None,
    optimizer: Annotated[str | None, typer.Option(help=f"a class of refopt_cuda.optim [{OPTIMIZER}]")] = None,
    rank: Annotated[int | None, typer.Option(help="of the adapters [64]")] = None,
    alpha: Annotated[float | None, typer.Option(help="adapters are multiplied by alpha / rank [16]")] = None,
    dropout: Annotated[float | None, typer.Option(help="of the adapters' input [0.05]")] = None,
    quant_type: Annotated[str | None, typer.Option(help="nf4 or fp4 [nf4]")] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="activations are computed twice [yes]")] = None,
    seeds: Annotated[int | None, typer.Option(help="train with so many seeds [1]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [cuda where there is one]")] = None,
    name: Annotated[str | None, typer.Option(help="the folder in runs/ [date and time]")] = None,
) -> None:
    """Fine-tune a causal language model on your own text or chats: 4-bit weights, adapters of rank 64, paged AdamW.

    With more than one of --qlora, --lora and --full each is trained on the same blocks and compared. Ends with the
    held-out loss before and after, the bytes of every part, counted and predicted, runs/NAME/report.md, metrics.csv,
    and adapters in peft's format (the whole model for --full).
    """
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    asked = tuple(m for m, on in zip(METHODS, (qlora, lora, full), strict=True) if on)
    given: dict[str, Any] = {"model": model, "steps": steps, "batch": batch, "context": context, "lr": lr}
    given |= {"text": tuple(map(str, text or ())), "chat": tuple(map(str, chat or ())), "methods": asked or None}
    given |= {"optimizer": optimizer, "rank": rank, "alpha": alpha, "dropout": dropout, "quant_type": quant_type}
    given |= {"checkpointing": checkpointing, "seeds": tuple(range(seeds)) if seeds else None, "device": device}
    plan, folder = make(given), folder_for(name)
    carry_out(plan, folder)


def carry_out(plan: Plan, folder: Path) -> list[Result]:
    """Train every method with every seed, print, write the report."""
    console = Console()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(plan.model)
    except (OSError, ValueError) as error:
        raise InputError(f"MODEL {plan.model}: the tokenizer cannot be read: {str(error).splitlines()[0]}") from None
    blocks = data.load(plan.text, plan.chat, tokenizer, plan.context)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    runs = [(method, seed) for seed in plan.seeds for method in plan.methods]
    console.print(f"{plan.model}: {len(runs)} runs of {plan.steps} steps on {plan.device}, {plan.optimizer} → {folder}")
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=len(runs) * plan.steps)
        for k, (method, seed) in enumerate(runs):

            def tick(step: int, loss: float, k: int = k, label: str = f"{method}, seed {seed}") -> None:
                bar.update(task, completed=k * plan.steps + step, description=f"{label:<14} loss {loss:.3f}")

            bar.update(task, description=f"{method}, seed {seed}: weights")
            made = run(plan, method, seed, blocks, folder / f"seed{seed}" / method, tokenizer, tick)
            results.append(made)
            console.print(f"{method:<6} seed {seed}: held-out loss {made.before:.4f} before, {made.after:.4f} after")
    report.show(console, plan, blocks, results, folder)
    return results


def main(argv: list[str]) -> int:
    """Run the command; 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app(many(argv, ("--text", "--chat")), prog_name="refopt finetune")
    except SystemExit as end:
        return int(end.code or 0)
    except InputError as error:
        print(f"refopt finetune: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("refopt finetune: the GPU has not enough free memory; try a smaller --batch", file=sys.stderr)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 2
