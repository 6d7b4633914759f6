"""Steps within the backward pass: a parameter is stepped, and its gradient freed, as soon as that is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["InBackward", "in_backward"]

Params = torch.nn.Module | Iterable[torch.Tensor]
Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


class InBackward:
    """An optimizer for each parameter, each stepped by a hook when autograd has added up that parameter's gradient.

    params  a module, or its parameters; those that need no gradient are left out
    make    `lambda ps: AdamW8bit(ps, lr=1e-3)`: makes the optimizer of a list of one parameter

    After `loss.backward()` the step is done and no gradient is left: at most one gradient is held at a time. Every
    backward pass is a step. Passes within `with stepper.accumulate():` only add up their gradients; the first pass
    outside takes them along. `torch.nn.utils.clip_grad_norm_` finds no gradients, and a joint norm is not known before
    the last of them: `max_grad_norm` is refused, and so is `step()`. Steps do not see a loss scale
    (torch.amp.GradScaler): `scaler.step` is refused.

    `param_groups` are those of all optimizers, for schedulers of one's own and `lr` changes; `state_dict` and
    `load_state_dict` are lists in the order of the parameters. `remove` takes the hooks away.

    Raises ValueError for an optimizer of other parameters than it was given, one that clips, or a parameter that is
    already stepped in backward.
    """

    def __init__(
        self,
        params: torch.nn.Module | Iterable[torch.Tensor],
        make: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    ) -> None:
        every = params.parameters() if isinstance(params, torch.nn.Module) else params
        self.params = [p for p in dict.fromkeys(every) if p.requires_grad]
        self.optimizers: list[torch.optim.Optimizer] = []
        self._waiting = False
        for number, p in enumerate(self.params):
            if getattr(p, "_stepped_in_backward", False):
                raise ValueError(f"in_backward: parameter {number} is already stepped in backward")
            self.optimizers.append(_made(make([p]), p, number))
        self.handles = [
            p.register_post_accumulate_grad_hook(self._hook(opt))
            for p, opt in zip(self.params, self.optimizers, strict=True)
        ]
        for p in self.params:
            p._stepped_in_backward = True  # type: ignore[attr-defined]

    _step_supports_amp_scaling = True
    """So that torch.amp.GradScaler comes to `step`, which refuses, rather than look for gradients, which are gone."""

    def _hook(self, opt: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            if not self._waiting:
                opt.step()
                p.grad = None

        return hook

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes in here add up gradients and step nothing."""
        before, self._waiting = self._waiting, True
        try:
            yield
        finally:
            self._waiting = before

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in the order of the parameters."""
        return [group for opt in self.optimizers for group in opt.param_groups]

    def step(self, closure: Any = None) -> None:
        """RuntimeError: the backward pass has taken the step."""
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "InBackward.step: torch.amp.GradScaler scaled the loss, and loss.backward() has stepped the parameters "
                "by gradients of that scale; take the scaler out"
            )
        raise RuntimeError("InBackward.step: parameters are stepped by loss.backward(); take this call out")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that `accumulate` has left, if there are any."""
        for opt in self.optimizers:
            opt.zero_grad(set_to_none)

    def state_dict(self) -> list[dict[str, Any]]:
        """That of each parameter's optimizer, in order."""
        return [opt.state_dict() for opt in self.optimizers]

    def load_state_dict(self, state_dict: list[dict[str, Any]]) -> None:
        """What `state_dict` gave; ValueError for another number of parameters."""
        if len(state_dict) != len(self.optimizers):
            held = f"{len(state_dict)} states for {len(self.optimizers)} parameters"
            raise ValueError(f"InBackward.load_state_dict: {held}")
        for opt, one in zip(self.optimizers, state_dict, strict=True):
            opt.load_state_dict(one)

    def remove(self) -> None:
        """Take the hooks away; the optimizers may then be stepped by hand."""
        for handle in self.handles:
            handle.remove()
        for p in self.params:
            p._stepped_in_backward = False  # type: ignore[attr-defined]


def _made(opt: torch.optim.Optimizer, p: torch.Tensor, number: int) -> torch.optim.Optimizer:
    """The optimizer of one parameter, which draws the random bits of its number among all."""
    held = [q for group in opt.param_groups for q in group["params"]]
    if len(held) != 1 or held[0] is not p:
        raise ValueError(
            f"in_backward: make must return an optimizer of the one parameter that it is given, got {held!r}"
        )
    for group in opt.param_groups:
        if group.get("max_grad_norm") is not None:
            raise ValueError(
                f"in_backward: max_grad_norm={group['max_grad_norm']!r}: the norm over all gradients is not known "
                "before the last of them; clip by step after backward, or not at all"
            )
    if hasattr(opt, "first_number"):
        opt.first_number = number
    return opt


def in_backward(params: Params, make: Make) -> InBackward:
    """Step these parameters within the backward pass; see `InBackward`.

    >>> import torch, refopt_cuda as rc
    >>> model = torch.nn.Linear(4, 2)
    >>> stepper = rc.optim.in_backward(model, lambda ps: rc.optim.AdamW8bit(ps, lr=1e-3))
    >>> model(torch.ones(3, 4)).sum().backward()
    >>> model.weight.grad is None, stepper.optimizers[0].state[model.weight]["step"]
    (True, 1)
    """
    return InBackward(params, make)
