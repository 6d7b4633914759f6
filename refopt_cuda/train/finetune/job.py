"""All runs of a plan in one folder, one after the other: started, stopped, resumed, and gathered into results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from refopt_cuda.train.errors import InputError
from refopt_cuda.train.finetune import data
from refopt_cuda.train.finetune.plan import Plan, check
from refopt_cuda.train.finetune.run import Result, kept, run
from refopt_cuda.train.job import Stop

PLAN = "finetune.json"
"""Beside the runs; not the name that `refopt train` gives its own."""


class Job:
    """A folder, the plan in it, the tokenizer and the blocks. Raises InputError for what cannot be read."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(plan.model)
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise InputError(f"MODEL {plan.model}: the tokenizer cannot be read: {said}") from None
        self.blocks = data.load(plan.text, plan.chat, self.tokenizer, plan.context)
        if plan.sha256 not in ("", self.blocks.sha256):
            raise InputError("--resume: the data are not those that the run began with (their sha256 differs)")
        self.folder, self.plan = folder, replace(plan, sha256=self.blocks.sha256)

    @classmethod
    def resumed(cls, folder: Path) -> Job:
        """Go on with the plan in the folder."""
        try:
            plan = Plan.from_dict(json.loads((folder / PLAN).read_text("utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"--resume: {folder / PLAN} is not readable: {error}") from None
        if plan.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--resume: the run began on a GPU, and torch sees none here")
        check(plan)
        return cls(folder, plan)

    def begin(self) -> None:
        """Make the folder and keep the plan. Raises InputError where it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / PLAN).write_text(json.dumps(asdict(self.plan), indent=2) + "\n", "utf-8")
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written: {error.strerror}") from None

    def place(self, method: str, seed: int) -> Path:
        return self.folder / f"seed{seed}" / method

    def run(self, console: Console, stop: Stop) -> Iterator[Result]:
        """Train what is not trained yet; a result as each run ends. Raises Stopped after a Ctrl-C."""
        plan = self.plan
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=len(plan.runs) * plan.steps)
            for k, (method, seed) in enumerate(plan.runs):

                def tick(step: int, loss: float, k: int = k, label: str = f"{method}, seed {seed}") -> None:
                    bar.update(task, completed=k * plan.steps + step, description=f"{label:<14} loss {loss:.3f}")

                bar.update(task, description=f"{method}, seed {seed}: weights")
                folder = self.place(method, seed)
                made = kept(folder)
                if made is None or not made.done:
                    made = run(plan, method, seed, self.blocks, folder, self.tokenizer, tick, stop)
                bar.update(task, completed=(k + 1) * plan.steps)
                yield made
