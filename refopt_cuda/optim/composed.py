"""`Composed`: any rule with any codecs as a torch.optim.Optimizer. Every named class is one of these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from refopt.spec import Rule, ShapeError, StateError
from refopt_cuda.optim import run, settings, states


class Composed(torch.optim.Optimizer):
    """An update rule, with a codec for each of its states, over torch parameters on a CPU or on CUDA devices.

    params     tensors or parameter groups, as for torch.optim; float32, bfloat16 or float16, gradients likewise
    rule       a stem ("adamw") or a record of `refopt.rules`
    codecs     a codec for every state, or {state: codec}: "f32", "bf16", "int8_linear", "dynamic8"
    block      elements that share a scale (256)
    min_size   smaller matrices, vectors below 65,536 elements, and rows below 16 keep float32 states
    maximize   climb instead of descend
    hyper      the rule's hyper-parameters in torch's words: lr, betas, eps, weight_decay, momentum ...

    States are made in the first step: `state[p]["step"]`, and for each state either torch's own key (exp_avg ...) or
    "<name>.codes" (8-bit) and "<name>.scales" (float32, one a block). CPU tensors are stepped by compiled loops, CUDA
    tensors by one kernel launch for each combination of dtypes on torch's current stream, without synchronisation.

    Raises TypeError or ValueError that name the argument; nothing is changed then. Gradients with NaN or Inf propagate.
    """

    def __init__(
        self,
        params: Any,
        rule: str | Rule = "adamw",
        codecs: Any = None,
        *,
        place: str = "resident",
        block: int = 256,
        min_size: int = 4096,
        maximize: bool = False,
        usual: str | None = None,
        **hyper: Any,
    ) -> None:
        call = type(self).__name__
        record = settings.rule_named(rule, call)
        known = settings.torch_words(record)
        for name in hyper:
            if name not in known:
                raise TypeError(f"{call}: no argument {name!r}; {record.stem} takes {', '.join(known)}")
        if place != "resident":
            raise ValueError(f"{call}: place must be 'resident', got {place!r}; other places have no fast path yet")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"{call}: block must be a whole number >= 1, got {block!r}")
        if not isinstance(min_size, int) or min_size < 0:
            raise ValueError(f"{call}: min_size must be a whole number >= 0, got {min_size!r}")
        ours: dict[str, Any] = {"rule": record.stem, "codecs": settings.codec_names(record, codecs, usual, call)}
        ours |= {"block": block, "min_size": min_size, "maximize": bool(maximize)}
        settings.hyper_of(record, known | hyper, call)
        self._plans: dict[int, run.Plan] = {}
        super().__init__(params, {**known, **hyper, **ours})

    @property
    def rule(self) -> Rule:
        """The record of the rule."""
        return settings.rule_named(self.defaults["rule"], type(self).__name__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group may have its own hyper-parameters, codecs, block and min_size."""
        call = f"{type(self).__name__}.add_param_group"
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            if group["rule"] != self.defaults["rule"]:
                raise ValueError(
                    f"{call}: rule must be {self.defaults['rule']!r} in every group, got {group['rule']!r}"
                )
            settings.hyper_of(self.rule, group, call)
            if "codecs" in param_group:
                names = settings.codec_names(self.rule, param_group["codecs"], None, call)
                param_group = {**param_group, "codecs": names}
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            run.check_param(p, call)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what `closure` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        call = f"{type(self).__name__}.step"
        hypers = [settings.hyper_of(self.rule, group, call) for group in self.param_groups]
        work = [run.gather(group["params"], call) for group in self.param_groups]
        for k, (group, hyper, pairs) in enumerate(zip(self.param_groups, hypers, work, strict=True)):
            plan = self._plans.setdefault(k, run.Plan())
            plan.step(self.rule, hyper, group, pairs, self.state)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but codes stay codes and float32 states stay float32 whatever the weights are.

        Takes the state of the same rule, codecs and block, and a torch.optim state of the same rule where no state is
        coded. Raises StateError or ShapeError, before anything is changed, for any other.
        """
        mine = [dict(group) for group in self.param_groups]
        seen: dict[str, Any] = {}

        def look(_: Any, final: dict[str, Any]) -> None:  # after the user's own hooks
            self._check_saved(final)
            seen.update(copy.copy(final))

        def put_back(_: Any) -> None:  # before the user's own hooks
            self._restore(seen, mine)

        before = self.register_load_state_dict_pre_hook(look)
        after = self.register_load_state_dict_post_hook(put_back, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        groups = saved["param_groups"]
        sizes = [[len(g["params"]) for g in side] for side in (groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ShapeError(
                f"load_state_dict: parameter groups have {sizes[0]} tensors, this optimizer has {sizes[1]}"
            )
        for k, (theirs, ours) in enumerate(zip(groups, self.param_groups, strict=True)):
            for name in ("rule", "codecs", "block", "min_size"):
                if name in theirs and theirs[name] != ours[name]:
                    raise StateError(
                        f"load_state_dict: group {k} has {name} {theirs[name]!r}, this optimizer has {ours[name]!r}"
                    )
            hyper = settings.hyper_of(self.rule, {**ours, **theirs}, "load_state_dict")
            for index, p in zip(theirs["params"], ours["params"], strict=True):
                if index in saved["state"]:
                    states.check(states.layout(self.rule, hyper, ours, p), saved["state"][index], f"state[{index}]")

    def _restore(self, saved: Mapping[str, Any], mine: list[dict[str, Any]]) -> None:
        for group, theirs, ours in zip(self.param_groups, saved["param_groups"], mine, strict=True):
            for name in [n for n in group if n not in ours]:
                del group[name]
            for name in ours:
                group.setdefault(name, ours[name])
            hyper = settings.hyper_of(self.rule, group, "load_state_dict")
            for index, p in zip(theirs["params"], group["params"], strict=True):
                if index in saved["state"]:
                    kept = states.layout(self.rule, hyper, group, p)
                    self.state[p] = states.restore(kept, saved["state"][index], p)
        self._plans.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
