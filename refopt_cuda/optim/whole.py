"""Rules that measure whole tensors as torch.optim.Optimizers; `whole_names` has LAMB, LARS, Adafactor, CAME, Adam-mini.

A step is a few launches for all CUDA parameters of equal dtypes, on torch's current stream, without synchronisation;
CPU parameters are stepped by compiled loops. Both have the bits of `refopt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch

from refopt.rules import RULES
from refopt.spec import Rule, StateError
from refopt_cuda.codecs import named
from refopt_cuda.kernels import whole_cuda, whole_host
from refopt_cuda.kernels.whole_rules import Form, form_of, forms, rows
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
)
from refopt_cuda.optim.checks import Pair
from refopt_cuda.optim.coded import Direct, Room
from refopt_cuda.optim.eager import eager
from refopt_cuda.optim.housed import Housed
from refopt_cuda.optim.live import Scaling
from refopt_cuda.optim.run import words as memory
from refopt_cuda.optim.settings import Coding, check_group, codec_names, number
from refopt_cuda.optim.whole_launch import Launch, Made
from refopt_cuda.optim.whole_places import Shelf
from refopt_cuda.optim.whole_slots import Slot, Work, batches, kept

FLOAT = Coding(named("f32"), 0)
Kept = tuple[int, Any, int | None]
"""bitsandbytes' words on how states are kept: optim_bits, args, min_8bit_size; None where only a keyword says it."""


class Whole(Housed):
    """What the classes of `whole_names` share.

    params    tensors or parameter groups, as for torch.optim; float32, bfloat16 or float16, gradients likewise
    words     the group's settings under torch's names; `NAMES` says what the rule calls each
    maximize  climb instead of descend
    options   further arguments by keyword:
              codecs         one for every state of an entry a weight, or {state: codec}; row and column factors, and
                             values of a block, stay float32
              block          elements that share a scale; by default each codec's own
              min_8bit_size  smaller matrices, vectors below 65,536 elements, and rows below 16 keep float32 states
              overrides      {pattern of names: settings}
              place          "resident", "paged", "host" or "disk", as for `Composed`; states of a tensor travel
                             together, so that places of the ring, or of the host, are as large as the largest tensor
                             that passes through them. page_bytes, resident_bytes, path, keep_weights: likewise
              max_grad_norm, gnorm_scale, capturable   as for `Composed`
              foreach, fused   torch's; taken, and without meaning here

    States are made in the first step: `state[p]["step"]`, which counts their steps, and those of the rule under its
    names or torch's own, "<name>.codes" and "<name>.scales" where they are coded. Coded states are decoded for the
    step, of 16 million elements or of one tensor at a time; with `capturable`, in memory that stays. Gradients with NaN
    or Inf propagate.

    Raises TypeError or ValueError that name the argument, ShapeError for a parameter that the rule cannot take, and
    StateError for a state that was altered; nothing is changed then. Parameters that share memory are refused, and so
    are steps that a CUDA graph captures without `capturable`.
    """

    stem: ClassVar[str]
    usual: ClassVar[str | None] = None
    coded = True
    NAMES: ClassVar[Mapping[str, str | tuple[str, ...]]]

    def __init__(
        self,
        params: Any,
        words: dict[str, Any],
        maximize: bool,
        options: Mapping[str, Any],
        kept: Kept = (32, None, None),
    ) -> None:
        call, (bits, args, min_size) = type(self).__name__, kept
        takes: dict[str, Any] = {"codecs": None, "block": None, "overrides": None, **dialect.LIVE}
        takes |= {**whole_places.OPTIONS, **({"min_8bit_size": 4096} if min_size is None else {})}
        more = dialect.further(call, options, takes, args)
        self._house(more, call)
        live.check(more["gnorm_scale"], more["max_grad_norm"], call)
        patterns, codecs = more.pop("overrides"), more.pop("codecs")
        if patterns is not None:
            known = {*words, *more, "codecs", "min_size", "maximize", *dialect.SAME.get(self.stem, {})}
            params = overrides.of_class(params, patterns, known, call)
        more["min_size"] = dialect.size(call, more.pop("min_8bit_size", min_size))
        roles = [s.name for s in self.rule.states if s.name in self._codable]
        more["codecs"] = self._table(codecs, dict.fromkeys(roles, dialect.usual(call, self.usual, bits) or "f32"), call)
        self._forget()
        self._check({**words, **more, "maximize": maximize}, call)
        super().__init__(params, {**words, **more, "maximize": maximize, "format": states.FORMAT})

    def _forget(self) -> None:
        """What steps have found out and bound so far."""
        self._launches: dict[Any, Launch] = {}
        self._slots: dict[torch.Tensor, Slot] = {}
        self._shelves: dict[int, Shelf] = {}
        self._apart: list[tuple[Any, ...]] = []
        self._counting: set[int] = set()
        self._rooms: dict[int, dict[torch.device, torch.Tensor]] = {}
        self._room, self._direct = Room(), Direct()
        self._memory = norms.Memory.after(self)

    @property
    def rule(self) -> Rule:
        """The record of the rule."""
        return RULES[self.stem]

    @property
    def _codable(self) -> set[str]:
        """States that have an entry a weight under some settings."""
        return {name for form in forms(self.stem) for name in form.elements}

    def _table(self, given: Any, usual: Mapping[str, str], call: str) -> dict[str, str]:
        """A codec for each state that may have one; ValueError for the others, and for the weights."""
        if isinstance(given, Mapping):
            for role in given.keys() & ({s.name for s in self.rule.states} | {"p"}) - self._codable:
                why = "these rules step weights as they are" if role == "p" else "a number a row is kept in float32"
                raise ValueError(f"{call}: codecs[{role!r}]: {why}; of {self.stem} {', '.join(usual)} may be coded")
        table = codec_names(self.rule, given, usual, call)
        return {name: text for name, text in table.items() if name in usual}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group may have its own settings."""
        call = f"{type(self).__name__}.add_param_group"
        if isinstance(param_group, dict):
            param_group = dialect.group(call, param_group, self.stem)
            table = self._table(param_group.get("codecs"), self.defaults["codecs"], call)
            param_group = {**param_group, "codecs": table}
            self._check({**self.defaults, **param_group}, call)
        super().add_param_group(param_group)
        new = overrides.apart(self, self.param_groups.pop(), call)
        for group in new:
            hyper = self.hyper(group, call)
            for p in group["params"]:
                checks.param(p, call)
                self._fits(tuple(p.shape), hyper, call)
        self.param_groups += new

    def _check(self, group: Mapping[str, Any], call: str) -> dict[str, Any]:
        """The hyper-parameters of a group whose settings can be."""
        check_group(self.rule, group, call)
        placing.refuse(self._placed, group["capturable"], group["max_grad_norm"], call)
        return self.hyper(group, call)

    def hyper(self, group: Mapping[str, Any], call: str) -> dict[str, Any]:
        """The rule's hyper-parameters from a group, checked under the names that the group has for them."""
        records, out = {h.name: h for h in self.rule.hypers}, {}
        for key, ours in self.NAMES.items():
            names, values = (ours,) if isinstance(ours, str) else ours, group[key]
            if isinstance(ours, str):
                values = (values,)
            elif not isinstance(values, tuple | list) or len(values) != len(ours):
                raise ValueError(f"{call}: {key} must be {len(ours)} numbers, got {values!r}")
            for k, (name, value) in enumerate(zip(names, values, strict=True)):
                word = key if isinstance(ours, str) else f"{key}[{k}]"
                out[name] = number(value, word, call, word == "lr" and group["capturable"])
                if not isinstance(out[name], torch.Tensor):
                    replace(records[name], name=word).check(call, out[name])
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"{call}: maximize must be True or False, got {group['maximize']!r}")
        if self.rule.together is not None:
            self.rule.together(call, {n: 1.0 if isinstance(x, torch.Tensor) else x for n, x in out.items()})
        return self.rule.defaults() | out

    def _fits(self, shape: tuple[int, ...], hyper: dict[str, Any], call: str) -> None:
        if self.rule.fits is not None:
            self.rule.fits(f"{call}: a parameter", shape, hyper)

    def layout(
        self, p: torch.Tensor, hyper: dict[str, Any], group: Mapping[str, Any]
    ) -> tuple[tuple[str, ...], states.Layout]:
        """The names of the states that are kept of a parameter, and where in `state[p]`."""
        shapes = self.rule.shapes(tuple(p.shape), hyper)
        own = overrides.settings_of(p)
        own = {name: own.get(name, group[name]) for name in overrides.KEPT}
        codecs = own["codecs"]
        own["codecs"] = {
            **group["codecs"],
            **(codecs if isinstance(codecs, Mapping) else dict.fromkeys(shapes, codecs)),
        }
        found = []
        for state in (s for s in self.rule.states if s.name in shapes):
            if shapes[state.name] == tuple(p.shape) and state.name in group["codecs"]:
                one = states.layout_of([state], own, p)
                found.append((state.name, one.codings[0], one.parts[0]))
            else:
                key = state.torch or state.name
                found.append((state.name, FLOAT, (states.Part(key, shapes[state.name], torch.float32, 0.0),)))
        names, codings, parts = zip(*found, strict=True)
        return names, states.Layout(codings, parts)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves it to the step to divide and to skip; not where parameters are sharded,
        of which each is stepped by itself, nor where the host has to know."""
        return self._placed.place not in ("host", "disk") and not gathered.any_sharded(self)

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
            gathered.step(self, lambda: self._step(only), lambda p: self._slots.pop(p, None))
        else:
            self._step(only)
        return loss

    def _step(self, only: bool) -> None:
        """One step of whole parameters; `only`: the states that it would begin with, and no step."""
        call = f"{type(self).__name__}.step"
        scaling = live.scaling_of(self, call)
        hypers = [self.hyper(group, call) for group in self.param_groups]
        if scaling.skip:
            return
        numbers = self._begin(call)
        ready = [self._prepare(k, hyper, scaling, numbers, call) for k, hyper in enumerate(hypers)]
        self._check_apart([w.p for work in ready for w in work], call)
        if only:
            self._state.update((w.p, w.slot.entry) for work in ready for w in work)
            return
        if scaling.longest is not None:
            ready = [[w._replace(g=w.g.contiguous()) for w in work] for work in ready]
            every = [w for work in ready for w in work]
            scaling = self._memory.norms.measure([w.g for w in every], scaling, call, [w.p for w in every])
        for k, work in enumerate(ready):  # launches are bound to this room: it is as large as it will be
            for some in batches(work) if self.param_groups[k]["capturable"] else ():
                self._room.begin(kept(some))
        for k, (hyper, work) in enumerate(zip(hypers, ready, strict=True)):
            self._run(k, hyper, work, scaling)
        if self._home is not None:
            self._home.stepped(self._shelves.values(), self._state, numbers, self._named)
        self._room.settle()
        if checks.capturing():
            launches = [launch.memory for launch in self._launches.values()]
            self._memory.keep(
                [*launches, dict(self._slots), [dict(room) for room in self._rooms.values()], self._room.held]
            )

    def _prepare(
        self, k: int, hyper: dict[str, Any], scaling: Scaling, numbers: Mapping[int, int], call: str
    ) -> list[Work]:
        """Everything that a group's step needs, checked; states that are missing are made but not yet given."""
        group = self.param_groups[k]
        pairs = checks.gather(group["params"], call)
        checks.capture(pairs, group["capturable"], call)
        if group["capturable"] or scaling.foreign:
            self._counting.add(k)
        kept = tuple(group["codecs"].items()), group["block"], group["min_size"]
        mode = form_of(self.stem, hyper), hyper.get("blocks"), hyper.get("heads"), kept
        work = [self._ready(pair, hyper, mode, k, call, numbers.get(id(pair[0]), 0)) for pair in pairs]
        if self._home is not None:
            shelf = self._shelves.setdefault(k, Shelf())
            shelf.slots = {id(p): self._slots[p] for p in group["params"] if p in self._slots}
            self._home.arrange(shelf, call)
        return live.counted(work, group["params"], self._state) if k in self._counting else work

    def _ready(self, pair: Pair, hyper: dict[str, Any], mode: Any, k: int, call: str, number: int = 0) -> Work:
        p, g = pair
        slot, entry, counting = self._slots.get(p), self._state.get(p), k in self._counting
        if slot is None or slot.stale(mode, entry, number):
            live.refuse_in_capture("states")
            overrides.refuse_late(self, p, call)
            self._fits(tuple(p.shape), hyper, call)
            names, kept = self.layout(p, hyper, self.param_groups[k])
            ready = (self._home or states).ready
            entry = live.ready(kept, entry, p, call, ready) if counting else ready(kept, entry, p, call)
            slot = self._slots[p] = Slot(p, mode, names, kept, entry, number)
        step = slot.entry["step"]
        return Work(slot, g, step if counting and p.is_cuda else int(step) + 1)

    def _check_apart(self, params: Sequence[torch.Tensor], call: str) -> None:
        """Once for every set of addresses."""
        places = [(p.data_ptr(), p.shape, p.stride(), p.dtype) for p in params]
        if places != self._apart:
            checks.apart(params, call)
            self._apart = places

    def _run(self, k: int, hyper: dict[str, Any], work: list[Work], scaling: Scaling) -> None:
        """Step what was prepared, then count the step."""
        hyper = hyper | {"maximize": self.param_groups[k]["maximize"]}
        factor, skip = scaling.on_host if any(not w.p.is_cuda for w in work) else (1.0, False)
        if skip:
            work = [w for w in work if w.p.is_cuda]
        form, made = form_of(self.stem, hyper), dict[torch.device, Made]()
        for device in dict.fromkeys(w.p.device for w in work):
            some = [w for w in work if w.p.device == device]
            made[device] = self._made(k, form, hyper, some, factor, scaling)
        away = {w.slot: w for w in work if self._home is not None and self._home.holds(w.slot)}
        stays = self.param_groups[k]["capturable"]
        step = partial(self._pass, form=form, hyper=hyper, inf=scaling.inf, stays=stays)
        step(self._launches, (k,), [w for w in work if w.slot not in away], made)
        if away:

            def run(launches: Any, key: tuple[Any, ...], some: list[Work], rows_: Made) -> None:
                step(launches, key, some, dict.fromkeys((w.p.device for w in some), rows_))

            self._home.step(self._shelves[k], run, list(away.values()), made)
        for w in work:
            w.slot.entry["step"] = w.t
            self._state[w.p] = w.slot.entry

    def _pass(
        self,
        launches: dict[Any, Launch],
        key: tuple[Any, ...],
        work: list[Work],
        made: Mapping[torch.device, Made],
        form: Form,
        hyper: Mapping[str, Any],
        inf: torch.Tensor | None,
        stays: bool,
    ) -> None:
        """Step parameters whose states lie where they can be stepped, so many at a time as may be decoded; `stays`: at
        the same places in every step."""
        for number_, some in enumerate(batches(work)):
            some = [w for w in some if w.p.numel()]
            if stays:
                self._room.begin(kept(some))
            rooms = [self._room if stays and w.p.is_cuda else self._direct for w in some]
            opened = [w._replace(slot=w.slot.opened(room)) for w, room in zip(some, rooms, strict=True)]
            self._turn(launches, (number_, *key), form, hyper, opened, made)
            for w in opened:
                w.slot.put(None if inf is None or not w.p.is_cuda else inf.to(w.p.device) != 0)

    def _made(
        self,
        k: int,
        form: Form,
        hyper: dict[str, Any],
        work: Sequence[Work],
        factor: float,
        scaling: Scaling,
    ) -> Made:
        """The rows of a group's step on one device: computed there where the host cannot."""
        kinds, cuda, device = dict.fromkeys(w.kind for w in work), work[0].p.is_cuda, work[0].p.device
        if cuda and (k in self._counting or scaling.squares is not None):
            counts, rooms = [*dict.fromkeys(t for t, _ in kinds)], self._rooms.setdefault(k, {})
            return live.rows(form, hyper, self.param_groups[k], counts, scaling, device, rooms)
        now = hyper | {"gscale": scaling.factor if cuda else factor}
        if isinstance(now["lr"], torch.Tensor):
            now["lr"] = now["lr"].item()
        return {kind: rows(self.stem, *kind, now) for kind in kinds}

    @staticmethod
    def _turn(
        launches: dict[Any, Launch],
        key: tuple[Any, ...],
        form: Form,
        hyper: Mapping[str, Any],
        work: Sequence[Work],
        made: Mapping[torch.device, Made],
    ) -> None:
        """Step parameters whose states are open: launches on devices, loops on the CPU."""
        kinds: dict[Any, list[Work]] = {}
        for w in work:
            w.slot.take()
            if w.p.is_cuda:
                kinds.setdefault((w.p.device, w.p.dtype, w.g.dtype), []).append(w)
            else:
                arrays = {n: memory(x) for n, x in w.slot.values.items()}
                g, rows_of = memory(w.g.contiguous()), cast(Any, made[w.p.device])[w.kind]
                whole_host.step(form, hyper, memory(w.slot.dense), g, arrays, tuple(w.p.shape), rows_of)
        blocks = hyper.get("blocks"), hyper.get("heads")
        for (device, *dtypes), some in kinds.items():
            for at in range(0, len(some), whole_cuda.SIZES[-1]):
                where = (device, *dtypes, form, *blocks, at, *key)
                with torch.cuda.device(device):
                    if where not in launches:
                        live.refuse_in_capture("kernels")
                        launches[where] = Launch(form, hyper, (dtypes[0], dtypes[1]))
                    stream = torch.cuda.current_stream(device).cuda_stream
                    launches[where].step(some[at : at + whole_cuda.SIZES[-1]], made[device], stream)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but codes stay codes and float32 states stay float32 whatever the weights are.

        Raises StateError or ShapeError, before anything is changed, for the state of another rule, of other codecs or
        of other shapes.
        """
        if self._home is not None:
            self._home.finish()
        states.load(self, state_dict, self._check_saved, partial(self._restore, before=self._state))

    @property
    def _named(self) -> str:
        return self.stem

    def _kept(self, p: torch.Tensor, group: dict[str, Any], call: str) -> states.Layout:
        return self.layout(p, self.hyper(group, call), group)[1]

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        call, groups = f"{type(self).__name__}.load_state_dict", saved["param_groups"]
        for k, (theirs, ours) in enumerate(zip(groups, self.param_groups, strict=True)):
            for name in overrides.KEPT:
                if theirs.get(name, ours[name]) != ours[name]:
                    raise StateError(
                        f"{call}: group {k} has {name} {theirs[name]!r}, this optimizer has {ours[name]!r}"
                    )
            group = {**ours, **theirs}
            hyper = self._check(group, call)
            for index, p in zip(theirs["params"], ours["params"], strict=True):
                if index in saved["state"]:
                    _, kept = self.layout(p, hyper, group)
                    states.check(kept, kept, saved["state"][index], f"{call}: state[{index}]")

    def _restore(self, saved: Mapping[str, Any], before: Mapping[Any, Any]) -> None:
        for group, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            hyper = self.hyper(group, "")
            for index, p in zip(theirs["params"], group["params"], strict=True):
                if index in saved["state"]:
                    self._put_back(self.layout(p, hyper, group)[1], saved["state"][index], p, before)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        usual = dict.fromkeys(self._codable, self.usual or "f32")
        for group in self.param_groups:  # of a version that had none of these
            for name, value in {**dialect.LIVE, "codecs": usual, "block": None, "min_size": 4096}.items():
                group.setdefault(name, value)
