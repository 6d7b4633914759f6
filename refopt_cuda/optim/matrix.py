"""What optimizers of matrices have in common: `muon.py`, `galore.py` and `apollo.py`, whose rules take products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from refopt.spec import Hyper, Rule
from refopt_cuda.optim import checks, gathered, overrides, sharded, states
from refopt_cuda.optim.eager import eager
from refopt_cuda.optim.settings import number


class Work(NamedTuple):
    """One matrix's part in a step: weights, gradient, the entry of `state` to come, the step count to come."""

    p: torch.Tensor
    g: torch.Tensor
    state: dict[str, Any]
    t: int


class MatrixOptimizer(torch.optim.Optimizer):
    """What optimizers of matrices do alike: groups and steps are checked first, states go in and out as they are."""

    coded = False
    """Whether states may be coded."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "format": states.FORMAT})

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """The record of the rule that steps a group."""
        raise NotImplementedError

    def _words(self, group: Mapping[str, Any]) -> Mapping[str, tuple[str, int | None]]:
        """Of each hyper-parameter of the rule: where a group holds it, a key and the place in a pair."""
        raise NotImplementedError

    def _layout(self, group: Mapping[str, Any], hyper: Mapping[str, Any], p: torch.Tensor) -> states.Layout:
        """The state tensors of one parameter."""
        raise NotImplementedError

    def _run(self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work]) -> None:
        """Step matrices that were checked."""
        raise NotImplementedError

    def _check_group(self, group: Mapping[str, Any], call: str) -> None:
        """What a group holds besides hyper-parameters."""

    def _hyper(self, group: Mapping[str, Any], call: str) -> dict[str, Any]:
        """The rule's hyper-parameters from a group, checked; ValueError or TypeError names the one at fault."""
        rule, out = self._rule(group), {}
        hypers = {h.name: h for h in rule.hypers}
        for name, (key, at) in self._words(group).items():
            value = group[key]
            if at is not None:
                if not isinstance(value, tuple | list) or len(value) != 2:
                    raise ValueError(f"{call}: {key} must be 2 numbers, got {value!r}")
                value, key = value[at], f"{key}[{at}]"
            out[name] = number(value, key, call)
            _named(hypers[name], key).check(call, out[name])
        self._check_group(group, call)
        return rule.defaults() | out

    def _check_param(self, group: Mapping[str, Any], hyper: dict[str, Any], p: torch.Tensor, call: str) -> None:
        checks.param(p, call)
        rule = self._rule(group)
        if rule.fits is not None:
            rule.fits(f"{call}: a parameter", tuple(p.shape), hyper)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group may have its own hyper-parameters."""
        call = f"{type(self).__name__}.add_param_group"
        super().add_param_group(param_group)
        new = overrides.apart(self, self.param_groups.pop(), call, self.coded)
        for group in new:
            hyper = self._hyper(group, call)
            for p in group["params"]:
                self._check_param(group, hyper, p, call)
        self.param_groups += new

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what `closure` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        only = not self.state and sharded.initial()
        if gathered.any_sharded(self):
            gathered.step(self, lambda: self._step(only), lambda p: None)
        else:
            self._step(only)
        return loss

    def _step(self, only: bool) -> None:
        """One step of whole parameters; `only`: the states that it would begin with, and no step."""
        call = f"{type(self).__name__}.step"
        ready = [self._prepare(group, call) for group in self.param_groups]
        self._check_apart((w.p for _, work in ready for w in work), call)
        for group, (hyper, work) in zip(self.param_groups, ready, strict=True):
            for w in work:
                self.state[w.p] = w.state
            if only:
                continue
            self._run(group, hyper, [w for w in work if w.p.numel()])
            for w in work:
                w.state["step"] = w.t

    def _prepare(self, group: dict[str, Any], call: str) -> tuple[dict[str, Any], list[Work]]:
        """Everything that this step needs, checked; states that are missing are made but not yet given to `state`."""
        hyper, work = self._hyper(group, call), []
        pairs = checks.gather(group["params"], call)
        checks.capture(pairs, None, call)
        for p, g in pairs:
            self._check_param(group, hyper, p, call)
            entry = states.ready(self._layout(group, hyper, p), self.state.get(p), p, call)
            work.append(Work(p, g, entry, entry["step"] + 1))
        return hyper, work

    def _check_apart(self, params: Iterable[torch.Tensor], call: str) -> None:
        """Once for every set of addresses."""
        params = list(params)
        places = {(p.data_ptr(), p.shape, p.stride()) for p in params}
        if len(places) < len(params) or not places <= self.__dict__.setdefault("_apart", set()):
            checks.apart(params, call)
            self._apart = places

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their dtypes whatever the weights are.

        Raises StateError or ShapeError, before anything is changed, for the state of another optimizer.
        """
        states.load(self, state_dict, self._check_saved, self._restore)

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        call, groups = f"{type(self).__name__}.load_state_dict", saved["param_groups"]
        for theirs, ours in zip(groups, self.param_groups, strict=True):
            group = {**ours, **theirs}
            hyper = self._hyper(group, call)
            for index, p in zip(theirs["params"], ours["params"], strict=True):
                self._check_param(group, hyper, p, call)
                if index in saved["state"]:
                    kept = self._layout(group, hyper, p)
                    states.check(kept, kept, saved["state"][index], f"{call}: state[{index}]")

    def _restore(self, saved: Mapping[str, Any]) -> None:
        call = f"{type(self).__name__}.load_state_dict"
        for group, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            hyper = self._hyper(group, call)
            for index, p in zip(theirs["params"], group["params"], strict=True):
                if index in saved["state"]:
                    self.state[p] = states.restore(self._layout(group, hyper, p), saved["state"][index], p)


def _named(hyper: Hyper, key: str) -> Hyper:
    """The record under torch's word, which errors name."""
    return Hyper(**{**hyper.__dict__, "name": key})


def alike(work: Iterable[Work]) -> list[list[Work]]:
    """Matrices that one launch or product can take together, in their order."""
    groups: dict[Any, list[Work]] = {}
    for w in work:
        groups.setdefault((w.p.device, w.p.dtype, w.g.dtype, tuple(w.p.shape)), []).append(w)
    return list(groups.values())
