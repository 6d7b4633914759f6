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

from refopt_cuda.train.cli import INTERRUPTED, many
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.finetune import report
from refopt_cuda.train.finetune.job import PLAN, Job
from refopt_cuda.train.finetune.plan import METHODS, OPTIMIZER, make
from refopt_cuda.train.finetune.run import Result
from refopt_cuda.train.job import Stop, folder_for, folder_to_resume
from refopt_cuda.train.loop import Stopped

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def finetune(
    model: Annotated[
        str | None, typer.Argument(help="a folder of transformers: config.json, *.safetensors, tokenizer")
    ] = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped job: the newest, or --name")] = False,
) -> None:
    """Fine-tune a causal language model on your own text or chats: 4-bit weights, adapters of rank 64, paged AdamW.

    With more than one of --qlora, --lora and --full each is trained on the same blocks and compared. Ends with the
    held-out loss before and after, the bytes of every part, counted and predicted, runs/NAME/report.md with a picture,
    metrics.csv, and adapters in peft's format (the whole model for --full). Ctrl-C saves; --resume goes on to the same
    bits.
    """
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    asked = tuple(m for m, on in zip(METHODS, (qlora, lora, full), strict=True) if on)
    given: dict[str, Any] = {"model": model, "steps": steps, "batch": batch, "context": context, "lr": lr}
    given |= {"text": tuple(map(str, text or ())), "chat": tuple(map(str, chat or ())), "methods": asked or None}
    given |= {"optimizer": optimizer, "rank": rank, "alpha": alpha, "dropout": dropout, "quant_type": quant_type}
    given |= {"checkpointing": checkpointing, "seeds": tuple(range(seeds)) if seeds else None, "device": device}
    raise typer.Exit(carry_out(resumed(name, given) if resume else Job(folder_for(name, "finetune"), make(given))))


def resumed(name: str | None, given: dict[str, Any]) -> Job:
    """The job in the folder; its plan is its own."""
    for option, value in given.items():
        if value not in (None, ()):
            word = {"model": "MODEL", "methods": "--qlora, --lora and --full"}.get(
                option, f"--{option}".replace("_", "-")
            )
            raise InputError(f"--resume goes on with the plan of the run; leave out {word}")
    return Job.resumed(folder_to_resume(name, PLAN))


def carry_out(job: Job) -> int:
    """Train every method with every seed, print, write the report; returns the exit code."""
    console, plan, stop, results = Console(), job.plan, Stop(), list[Result]()
    job.begin()
    what = f"{len(plan.runs)} runs of {plan.steps} steps on {plan.device}, {plan.optimizer}"
    console.print(f"{plan.model}: {what} → {job.folder}")
    with stop.listening():
        try:
            for made in job.run(console, stop):
                results.append(made)
                change = f"held-out loss {made.before:.4f} before, {made.after:.4f} after"
                console.print(f"{made.method:<6} seed {made.seed}: {change}")
        except Stopped:
            console.print(f"Saved in {job.folder}. Go on with: refopt finetune --resume --name {job.folder.name}")
            return INTERRUPTED
    report.show(console, plan, job.blocks, results, job.folder)
    return 0


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
