"""`Composed`: any rule with any codecs as a torch.optim.Optimizer. Every named class is one of these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from refopt.spec import Rule, ShapeError, StateError
from refopt_cuda.optim import checks, run, settings, states
from refopt_cuda.rules import form_of

MEANING: dict[str, dict[str, Any]] = {
    "adam": {"amsgrad": False, "decoupled_weight_decay": False},
    "adamw": {"amsgrad": False, "decoupled_weight_decay": True},
}
"""Options of torch.optim under which a state would mean another rule."""


class Composed(torch.optim.Optimizer):
    """An update rule, with a codec for each of its states, over torch parameters on a CPU or on CUDA devices.

    params     tensors or parameter groups, as for torch.optim; float32, bfloat16 or float16, gradients likewise
    rule       a stem ("adamw") or a record of `refopt.rules`
    codecs     a codec for every state, or {state: codec}: "f32", "bf16", "int8_linear", "dynamic8"
    block      elements that share a scale (256)
    min_size   smaller matrices, vectors below 65,536 elements, and rows below 16 keep float32 states
    maximize   climb instead of descend
    hyper      the rule's hyper-parameters in torch's words: lr, betas, eps, weight_decay, momentum ...

    States are made in the first step: `state[p]["step"]`, which counts their steps, and for each state either torch's
    own key (exp_avg ...) or "<name>.codes" (8-bit) and "<name>.scales" (float32, one a block). CPU tensors are stepped
    by compiled loops, CUDA tensors by one kernel launch for each combination of dtypes on torch's current stream,
    without synchronisation. Gradients with NaN or Inf propagate.

    Raises TypeError or ValueError that name the argument, and StateError for a state that was altered; nothing is
    changed then. Parameters that share memory are refused, and so are steps that a CUDA graph captures.
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
        table = settings.codec_names(record, codecs, {s.name: usual or "f32" for s in record.states}, call)
        ours = {"rule": record.stem, "codecs": table, "block": block, "min_size": min_size, "maximize": bool(maximize)}
        settings.check_group(record, ours, call)
        settings.hyper_of(record, known | hyper, call)
        self._plans: dict[int, run.Plan] = {}
        super().__init__(params, {**known, **hyper, **ours})

    @property
    def rule(self) -> Rule:
        """The record of the rule."""
        return settings.rule_named(self.defaults["rule"], type(self).__name__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group may have its own hyper-parameters, codecs (of some states or all), block and min_size."""
        call = f"{type(self).__name__}.add_param_group"
        if isinstance(param_group, dict):
            table = settings.codec_names(self.rule, param_group.get("codecs"), self.defaults["codecs"], call)
            param_group = {**param_group, "codecs": table}
            group = {**self.defaults, **param_group}
            if group["rule"] != self.defaults["rule"]:
                raise ValueError(f"{call}: rule must be {self.defaults['rule']!r} as elsewhere, got {group['rule']!r}")
            settings.check_group(self.rule, group, call)
            settings.hyper_of(self.rule, group, call)
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                checks.param(p, call)
        except TypeError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what `closure` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        call, rule = f"{type(self).__name__}.step", self.rule
        ready = []
        for k, group in enumerate(self.param_groups):
            plan = self._plans.setdefault(k, run.Plan())
            hyper, pairs = settings.hyper_of(rule, group, call), checks.gather(group["params"], call)
            ready.append((plan, hyper, group, plan.prepare(rule, hyper, group, pairs, self.state, call)))
        self._check_apart([plan for plan, *_ in ready], call)
        for plan, hyper, group, work in ready:
            plan.run(form_of(rule.stem, hyper), hyper, group, work, self.state)
        return loss

    def _check_apart(self, plans: list[run.Plan], call: str) -> None:
        """Once for every set of addresses: over all that has ever been stepped, with a gradient now or not."""
        if all(plan.apart for plan in plans):
            return
        known = zip(plans, self.param_groups, strict=True)
        checks.apart((p for plan, group in known for p in group["params"] if id(p) in plan.slots), call)
        for plan in plans:
            plan.apart = True

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
        call, groups = f"{type(self).__name__}.load_state_dict", saved["param_groups"]
        sizes = [[len(g["params"]) for g in side] for side in (groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ShapeError(f"{call}: parameter groups have {sizes[0]} tensors, this optimizer has {sizes[1]}")
        for k, (theirs, ours) in enumerate(zip(groups, self.param_groups, strict=True)):
            own = {name: ours[name] for name in ("rule", "codecs", "block", "min_size")}
            for name, value in (own | MEANING.get(self.rule.stem, {})).items():
                if theirs.get(name, value) != value:
                    raise StateError(f"{call}: group {k} has {name} {theirs[name]!r}, this optimizer has {value!r}")
            hyper = settings.hyper_of(self.rule, {**ours, **theirs}, call)
            for index, p in zip(theirs["params"], ours["params"], strict=True):
                if index in saved["state"]:
                    known = states.layout_of(self.rule.states, ours, p)
                    needed = states.layout(self.rule, hyper, ours, p)
                    states.check(known, needed, saved["state"][index], f"{call}: state[{index}]")

    def _restore(self, saved: Mapping[str, Any], mine: list[dict[str, Any]]) -> None:
        for group, theirs, ours in zip(self.param_groups, saved["param_groups"], mine, strict=True):
            for name in ours:
                group.setdefault(name, ours[name])
            for index, p in zip(theirs["params"], group["params"], strict=True):
                if index in saved["state"]:
                    known = states.layout_of(self.rule.states, group, p)
                    self.state[p] = states.restore(known, saved["state"][index], p)
        self._plans.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
