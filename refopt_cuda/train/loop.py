"""One run: one optimizer, one seed. Every step is a function of plan, text and the state that a checkpoint holds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refopt_cuda.train import clock, data
from refopt_cuda.train.model import Transformer, build
from refopt_cuda.train.plan import Plan
from refopt_cuda.train.replay import Replay, chosen
from refopt_cuda.train.subjects import Subject, state_bytes

CURVE, FINAL = 128, 2048
"""Held-out windows: of each point of the curve, and of the figure at the end."""

PROMPT = b"def "


class Stopped(Exception):
    """The user asked to stop; the checkpoint is written."""


@dataclass
class Record:
    """What is known of a run, kept in its checkpoint."""

    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    replayed: int = 0
    equal: int = 0
    step_ms: list[float] = field(default_factory=list)
    timed: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    state_bytes: int = 0
    heldout: float = float("nan")
    sample: str = ""
    done: bool = False


class Run:
    """The model, the optimizer and the record of one run; `train` goes on from wherever the record is."""

    def __init__(self, plan: Plan, seed: int, subject: Subject, text: tuple[np.ndarray, np.ndarray], folder: Path):
        self.plan, self.seed, self.subject, self.folder = plan, seed, subject, folder
        self.text, self.held = text
        self.record = Record()
        self.at = data.held_out_starts(len(self.held), plan.context, FINAL)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def start(self) -> None:
        """The model with its first weights, or all that the checkpoint holds."""
        self.model: Transformer = build(self.plan.sizes, self.seed, self.plan.device, self.subject.dtype)
        states = self.folder / "states"
        if not self.checkpoint.exists():
            shutil.rmtree(states, ignore_errors=True)  # of a process that was killed before it saved anything
        self.opt = self.subject.make(self.model.parameters(), self.plan.lr, self.plan.place, states)
        self.params = [p for g in self.opt.param_groups for p in g["params"]]
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.opt.load_state_dict(saved["optimizer"])
            self.record = Record(**saved["record"])

    def save(self) -> None:
        """Write the checkpoint; the old one stays until the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.checkpoint.with_suffix(".new")
        state = {"model": self.model.state_dict(), "optimizer": self.opt.state_dict(), "record": vars(self.record)}
        torch.save(state, new)
        new.replace(self.checkpoint)

    def train(self, tick: Callable[[Record], None], stop: Callable[[], bool]) -> Record:
        """Train to the last step; `tick` hears of every step. Raises Stopped, after saving, once `stop()` is true."""
        r, plan = self.record, self.plan
        self.sampled = set(chosen(plan.steps, plan.samples, self.seed).tolist())
        self.watch = clock.Watch(plan.device)
        clock.reset_peak(plan.device)
        saved, first = time.monotonic(), r.step + 1
        while r.step < plan.steps:
            self._step(r.step + 1)
            if r.step == first:
                self.watch.read()  # compilers ran in it
            tick(r)
            if self._agreed(stop()):
                self._measure()
                self.save()
                raise Stopped
            if self._agreed(time.monotonic() - saved > 120):
                self._measure()
                self.save()
                saved = time.monotonic()
        self._finish()
        return r

    def _step(self, step: int) -> None:
        plan, r = self.plan, self.record
        at = self._mine(data.starts(len(self.text), plan.context, plan.batch, self.seed, step))
        x, y = (t.to(plan.device, non_blocking=True) for t in data.windows(self.text, at, plan.context))
        with self._precision():
            loss = self.model.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        for group in self.opt.param_groups:
            group["lr"] = self.subject.rate(plan.lr) * plan.rate(step)
        replay = self._replay(step)
        with self.watch.step():
            self.opt.step()
        if replay is not None:
            with self.watch.aside():
                r.replayed, r.equal = r.replayed + 1, r.equal + replay.agrees()
        self.opt.zero_grad()
        r.step = step
        if step % max(1, plan.steps // 20) == 0 or step == plan.steps:
            with self.watch.aside():
                held = self.held_out(self.at[:: max(1, len(self.at) // CURVE)])
                r.rows.append({"step": step, "train": self._mean(loss), "heldout": held})

    def _mine(self, at: np.ndarray) -> np.ndarray:
        """The sequences of a batch that this process takes."""
        return at

    def _mean(self, loss: Tensor) -> float:
        """The loss of the whole batch."""
        return float(loss.detach())

    def _agreed(self, flag: bool) -> bool:
        """What all processes of a run do if one of them wants it."""
        return flag

    def _replay(self, step: int) -> Replay | None:
        if step not in self.sampled:
            return None
        with self.watch.aside():
            weights = np.random.default_rng([self.seed, step])
            replay = Replay(self.opt, self.params[weights.integers(len(self.params))])
            replay.before()
        return replay

    def _precision(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.plan.device == "cuda")

    @torch.no_grad()
    def held_out(self, at: np.ndarray) -> float:
        """Mean loss in nats a byte over these windows of the held-out text."""
        total = 0.0
        for some in np.array_split(at, -(-len(at) // 256)):
            x, y = (t.to(self.plan.device) for t in data.windows(self.held, some, self.plan.context))
            with self._precision():
                total += float(self.model.loss(x, y, reduction="sum"))
        return total / (len(at) * self.plan.context)

    def _measure(self) -> None:
        """What the clocks and the allocator say since the last call."""
        r = self.record
        seconds, step_ms = self.watch.read()
        r.seconds, r.step_ms, r.timed = r.seconds + seconds, r.step_ms + step_ms, r.timed + len(step_ms)
        r.peak_bytes, r.state_bytes = max(r.peak_bytes, clock.peak(self.plan.device)), state_bytes(self.opt)

    def _finish(self) -> None:
        r = self.record
        self._measure()
        r.heldout, r.sample, r.done = self.held_out(self.at), self.write(300), True
        self.save()

    @torch.no_grad()
    def write(self, length: int, temperature: float = 0.7) -> str:
        """Some text that the model makes up."""
        draw = torch.Generator().manual_seed(self.seed)
        out = list(PROMPT)
        for _ in range(length):
            x = torch.tensor([out[-self.plan.context :]], device=self.plan.device)
            with self._precision():
                logits = self.model(x)[0, -1].float().cpu() / temperature
            if not bool(logits.isfinite().all()):
                return "(its weights are no numbers any more)"
            out.append(int(torch.multinomial(logits.softmax(0), 1, generator=draw)))
        return bytes(out).decode("utf-8", "replace")
