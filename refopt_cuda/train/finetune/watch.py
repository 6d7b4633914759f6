"""What is noted while transformers' Trainer runs: losses, bytes, when a checkpoint is due, and a wish to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from refopt_cuda.train import clock
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.finetune import methods

EVERY = 120.0
"""Seconds between checkpoints."""


class Watch:
    """`most` bytes of gradients when the optimizer steps and, on a GPU, of what a forward and backward pass adds to
    what lay there before it; `peak` of the steps that are over."""

    def __init__(
        self, device: str, params: list[nn.Parameter], tick: Callable[[int, float], None], stop: Callable[[], bool]
    ) -> None:
        self.device, self.params, self.tick, self.stop = device, params, tick, stop
        self.most: dict[str, int] = {}
        self.peak = self.base = 0
        self.saved = time.monotonic()

    def note(self, part: str, found: int) -> None:
        self.most[part] = max(self.most.get(part, 0), found)

    def before(self) -> None:
        """A step begins."""
        if self.device == "cuda":
            self.peak = max(self.peak, clock.peak(self.device))
            clock.reset_peak(self.device)
            self.base = torch.cuda.memory_allocated()

    def between(self) -> None:
        """Gradients are there, the optimizer has not stepped."""
        self.note("gradients", methods.bytes_of(p.grad for p in self.params if p.grad is not None))
        if self.device == "cuda":
            self.note("activations", clock.peak(self.device) - self.base)

    def loss(self, step: int, value: float) -> None:
        """Raises InputError where it is no number."""
        self.tick(step, value)
        if not math.isfinite(value):
            raise InputError(f"the loss is {value} at step {step}; try a smaller --lr")

    def after(self, control: Any, last: bool) -> None:
        """A step is over: ask for a checkpoint where it is time for one, and for an end where the user wants it."""
        control.should_training_stop |= self.stop() and not last
        if (control.should_training_stop or time.monotonic() - self.saved > EVERY) and not last:
            control.should_save, self.saved = True, time.monotonic()

    def callback(self) -> Any:
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_step_begin(self, *given: Any, **more: Any) -> None:
                watch.before()

            def on_pre_optimizer_step(self, *given: Any, **more: Any) -> None:
                watch.between()

            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                watch.after(control, state.global_step >= state.max_steps)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
                if logs and "loss" in logs:
                    watch.loss(state.global_step, float(logs["loss"]))

        return Callback()
