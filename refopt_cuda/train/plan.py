"""What a job does: sizes, steps and seeds, from the options and the machine; refused where it cannot be done."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refopt_cuda.optim import placing
from refopt_cuda.train import data, subjects
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.model import Sizes

GIB = 1 << 30
SHARDED = ("resident", "paged", "host", "disk")
"""Places of states that sharded runs take."""


@dataclass(frozen=True)
class Plan:
    """Everything that the bits of a job depend on besides the text; kept beside the results, and read by --resume."""

    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    batch: int
    layers: int
    width: int
    heads: int
    hidden: int
    context: int
    lr: float
    samples: int
    device: str
    deterministic: bool = True
    text: tuple[str, ...] = ()
    sha256: str = ""
    place: str = "resident"
    ranks: int = 0
    """Of a sharded job; 0: it is not sharded."""

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.layers, self.width, self.heads, self.hidden, self.context)

    @property
    def runs(self) -> list[tuple[int, subjects.Subject]]:
        """Every (seed, optimizer), in the order in which they are trained."""
        return [(seed, subject) for seed in self.seeds for subject in subjects.parse_all(self.optimizers)]

    def rate(self, step: int) -> float:
        """The learning rate of step 1, 2 ... as a multiple of the highest: warm-up, then half a cosine to 5 %."""
        warm = max(1, self.steps // 20)
        fall = 0.5 * (1 + np.cos(np.pi * max(0, step - warm) / max(1, self.steps - warm)))
        return float(min(1.0, step / warm) * (0.05 + 0.95 * fall))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Plan:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return cls(**values)


def usual(device: str) -> Plan:
    """A model and a batch that suit the machine: 0.5M weights on a CPU, GPT-2 small's layers on a GPU."""
    if device == "cpu":
        return Plan(subjects.DEFAULT, (0,), 1100, 16, 2, 128, 4, 384, 64, lr=5e-3, samples=64, device=device)
    plan = Plan(subjects.DEFAULT, (0,), 300, 16, 12, 768, 12, 2048, 256, lr=1e-3, samples=64, device=device)
    free = free_bytes(device)
    while plan.batch > 2 and need_bytes(plan) > 0.8 * free:
        plan = replace(plan, batch=plan.batch // 2)
    return plan


def make(given: dict[str, Any]) -> Plan:
    """The usual plan with what the user asked for. Raises InputError for a plan that makes no sense on this machine."""
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here")
    plan = replace(usual(device), **{k: v for k, v in given.items() if v is not None and k != "device"})
    for name in ("steps", "batch", "samples"):
        least = 0 if name == "samples" else 1
        if getattr(plan, name) < least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(plan, name)}")
    if plan.place not in placing.KNOWN:
        raise InputError(f"--place must be one of {', '.join(placing.KNOWN)}, got {plan.place!r}")
    if not 0 < plan.lr < float("inf"):
        raise InputError(f"--lr must be a positive number, got {plan.lr}")
    try:
        plan.sizes  # noqa: B018
    except ValueError as error:
        raise InputError(f"--{error}") from None
    if plan.ranks and plan.place not in SHARDED:
        raise InputError(f"--sharded: --place must be one of {', '.join(SHARDED)}, got {plan.place}")
    if plan.ranks and plan.batch % plan.ranks:
        raise InputError(f"--sharded: --batch must be a multiple of the {plan.ranks} ranks, got {plan.batch}")
    subjects.parse_all(plan.optimizers)
    check_memory(plan)
    return plan


def load_text(plan: Plan) -> data.Text:
    """The text of a plan. Raises InputError where it is too short, or not the one that an earlier run was made with."""
    text = data.read([Path(p) for p in plan.text]) if plan.text else data.standard_library()
    train, held = text.split()
    if len(held) < plan.context + 1:
        least = 10 * data.STRETCHES * (plan.context // data.STRETCHES + 1)
        raise InputError(
            f"--text: {len(text.data):,} bytes are too short; a context of {plan.context} needs at least {least:,}"
        )
    if len(train) <= plan.context:
        raise InputError(f"--text: {len(text.data):,} bytes are too short for a context of {plan.context}")
    if plan.sha256 and text.sha256 != plan.sha256:
        raise InputError("--resume: the text is not the one that the run began with (its sha256 differs)")
    return text


def need_bytes(plan: Plan) -> int:
    """About what training takes: weights, gradients, two float32 states, and what the backward pass keeps."""
    ranks = max(1, plan.ranks)
    kept = plan.batch // ranks * plan.context * plan.layers * (14 * plan.width + 4 * plan.hidden) * 4
    return 16 * plan.sizes.parameters() // ranks + kept + 4 * 4 * plan.batch // ranks * plan.context * 256


def free_bytes(device: str) -> int:
    """Memory that is free now, in bytes; what the system has where free memory is not told."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else GIB << 10


def check_memory(plan: Plan) -> None:
    """InputError where the plan takes more memory than there is."""
    need, free = need_bytes(plan), free_bytes(plan.device)
    if need > free:
        count = plan.sizes.parameters()
        raise InputError(
            f"not enough memory: {count:,} weights with batches of {plan.batch} x {plan.context} bytes need about "
            f"{need / GIB:.1f} GiB, {free / GIB:.1f} GiB are free; try a smaller --batch, --width or --layers"
        )
