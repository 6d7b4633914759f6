"""Sharded parameters of rules that see whole tensors: put together for the step, one at a time, then cut again.

Every rank takes the step of the whole, so the bits are those of one rank alone, in every dialect. A rank keeps its
share of states that have the parameter's rows; smaller ones (row and column sums, a value a tensor) are kept by all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from refopt_cuda.optim import checks, sharded

BLANK = torch.empty(0)
"""Stands for a parameter that is not stepped, so that the others keep their numbers."""


def any_sharded(opt: torch.optim.Optimizer) -> bool:
    """Whether a parameter is a DTensor."""
    return any(sharded.is_sharded(p) for group in opt.param_groups for p in group["params"])


def refuse(opt: torch.optim.Optimizer) -> None:
    """ValueError for settings that need all parameters whole at once."""
    call, groups = f"{type(opt).__name__}.step", opt.param_groups
    if any(group.get("max_grad_norm") is not None for group in groups):
        raise ValueError(
            f"{call}: max_grad_norm: sharded parameters of this rule are put together one at a time, when no norm over "
            "all is known; torch.nn.utils.clip_grad_norm_, before the step, measures all"
        )
    if any(group.get("capturable") for group in groups):
        raise ValueError(
            f"{call}: capturable=True: sharded parameters of this rule are put together in every step, in memory that "
            "is new each time, which a CUDA graph cannot repeat"
        )


def step(opt: torch.optim.Optimizer, plain: Callable[[], None], forget: Callable[[torch.Tensor], Any]) -> None:
    """One step of all parameters of `opt`.

    plain    steps those that the groups hold, all whole
    forget   drops what `opt` remembers of a tensor that goes

    Besides its shares a rank holds one parameter, its gradient and its states whole, in turn; three or more
    collectives are waited for a parameter. All ranks of a mesh must step the same parameters.
    """
    groups, call = opt.param_groups, f"{type(opt).__name__}.step"
    params = [group["params"] for group in groups]
    for some in params:
        for p, g in checks.gather(some, call):
            sharded.check(p, call)
            sharded.agree(p, g, call)
    try:
        for group, some in zip(groups, params, strict=True):
            group["params"] = [BLANK if sharded.is_sharded(p) else p for p in some]
        plain()
        for group, some in zip(groups, params, strict=True):
            group["params"] = [BLANK] * len(some)
        for group, some in zip(groups, params, strict=True):
            for k, p in enumerate(some):
                if sharded.is_sharded(p) and p.grad is not None:
                    _step_whole(opt, group["params"], k, p, plain, forget)
    finally:
        for group, some in zip(groups, params, strict=True):
            group["params"] = some


def _step_whole(
    opt: torch.optim.Optimizer,
    places: list[torch.Tensor],
    k: int,
    p: torch.Tensor,
    plain: Callable[[], None],
    forget: Callable[[torch.Tensor], Any],
) -> None:
    """Step one parameter through a whole copy of it, in its place among the others."""
    whole = sharded.whole(p).detach().clone()
    whole.grad = sharded.whole(sharded.agree(p, p.grad, ""))  # type: ignore[arg-type]
    places[k], before = whole, opt.state.get(p)
    if before:
        opt.state[whole] = {k: sharded.whole(x) if isinstance(x, torch.Tensor) else x for k, x in before.items()}
    try:
        plain()
        sharded.fill(p, whole)
        opt.state[p] = {key: _shared(x, (before or {}).get(key), p) for key, x in opt.state[whole].items()}
    finally:
        places[k] = BLANK
        opt.state.pop(whole, None)
        forget(whole)


def _shared(x: Any, before: Any, p: torch.Tensor) -> Any:
    """What this rank keeps of a state: the tensor that it has, with new values, or a new one."""
    if not isinstance(x, torch.Tensor):
        return x
    return sharded.fill(before if before is not None else sharded.empty(tuple(x.shape), x.dtype, p), x)
