"""`Composed`: any rule with any codecs as a torch.optim.Optimizer. Every named class is one of these."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from refopt.spec import Rule, StateError
from refopt_cuda.optim import (
    checks,
    delayed,
    dialect,
    live,
    moved,
    norms,
    overrides,
    placing,
    run,
    settings,
    sharded,
    states,
)
from refopt_cuda.optim.delayed import Late
from refopt_cuda.optim.eager import eager
from refopt_cuda.optim.early import Early
from refopt_cuda.optim.splitting import Mixed, Split
from refopt_cuda.optim.watched import Entries, Entry
from refopt_cuda.rules import form_of

MEANING: dict[str, dict[str, Any]] = {
    "adam": {"decoupled_weight_decay": False},
    "adamw": {"decoupled_weight_decay": True},
}
"""An option of torch.optim under which a state would mean another rule."""


class Composed(torch.optim.Optimizer):
    """An update rule, with a codec for each of its states, over torch parameters on a CPU or on CUDA devices.

    params         tensors or parameter groups, as for torch.optim; float32, bfloat16 or float16, gradients likewise
    rule           a stem ("adamw") or a record of `refopt.rules`
    codecs         a codec for every state, or {role: codec} for states and for `p`, bfloat16 weights: names
                   ("dynamic8", "fp8.e5m2", "q4:64" in blocks of 64) or records of `refopt.codecs`
    block          elements that share a scale, for all states; by default each codec's own (256; q4 128, compand8 32)
    min_size       smaller matrices, vectors below 65,536 elements, and rows below 16 keep float32 states
    maximize       climb instead of descend
    seed           of the random bits of weights that are rounded by chance (codecs={"p": "bf16_sr"})
    place          "resident", states beside the weights; "paged", states in pinned host memory that pass through three
                   pages of device memory in every step (four with during_backward); or "host", states in host memory,
                   whose threads step the weights that come down and go up again; or "auto", which chooses among these
                   for each parameter (`plan`); or "disk", states in files of the directory `path`, which `resume()`
                   goes on with after a crash (`keep_weights` writes the weights there, too). The bits are the same. In
                   all but the first `state[p]` holds CPU tensors, of a disk copies, and
                   page_bytes (16 MiB) of states travel at a time, one block at least; to the host (128 MiB)
                   weights and gradients, where those are more;
                   resident_bytes (0) of states stay on the device, parameters in their order while they fit;
                   "auto", as with place="auto": in 0.9 of what is free on it at the first step;
                   during_backward steps a page as soon as the gradients of its tensors have arrived: copies
                   are hidden behind backward. Every backward pass is a step then: RuntimeError for a second one before
                   `step()`, and for gradients that were changed in between (clipping, GradScaler)
    delay          1, with place="host": each step applies the gradient of the step before, whose update the host makes
                   during backward; `finish()` applies the last. As `refopt.Optimizer(delay=1)`, to the bit
    warm           steps of a parameter that are without delay
    max_grad_norm  scale all gradients, within the step, so that their joint norm is this at most; one for all groups
    gnorm_scale    multiplies every gradient, before its norm is taken (bitsandbytes' name); one for all groups
    capturable     the device keeps step counts, and a CUDA graph may capture the step; lr may be a tensor there
    foreach        and `fused`: how torch.optim chooses its ways; taken, and without meaning here
    hyper          the rule's hyper-parameters in torch's words: lr, betas, eps, weight_decay, momentum ...

    States are made in the first step: `state[p]["step"]`, which counts their steps, and for each state either torch's
    own key (exp_avg ...) or "<name>.codes" and "<name>.scales" (one a block); what bfloat16 weights keep beside them is
    "p.rem", "p.comp" or "p.error". Weights of another dtype do not follow codecs["p"]. CPU tensors are stepped
    by compiled loops, CUDA tensors by one kernel launch for each combination of dtypes on torch's current stream,
    without synchronisation. Gradients with NaN or Inf propagate.

    Raises TypeError or ValueError that name the argument, and StateError for a state that was altered; nothing is
    changed then. Parameters that share memory are refused, and so are steps that a CUDA graph captures without
    `capturable`. torch.amp.GradScaler hands over its scale and found_inf, and nobody waits for them.
    """

    first_number = 0
    """Of the parameters, which random bits are drawn by."""
    usual_place = "resident"

    def __init__(
        self,
        params: Any,
        rule: str | Rule = "adamw",
        codecs: Any = None,
        *,
        place: str | None = None,
        page_bytes: int | None = None,
        resident_bytes: int | str | None = None,
        during_backward: bool = False,
        delay: int | None = None,
        warm: int | None = None,
        path: str | os.PathLike[str] | None = None,
        keep_weights: bool = False,
        block: int | None = None,
        min_size: int = 4096,
        maximize: bool = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        gnorm_scale: float = 1.0,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        usual: str | None = None,
        **hyper: Any,
    ) -> None:
        call = type(self).__name__
        dialect.further(call, {"differentiable": differentiable}, {})
        live.check(gnorm_scale, max_grad_norm, call)
        record = settings.rule_named(rule, call)
        known = settings.torch_words(record)
        for name in hyper:
            if name not in known:
                raise TypeError(f"{call}: no argument {name!r}; {record.stem} takes {', '.join(known)}")
        where = place or self.usual_place
        self._placed = placing.check(
            where,
            page_bytes,
            resident_bytes,
            during_backward,
            call,
            delay=delay,
            warm=warm,
            path=path,
            keep_weights=keep_weights,
        )
        table = settings.codec_names(record, codecs, {s.name: usual or "f32" for s in record.states}, call)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"{call}: seed must be a whole number, got {seed!r}")
        ours: dict[str, Any] = {"rule": record.stem, "codecs": table, "block": block, "min_size": min_size}
        ours |= {"maximize": bool(maximize), "seed": seed, "format": states.FORMAT}
        ours |= {"capturable": bool(capturable), "max_grad_norm": max_grad_norm, "gnorm_scale": gnorm_scale}
        settings.check_group(record, ours, call)
        checked = settings.hyper_of(record, known | hyper | ours, call)
        if capturable:
            live.refuse_schedule(checked, call)
        self._plans: dict[int, run.Plan] = {}
        self._memory = norms.Memory()
        placing.refuse(self._placed, capturable, max_grad_norm, call)
        self._home = placing.home(self._placed)
        self._early = Early(self) if during_backward else None
        self._late = Late(self, self._placed.warm) if delay else None
        super().__init__(params, {**known, **hyper, **ours})

    @property
    def rule(self) -> Rule:
        """The record of the rule."""
        return settings.rule_named(self.defaults["rule"], type(self).__name__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group may have its own hyper-parameters, codecs (of some states or all), block and min_size."""
        call = f"{type(self).__name__}.add_param_group"
        if isinstance(param_group, dict):
            param_group = dialect.group(call, param_group, self.defaults["rule"])
            for name, value in MEANING.get(self.defaults["rule"], {}).items():
                if param_group.get(name, value) != value:
                    raise ValueError(f"{call}: {name} must be {value} as elsewhere, got {param_group[name]!r}")
            table = settings.codec_names(self.rule, param_group.get("codecs"), self.defaults["codecs"], call)
            param_group = {**param_group, "codecs": table}
            group = {**self.defaults, **param_group}
            if group["rule"] != self.defaults["rule"]:
                raise ValueError(f"{call}: rule must be {self.defaults['rule']!r} as elsewhere, got {group['rule']!r}")
            settings.check_group(self.rule, group, call)
            settings.hyper_of(self.rule, group, call)
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        parts = overrides.apart(self, group, call)
        for part in parts:
            settings.hyper_of(self.rule, part, call)
            for p in part["params"]:
                checks.param(p, call)
        checks.format_of_weights(group, call)
        moved.check(self.rule, parts, type(self).__name__)
        if self._early is not None:
            sharded.refuse_early(group["params"], call)
        self.param_groups += parts
        for hears in (self._early, self._late):
            for part in parts if hears is not None else ():
                hears.listen(part["params"])  # type: ignore[union-attr]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves it to the step to divide and to skip; schedules are the host's, and steps
        that began in backward have to hear of it to refuse."""
        if self._early is not None or self._placed.place in ("host", "auto", "disk"):
            return self._early is not None
        return not any(live.scheduled(group) for group in self.param_groups)

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what `closure` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        call, rule = f"{type(self).__name__}.step", self.rule
        if self._early is not None:
            self._home.passed()  # nobody is told of the end of a backward pass that raised
            self._early.check(self, call)
            sharded.refuse_early((p for group in self.param_groups for p in group["params"]), call)
        hypers = [settings.hyper_of(rule, group, call) for group in self.param_groups]
        plans = [self._plans.setdefault(k, run.Plan(self._home)) for k in range(len(hypers))]
        scaling, capturing = live.scaling_of(self, call), checks.capturing()
        for plan, hyper, group in zip(plans, hypers, self.param_groups, strict=True):
            plan.agree(rule, hyper, group, call, scaling)
        if not scaling.skip and not self._again(plans, hypers, scaling, call):
            self._anew(plans, hypers, scaling, call)
        if self._early is not None:
            self._early.done(self)
        if capturing:
            self._memory.hold(plans)
        return loss

    def finish(self) -> None:
        """Apply the gradients that wait, the last step of a run with `delay=1`. Nothing is done where none waits."""
        if self._late is not None:
            self._late.finish(self)

    def _again(self, plans: list[run.Plan], hypers: list[dict[str, Any]], scaling: live.Scaling, call: str) -> bool:
        """The step of before with new gradients, if nothing else has changed in any group."""
        if any(plan.lane is None for plan in plans):
            return False
        if checks.capturing() and not all(plan.counting for plan in plans):
            return False
        ready = []
        for plan, group in zip(plans, self.param_groups, strict=True):
            found = plan.lane.gradients(group["params"], self._state, self._seen)  # type: ignore[union-attr]
            if found is None:
                return False
            ready.append(found)
        if scaling.longest is not None:
            every = [g for grads, _ in ready for g in grads]
            lanes: Any = [plan.lane for plan in plans]
            params = [p for lane in lanes for p in lane.params]
            scaling = self._memory.norms.measure(every, scaling, call, params, lanes)
        for plan, hyper, group, (_, addresses) in zip(plans, hypers, self.param_groups, ready, strict=True):
            plan.again(form_of(self.rule.stem, hyper), hyper, group, addresses, scaling, call)
        if self._seen:
            self._settle()
        return True

    @property
    def state(self) -> Any:
        """The states by parameter. From the first look on, every step compares where they lie."""
        self._settle()
        if self._late is not None:
            self._late.settle(self)
        if self._home is not None:
            self._home.finish()
            self._home.show(self._state)
        self._seen = True
        return self._state

    @state.setter
    def state(self, value: Any) -> None:
        self._state, self._seen = Entries(dict, value), bool(value)

    def _settle(self) -> None:
        """Step counts are written where they can be seen only when somebody may look."""
        for plan in self._plans.values():
            if plan.lane is not None:
                plan.lane.settle()

    def _anew(self, plans: list[run.Plan], hypers: list[dict[str, Any]], scaling: live.Scaling, call: str) -> None:
        """A step in which everything is looked at."""
        self._settle()
        if self._home is not None:
            self._home.begin(self._state, (p for group in self.param_groups for p in group["params"]), call)
        overrides.settle(self, call)
        self._decide(call)
        numbers = self._numbers()
        ready = []
        for plan, hyper, group in zip(plans, hypers, self.param_groups, strict=True):
            pairs = checks.gather(group["params"], call)
            if self._late is not None:
                pairs = self._late.due(group["params"], pairs, self._state)
            ready.append(plan.prepare(self.rule, hyper, group, pairs, self._state, numbers, call))
        self._check_apart(plans, call)
        if not self._state and sharded.initial():
            for plan, work in zip(plans, ready, strict=True):
                plan.keep(work, self._state)
            return
        if self._late is not None:
            runs = list(zip(plans, hypers, self.param_groups, ready, strict=True))
            self._late.step(self, runs, scaling, call)
            return
        if scaling.longest is not None:
            ready = [[w._replace(g=w.g.contiguous()) for w in work] for work in ready]
            every = [w for work in ready for w in work]
            scaling = self._memory.norms.measure([w.g for w in every], scaling, call, [w.slot.p for w in every])
        for plan, hyper, group, work in zip(plans, hypers, self.param_groups, ready, strict=True):
            plan.run(form_of(self.rule.stem, hyper), hyper, group, work, self._state, scaling, call)
        if self._home is not None:
            self._home.stepped(plans, self._state, numbers, self.rule.stem)
        self._state.changed = False

    def _decide(self, call: str) -> None:
        """With `place="auto"`, where the states of each parameter are to live."""
        if isinstance(self._home, Mixed):
            self._home.decide(self, call)

    @property
    def plan(self) -> dict[torch.device, Split]:
        """How `place="auto"` has split the states of each device; empty before the first step, and in other places.

        `print(*opt.plan.values())` says what is where, and how long a step should take; so does the logger
        `refopt_cuda` when it is made.
        """
        return dict(self._home.plans) if isinstance(self._home, Mixed) else {}

    def _numbers(self) -> dict[int, int]:
        """Of each parameter by id; random bits are drawn by them."""
        every = (p for group in self.param_groups for p in group["params"])
        return {id(p): k for k, p in enumerate(every, self.first_number)}

    def _check_apart(self, plans: list[run.Plan], call: str) -> None:
        """Once for every set of addresses: over all that has ever been stepped, with a gradient now or not."""
        if all(plan.apart for plan in plans):
            return
        known = zip(plans, self.param_groups, strict=True)
        checks.apart((sharded.local(p) for plan, group in known for p in group["params"] if id(p) in plan.slots), call)
        for plan in plans:
            plan.apart = True

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors are the optimizer's own, the dictionaries that hold them are not."""
        seen = self._seen
        out = super().state_dict()
        out["state"] = {k: dict(v) if isinstance(v, dict) else v for k, v in out["state"].items()}
        self._seen = seen
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but codes stay codes and float32 states stay float32 whatever the weights are.

        Takes the state of the same rule, codecs and block, and a torch.optim state of the same rule where no state is
        coded. Raises StateError or ShapeError, before anything is changed, for any other.
        """
        self._settle()
        if self._home is not None:
            self._home.finish()
        states.load(self, state_dict, self._check_saved, partial(self._restore, before=self._state))

    def resume(self) -> int:
        """Go on with the states that an optimizer with place="disk" left in `path` when its process ended.

        They are those of its last complete step, which may have been cut off in the next one. Returns the number of
        steps that its parameters had taken (the most of any): the weights must be those of that step.
        Where parameters are sharded all ranks must call it, and go on with the newest step that is complete on all.
        Raises FileNotFoundError where no step was completed, StateError for the states of another rule, other codecs or
        other shapes, OSError where the directory cannot be used; ValueError for another place; where another rank
        raises, RuntimeError.
        """
        call = f"{type(self).__name__}.resume"
        hypers = [settings.hyper_of(self.rule, group, call) for group in self.param_groups]
        numbers = self._numbers()
        kept = {
            numbers[id(p)]: (p, states.layout(self.rule, hyper, group, p))
            for hyper, group in zip(hypers, self.param_groups, strict=True)
            for p in group["params"]
        }
        found, steps = placing.resume(self._home, self._placed, kept, self.rule.stem, call)
        self._plans.clear()
        self.state = {p: Entry(entry) for p, entry in found.items()}
        return steps

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        call, groups = f"{type(self).__name__}.load_state_dict", saved["param_groups"]
        mine = zip(self.param_groups, overrides.kept(self, call), strict=True)
        ours_now = [{**group, "overrides": own} for group, own in mine]
        for k, (theirs, ours) in enumerate(zip(groups, ours_now, strict=True)):
            own = {name: ours[name] for name in ("rule", "codecs", "min_size", "overrides")}
            for name, value in (own | MEANING.get(self.rule.stem, {})).items():
                if theirs.get(name, value) != value:
                    raise StateError(f"{call}: group {k} has {name} {theirs[name]!r}, this optimizer has {value!r}")
            for role in ours["codecs"]:
                both = {**ours, **theirs}, ours
                their, our = (settings.coding(group["codecs"][role], group["block"], False).block for group in both)
                if their != our:
                    raise StateError(f"{call}: group {k} has {role} in blocks of {their}, this optimizer of {our}")
            hyper = settings.hyper_of(self.rule, {**ours, **theirs}, call)
            for index, p in zip(theirs["params"], ours["params"], strict=True):
                if index in saved["state"]:
                    known = states.layout_of(self.rule.states, ours, p)
                    needed = states.layout(self.rule, hyper, ours, p)
                    where = f"{call}: state[{index}]"
                    entry = delayed.checked(saved["state"][index], p, self._placed.delay, where)
                    states.check(known, needed, entry, where)

    def _restore(self, saved: Mapping[str, Any], before: Mapping[Any, Any]) -> None:
        overrides.settle(self, f"{type(self).__name__}.load_state_dict")
        self._decide(f"{type(self).__name__}.load_state_dict")
        for group, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            for index, p in zip(theirs["params"], group["params"], strict=True):
                if index in saved["state"]:
                    known = states.layout_of(self.rule.states, group, p)
                    entry, restore = saved["state"][index], states.restore
                    if self._home is not None:
                        restore = partial(self._home.restore, have=before.get(p))
                    self._state[p] = restore(known, entry, p)
        self._plans.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "placed": self._placed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plans, self._memory, state = {}, norms.Memory.after(self), dict(state)
        if "placed" in state:  # of a copy; loading a checkpoint comes this way, too, and changes no place
            self._placed = state.pop("placed")
            self._home = placing.home(self._placed)
            self._early = Early(self) if self._placed.during_backward else None
            self._late = Late(self, self._placed.warm) if self._placed.delay else None
            for hears in (self._early, self._late):
                if hears is not None:
                    hears.listen(p for group in state["param_groups"] for p in group["params"])
        if "state" in state:
            self.state = state.pop("state")
        super().__setstate__(state)
        for group in self.param_groups:  # of a version that had none of these
            for name, value in (("capturable", False), ("max_grad_norm", None), ("gnorm_scale", 1.0)):
                group.setdefault(name, value)
