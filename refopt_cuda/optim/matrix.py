"""What optimizers of matrices have in common: `muon.py`, `galore.py` and `apollo.py`, whose rules take products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

from refopt.spec import Hyper, Rule, State, StateError
from refopt_cuda.kernels import rows_cuda
from refopt_cuda.optim import (
    checks,
    dialect,
    gathered,
    live,
    norms,
    overrides,
    placing,
    sharded,
    states,
    whole_places,
    whole_slots,
)
from refopt_cuda.optim.coded import Direct, Room
from refopt_cuda.optim.eager import eager
from refopt_cuda.optim.housed import Housed
from refopt_cuda.optim.live import Scaling
from refopt_cuda.optim.settings import codec_names, number
from refopt_cuda.optim.whole_places import Shelf
from refopt_cuda.optim.whole_slots import Slot

CODING: Mapping[str, Any] = {"codecs": None, "block": None, "min_8bit_size": 4096}
"""Arguments by keyword that say how states are kept, and their defaults."""
MORE: Mapping[str, Any] = {**CODING, "maximize": False, "overrides": None}
"""Further ones that all of these optimizers take."""


class Now(NamedTuple):
    """What only the step itself knows, for the parameters of one group and device.

    gs, lr   what gradients are multiplied by, and the rate: numbers, or float32 tensors of no axis on the device
    skip     bool on the device: the step is to have no effect; None: it has
    scaling  as it was handed over, if the device computes scalars; None: the host knows all
    """

    gs: Any = 1.0
    lr: Any = 0.0
    skip: torch.Tensor | None = None
    scaling: Scaling | None = None


class Work(NamedTuple):
    """One matrix's part in a step: weights, gradient, the entry of `state` to come, the step count to come or where a
    device keeps the one that was reached, and how its states are kept."""

    p: torch.Tensor
    g: torch.Tensor
    state: dict[str, Any]
    t: Any
    kept: states.Layout
    now: Now = Now()

    @property
    def gradient(self) -> torch.Tensor:
        """In float32, as it is to be stepped with."""
        gs = self.now.gs
        return self.g.float() if isinstance(gs, float) and gs == 1.0 else self.g.float() * gs


class MatrixOptimizer(Housed):
    """What optimizers of matrices do alike: groups and steps are checked first, states go in and out as they are."""

    takes: ClassVar[Mapping[str, Any]] = dialect.SCALING
    """Arguments by keyword beside those of the signature and those of coded states, and their defaults."""
    codable: ClassVar[Mapping[str, State]]
    """States that may be coded."""
    usual: ClassVar[str] = "f32"
    """How those are kept unless an argument says otherwise."""
    places: ClassVar[bool] = False
    """Whether states may live elsewhere: where a step of a tensor alone has the bits of one among others."""

    def __init__(self, params: Any, defaults: dict[str, Any], options: Mapping[str, Any]) -> None:
        call = type(self).__name__
        where = whole_places.OPTIONS if self.places else {}
        more = dialect.further(call, options, {**self.takes, **MORE, **where})
        self._house(more, call)
        live.check(more["gnorm_scale"], more["max_grad_norm"], call)
        patterns = more.pop("overrides")
        if patterns is not None:
            params = overrides.of_class(params, patterns, {*defaults, *more, "min_size"}, call)
        more["min_size"] = dialect.size(call, more.pop("min_8bit_size"))
        more["codecs"] = self._table(more["codecs"], dict.fromkeys(self.codable, self.usual), call)
        defaults = {**defaults, **more}
        self._hyper(defaults, call)
        self._forget()
        super().__init__(params, {**defaults, "format": states.FORMAT})

    def _forget(self) -> None:
        """What steps have found out so far."""
        self._apart: set[Any] = set()
        self._slots: dict[torch.Tensor, Slot] = {}
        self._shelves: dict[int, Shelf] = {}
        self._counting: set[int] = set()
        self._rooms: dict[Any, dict[torch.device, torch.Tensor]] = {}
        self._room, self._direct = Room(), Direct()
        self._memory = norms.Memory.after(self)

    def _table(self, given: Any, usual: Mapping[str, str], call: str) -> dict[str, str]:
        """A codec for each state that may have one; ValueError for the others, and for the weights."""
        if isinstance(given, Mapping):
            for role in given.keys() - usual.keys():
                raise ValueError(f"{call}: codecs[{role!r}]: only {', '.join(usual)} may be coded here")
        record = self._rule({"rank": None})
        table = codec_names(record, given, usual, call)
        return {name: table[name] for name in usual}

    def _inner(self, group: Mapping[str, Any], p: torch.Tensor, shape: tuple[int, ...]) -> states.Layout:
        """The states of `p` that may be coded, where they are of this shape."""
        own = overrides.settings_of(p)
        own = {name: own.get(name, group[name]) for name in overrides.KEPT}
        codecs = own["codecs"]
        codecs = codecs if isinstance(codecs, Mapping) else dict.fromkeys(self.codable, codecs)
        stand = torch.empty(shape, device="meta") if shape != tuple(p.shape) else p
        return states.layout_of(self.codable.values(), {**own, "codecs": {**group["codecs"], **codecs}}, stand)

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
            out[name] = number(value, key, call, key == "lr" and group.get("capturable", False))
            if not isinstance(out[name], torch.Tensor):
                _named(hypers[name], key).check(call, out[name])
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"{call}: maximize must be True or False, got {group['maximize']!r}")
        placing.refuse(self._placed, group.get("capturable"), group["max_grad_norm"], call)
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
        if isinstance(param_group, dict):
            param_group = dialect.group(call, param_group)
            if param_group.get("capturable") and "capturable" not in self.takes:
                raise ValueError(f"{call}: {type(self).__name__} cannot be captured, got capturable=True")
            table = self._table(param_group.get("codecs"), self.defaults["codecs"], call)
            param_group = {**param_group, "codecs": table}
        super().add_param_group(param_group)
        new = overrides.apart(self, self.param_groups.pop(), call)
        for group in new:
            hyper = self._hyper(group, call)
            for p in group["params"]:
                self._check_param(group, hyper, p, call)
        self.param_groups += new

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves it to the step to divide and to skip: not where the host must know what
        was skipped, nor where parameters are sharded, of which each is stepped by itself."""
        known = self._placed.place in ("host", "disk") or gathered.any_sharded(self)
        return "capturable" in self.takes and not known

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what `closure` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        only = not self._state and sharded.initial()
        if gathered.any_sharded(self):
            whole_places.refuse_shards(self._placed, f"{type(self).__name__}.step")
            gathered.refuse(self)
            gathered.step(self, lambda: self._step(only), lambda p: None)
        else:
            self._step(only)
        return loss

    def _step(self, only: bool) -> None:
        """One step of whole parameters; `only`: the states that it would begin with, and no step."""
        call = f"{type(self).__name__}.step"
        scaling = live.scaling_of(self, call)
        hypers = [self._hyper(group, call) for group in self.param_groups]
        if scaling.skip:
            return
        numbers = self._begin(call)
        ready = [self._prepare(k, hyper, scaling, numbers, call) for k, hyper in enumerate(hypers)]
        self._check_apart((w.p for work in ready for w in work), call)
        if scaling.longest is not None and not only:
            ready = [[w._replace(g=w.g.contiguous()) for w in work] for work in ready]
            every = [w for work in ready for w in work]
            scaling = self._memory.norms.measure([w.g for w in every], scaling, call, [w.p for w in every])
        for k, (hyper, work) in enumerate(zip(hypers, ready, strict=True)):
            if only:
                self._state.update((w.p, w.state) for w in work)
            else:
                self._advance(k, hyper, work, scaling)
        if self._home is not None and not only:
            self._home.stepped(self._shelves.values(), self._state, numbers, self._named)
        self._room.settle()
        if checks.capturing():
            self._memory.keep([dict(self._state), [dict(room) for room in self._rooms.values()], self._room.held])

    def _room_for(self, group: Mapping[str, Any], states: Sequence[Any]) -> Room | Direct:
        """Where these states, each with its coding, tensors and shape, are decoded: at the same places in every step
        that may be captured, else in new memory."""
        if not group.get("capturable") or not states:
            return self._direct
        self._room.begin(states)
        return self._room

    def _prepare(
        self, k: int, hyper: dict[str, Any], scaling: Scaling, numbers: Mapping[int, int], call: str
    ) -> list[Work]:
        """Everything that this step needs, checked; states that are missing are made but not yet given to `state`."""
        group, work = self.param_groups[k], []
        pairs = checks.gather(group["params"], call)
        capturable = group.get("capturable")
        checks.capture(pairs, capturable, call)
        if capturable or scaling.foreign:
            self._counting.add(k)
        for p, g in pairs:
            self._check_param(group, hyper, p, call)
            kept, have, counts = self._layout(group, hyper, p), self._state.get(p), k in self._counting and p.is_cuda
            if not states.begun(kept, have):
                live.refuse_in_capture("states")
                overrides.refuse_late(self, p, call)
            ready = (self._home or states).ready
            entry = live.ready(kept, have, p, call, ready) if counts else ready(kept, have, p, call)
            work.append(Work(p, g, entry, entry["step"] if counts else entry["step"] + 1, kept))
        if self._home is not None:
            self._arrange(k, work, numbers, call)
        return live.counted(work, group["params"], self._state) if k in self._counting else work

    def _arrange(self, k: int, work: Sequence[Work], numbers: Mapping[int, int], call: str) -> None:
        """Tell the place which tensors there are."""
        for w in work:
            slot, number = self._slots.get(w.p), numbers[id(w.p)]
            if slot is None or slot.stale(w.kept, w.state, number):
                names = tuple(parts[0].key for parts in w.kept.parts)
                self._slots[w.p] = Slot(w.p, w.kept, names, w.kept, w.state, number)
        shelf = self._shelves.setdefault(k, Shelf())
        shelf.slots = {id(p): self._slots[p] for p in self.param_groups[k]["params"] if p in self._slots}
        self._home.arrange(shelf, call)

    def _advance(self, k: int, hyper: dict[str, Any], work: list[Work], scaling: Scaling) -> None:
        """Step what was prepared, then count the step."""
        factor, skip = scaling.on_host if any(not w.p.is_cuda for w in work) else (1.0, False)
        if skip:
            work = [w for w in work if w.p.is_cuda]
        for device in dict.fromkeys(w.p.device for w in work):
            some = [w for w in work if w.p.device == device]
            now = self._now(k, hyper, some, factor, scaling)
            some = [w._replace(now=now) for w in some if w.p.numel()]
            away = {w.p for w in some if self._home is not None and self._home.holds(self._slots[w.p])}
            self._run(self.param_groups[k], hyper, [w for w in some if w.p not in away])
            if away:
                self._run_away(k, hyper, [w for w in some if w.p in away], device)
        for w in work:
            w.state["step"] = w.t
            self._state[w.p] = w.state

    def _run_away(self, k: int, hyper: dict[str, Any], work: Sequence[Work], device: torch.device) -> None:
        """Step tensors of one device whose states live in another place."""
        group, of = self.param_groups[k], {self._slots[w.p]: w for w in work}

        def run(launches: Any, key: Any, some: Sequence[whole_slots.Work], rows: Now) -> None:
            opened = [Work(w.slot.dense, w.g, w.slot.by_key, w.t, w.slot.kept, rows) for w in some]
            self._run(group, hyper, opened)

        given = [whole_slots.Work(slot, w.g, w.t) for slot, w in of.items()]
        self._home.step(self._shelves[k], run, given, {device: work[0].now})

    def _now(self, k: int, hyper: dict[str, Any], work: list[Work], factor: float, scaling: Scaling) -> Now:
        """What gradients are multiplied by on one device, computed there where the host cannot; counts are counted."""
        lr, cuda, device = hyper["lr"], work[0].p.is_cuda, work[0].p.device
        if not cuda or not (k in self._counting or scaling.squares is not None):
            gs = scaling.factor if cuda else factor
            return Now(
                -gs if self.param_groups[k]["maximize"] else gs, lr.item() if isinstance(lr, torch.Tensor) else lr
            )
        rooms, counts = self._rooms.setdefault(k, {}), [*dict.fromkeys(w.t for w in work)]
        live.rows(rows_cuda.PLAIN, hyper, self.param_groups[k], counts, scaling, device, rooms)
        row = rooms[device][:8].view(torch.float32)
        skip = None if scaling.inf is None else scaling.inf.to(device) != 0
        return Now(row[0], row[1], skip, scaling)

    def _check_apart(self, params: Iterable[torch.Tensor], call: str) -> None:
        """Once for every set of addresses."""
        params = list(params)
        places = {(p.data_ptr(), p.shape, p.stride()) for p in params}
        if len(places) < len(params) or not places <= self._apart:
            checks.apart(params, call)
            self._apart = places

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their dtypes whatever the weights are.

        Raises StateError or ShapeError, before anything is changed, for the state of another optimizer.
        """
        if self._home is not None:
            self._home.finish()
        states.load(self, state_dict, self._check_saved, partial(self._restore, before=self._state))

    @property
    def _named(self) -> str:
        return self._rule({"rank": None}).stem

    def _kept(self, p: torch.Tensor, group: dict[str, Any], call: str) -> states.Layout:
        return self._layout(group, self._hyper(group, call), p)

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        call, groups = f"{type(self).__name__}.load_state_dict", saved["param_groups"]
        for theirs, ours in zip(groups, self.param_groups, strict=True):
            for name in overrides.KEPT:
                if theirs.get(name, ours[name]) != ours[name]:
                    raise StateError(f"{call}: a group has {name} {theirs[name]!r}, this optimizer has {ours[name]!r}")
            group = {**ours, **theirs}
            hyper = self._hyper(group, call)
            for index, p in zip(theirs["params"], ours["params"], strict=True):
                self._check_param(group, hyper, p, call)
                if index in saved["state"]:
                    kept = self._layout(group, hyper, p)
                    states.check(kept, kept, saved["state"][index], f"{call}: state[{index}]")

    def _restore(self, saved: Mapping[str, Any], before: Mapping[Any, Any]) -> None:
        call = f"{type(self).__name__}.load_state_dict"
        self._forget()
        for group, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            hyper = self._hyper(group, call)
            for index, p in zip(theirs["params"], group["params"], strict=True):
                if index in saved["state"]:
                    self._put_back(self._layout(group, hyper, p), saved["state"][index], p, before)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        usual = {**self.takes, "codecs": dict.fromkeys(self.codable, self.usual), "block": None, "min_size": 4096}
        usual["maximize"] = False
        for group in self.param_groups:  # of a version that had none of these
            for name, value in usual.items():
                group.setdefault(name, value)


def _named(hyper: Hyper, key: str) -> Hyper:
    """The record under torch's word, which errors name."""
    return Hyper(**{**hyper.__dict__, "name": key})


def alike(work: Iterable[Work]) -> list[list[Work]]:
    """Matrices that one launch or product can take together, in their order."""
    groups: dict[Any, list[Work]] = {}
    for w in work:
        groups.setdefault((w.p.device, w.p.dtype, w.g.dtype, tuple(w.p.shape), w.kept), []).append(w)
    return list(groups.values())
