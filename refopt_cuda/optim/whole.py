"""Rules that measure whole tensors as torch.optim.Optimizers; `whole_names` has LAMB, LARS, Adafactor, CAME, Adam-mini.

A step is a few launches for all CUDA parameters of equal dtypes, on torch's current stream, without synchronisation;
CPU parameters are stepped by compiled loops. Both have the bits of `refopt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch

from refopt.rules import RULES
from refopt.spec import Rule
from refopt_cuda.kernels import whole_cuda, whole_host
from refopt_cuda.kernels.step_cuda import on_stream
from refopt_cuda.kernels.whole_rules import Form, Rows, form_of, rows
from refopt_cuda.optim import checks, gathered, overrides, sharded, states
from refopt_cuda.optim.checks import NUMBERS, Pair
from refopt_cuda.optim.eager import eager
from refopt_cuda.optim.run import words
from refopt_cuda.optim.settings import number

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Slot:
    """One parameter with its state; good until one of its tensors is moved or replaced."""

    def __init__(
        self, p: torch.Tensor, mode: Any, names: tuple[str, ...], keys: tuple[str, ...], entry: dict[str, Any]
    ):
        self.p, self.mode, self.entry = p, mode, entry
        self.kept: dict[str, torch.Tensor] = {n: entry[key] for n, key in zip(names, keys, strict=True)}
        self.watched: list[tuple[str, torch.Tensor, int]] = [(key, entry[key], entry[key].data_ptr()) for key in keys]
        self.place = p.data_ptr(), p.shape, p.stride(), p.dtype
        self.row_major = p.is_contiguous()
        self.tensor = self.tensor_of(p)

    def tensor_of(self, dense: torch.Tensor) -> whole_cuda.Tensor:
        """What a launch is bound to, the weights lying row-major in `dense`."""
        pointers = {n: x.data_ptr() for n, x in self.kept.items()}
        return whole_cuda.Tensor(dense.data_ptr(), pointers, tuple(dense.shape))

    def stale(self, mode: Any, entry: object) -> bool:
        p = self.p
        if entry is not self.entry or mode != self.mode or (p.data_ptr(), p.shape, p.stride(), p.dtype) != self.place:
            return True
        return any(self.entry.get(key) is not x or x.data_ptr() != where for key, x, where in self.watched)


class Work(NamedTuple):
    """One parameter's part in a step: the slot, the gradient, and the count that this step reaches."""

    slot: Slot
    g: torch.Tensor
    t: int

    @property
    def p(self) -> torch.Tensor:
        return self.slot.p

    @property
    def kind(self) -> tuple[int, bool]:
        """What the step's scalars depend on: the count, and whether there are fewer than two axes."""
        return self.t, self.slot.p.ndim < 2


class Launch:
    """One bound `Whole` and the tensors that it was bound to."""

    def __init__(self, form: Form, hyper: Mapping[str, Any], kind: tuple[torch.dtype, torch.dtype]) -> None:
        self.whole = whole_cuda.Whole(form, hyper, NUMBERS[kind[0]], NUMBERS[kind[1]])
        self.bound: list[whole_cuda.Tensor] = []

    def step(
        self, work: Sequence[Work], dense: Sequence[torch.Tensor], made: Mapping[tuple[int, bool], Rows], stream: int
    ) -> None:
        """Enqueue one step of these parameters, whose weights lie row-major in `dense`."""
        pairs = zip(work, dense, strict=True)
        tensors = [w.slot.tensor if w.slot.row_major else w.slot.tensor_of(p) for w, p in pairs]
        with on_stream(stream):  # table and scratch are copied and freed in the order of the launches that use them
            if tensors != self.bound:
                self.whole.bind(tensors)
                self.bound = tensors
        grads = [w.g.contiguous() for w in work]
        kinds = [w.kind for w in work]
        known = sorted(set(kinds))
        for k in range(0, len(known), whole_cuda.ROWS):
            some = known[k : k + whole_cuda.ROWS]
            pointers = [g.data_ptr() if kind in some else whole_cuda.SKIP for g, kind in zip(grads, kinds, strict=True)]
            which = [some.index(kind) if kind in some else 0 for kind in kinds]
            self.whole.run(pointers, [made[kind] for kind in some], which, stream)


class Whole(torch.optim.Optimizer):
    """What the classes of this module share.

    params    tensors or parameter groups, as for torch.optim; float32, bfloat16 or float16, gradients likewise
    words     the group's settings under torch's names; `NAMES` says what the rule calls each
    maximize  climb instead of descend
    ways      further arguments of torch's: foreach and fused are taken, and without meaning here

    States are float32, made in the first step: `state[p]["step"]`, which counts their steps, and those of the rule
    under its names or torch's own. Gradients with NaN or Inf propagate.

    Raises TypeError or ValueError that name the argument, ShapeError for a parameter that the rule cannot take, and
    StateError for a state that was altered; nothing is changed then. Parameters that share memory are refused, and so
    are steps that a CUDA graph captures.
    """

    stem: ClassVar[str]
    usual, coded = "f32", False
    NAMES: ClassVar[Mapping[str, str | tuple[str, ...]]]

    def __init__(
        self, params: Any, words: dict[str, Any], maximize: bool = False, ways: Mapping[str, Any] = NOTHING
    ) -> None:
        checks.ways(ways, type(self).__name__)
        self._launches: dict[Any, Launch] = {}
        self._slots: dict[torch.Tensor, Slot] = {}
        self._apart: list[tuple[Any, ...]] = []
        self.hyper({**words, "maximize": maximize}, type(self).__name__)
        super().__init__(params, {**words, "maximize": maximize, "format": states.FORMAT})

    @property
    def rule(self) -> Rule:
        """The record of the rule."""
        return RULES[self.stem]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group may have its own settings."""
        call = f"{type(self).__name__}.add_param_group"
        if isinstance(param_group, dict):
            self.hyper({**self.defaults, **param_group}, call)
        super().add_param_group(param_group)
        new = overrides.apart(self, self.param_groups.pop(), call, self.coded)
        for group in new:
            hyper = self.hyper(group, call)
            for p in group["params"]:
                checks.param(p, call)
                self._fits(tuple(p.shape), hyper, call)
        self.param_groups += new

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
                out[name] = number(value, word, call)
                replace(records[name], name=word).check(call, out[name])
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"{call}: maximize must be True or False, got {group['maximize']!r}")
        if self.rule.together is not None:
            self.rule.together(call, out)
        return self.rule.defaults() | out

    def _fits(self, shape: tuple[int, ...], hyper: dict[str, Any], call: str) -> None:
        if self.rule.fits is not None:
            self.rule.fits(f"{call}: a parameter", shape, hyper)

    def layout(self, p: torch.Tensor, hyper: dict[str, Any]) -> tuple[tuple[str, ...], states.Layout]:
        """The names of the states that are kept of a parameter, and where in `state[p]`."""
        shapes = self.rule.shapes(tuple(p.shape), hyper)
        keys = {s.name: s.torch or s.name for s in self.rule.states}
        parts = tuple((states.Part(keys[n], shape, torch.float32, 0.0),) for n, shape in shapes.items())
        return tuple(shapes), states.Layout((), parts)

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
            gathered.step(self, lambda: self._step(only), lambda p: self._slots.pop(p, None))
        else:
            self._step(only)
        return loss

    def _step(self, only: bool) -> None:
        """One step of whole parameters; `only`: the states that it would begin with, and no step."""
        call = f"{type(self).__name__}.step"
        hypers = [self.hyper(group, call) for group in self.param_groups]
        ready = []
        for hyper, group in zip(hypers, self.param_groups, strict=True):
            pairs = checks.gather(group["params"], call)
            checks.capture(pairs, None, call)
            mode = form_of(self.stem, hyper), hyper.get("blocks"), hyper.get("heads")
            ready.append([self._ready(pair, hyper, mode, call) for pair in pairs])
        self._check_apart([w.p for work in ready for w in work], call)
        for k, (hyper, group, work) in enumerate(zip(hypers, self.param_groups, ready, strict=True)):
            if only:
                self.state.update((w.p, w.slot.entry) for w in work)
            else:
                self._run(k, hyper | {"maximize": group["maximize"]}, work)

    def _ready(self, pair: Pair, hyper: dict[str, Any], mode: Any, call: str) -> Work:
        p, g = pair
        slot, entry = self._slots.get(p), self.state.get(p)
        if slot is None or slot.stale(mode, entry):
            self._fits(tuple(p.shape), hyper, call)
            names, kept = self.layout(p, hyper)
            slot = self._slots[p] = self._slot(p, mode, names, kept, states.ready(kept, entry, p, call))
        return Work(slot, g, slot.entry["step"] + 1)

    def _slot(
        self, p: torch.Tensor, mode: Any, names: tuple[str, ...], kept: states.Layout, entry: dict[str, Any]
    ) -> Slot:
        return Slot(p, mode, names, kept.keys, entry)

    def _check_apart(self, params: Sequence[torch.Tensor], call: str) -> None:
        """Once for every set of addresses."""
        places = [(p.data_ptr(), p.shape, p.stride(), p.dtype) for p in params]
        if places != self._apart:
            checks.apart(params, call)
            self._apart = places

    def _run(self, group: int, hyper: dict[str, Any], work: Iterable[Work]) -> None:
        """Step what was prepared, then count the step."""
        form = form_of(self.stem, hyper)
        made: dict[tuple[int, bool], Rows] = {}
        kinds: dict[Any, list[Work]] = {}
        for w in work:
            if w.kind not in made:
                made[w.kind] = rows(self.stem, *w.kind, hyper)
            if w.p.numel():
                kinds.setdefault((w.p.device, w.p.dtype, w.g.dtype), []).append(w)
        for (device, *dtypes), some in kinds.items():
            for k in range(0, len(some), whole_cuda.SIZES[-1]):
                batch = some[k : k + whole_cuda.SIZES[-1]]
                dense = [w.p if w.slot.row_major else w.p.contiguous() for w in batch]
                if device.type == "cuda":
                    blocks = hyper.get("blocks"), hyper.get("heads")
                    self._launch(device, (group, device, *dtypes, form, *blocks, k), hyper, batch, dense, made)
                else:
                    for w, p in zip(batch, dense, strict=True):
                        arrays = {n: words(x) for n, x in w.slot.kept.items()}
                        g = words(w.g.contiguous())
                        whole_host.step(form, hyper, words(p), g, arrays, tuple(p.shape), made[w.kind])
                for w, p in zip(batch, dense, strict=True):
                    if not w.slot.row_major:
                        w.p.copy_(p)
        for w in work:
            w.slot.entry["step"] = w.t
            self.state[w.p] = w.slot.entry

    def _launch(
        self,
        device: torch.device,
        key: Any,
        hyper: Mapping[str, Any],
        work: Sequence[Work],
        dense: Sequence[torch.Tensor],
        made: Mapping[tuple[int, bool], Rows],
    ) -> None:
        _, _, p_dtype, g_dtype, form, *_ = key
        with torch.cuda.device(device):
            if key not in self._launches:
                self._launches[key] = Launch(form, hyper, (p_dtype, g_dtype))
            self._launches[key].step(work, dense, made, torch.cuda.current_stream(device).cuda_stream)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states stay float32 whatever the weights are.

        Raises StateError or ShapeError, before anything is changed, for the state of another rule or of other shapes.
        """
        states.load(self, state_dict, self._check_saved, self._restore)

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        call, groups = f"{type(self).__name__}.load_state_dict", saved["param_groups"]
        for theirs, ours in zip(groups, self.param_groups, strict=True):
            hyper = self.hyper({**ours, **theirs}, call)
            for index, p in zip(theirs["params"], ours["params"], strict=True):
                if index in saved["state"]:
                    _, kept = self.layout(p, hyper)
                    states.check(kept, kept, saved["state"][index], f"{call}: state[{index}]")

    def _restore(self, saved: Mapping[str, Any]) -> None:
        for group, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            hyper = self.hyper(group, "")
            for index, p in zip(theirs["params"], group["params"], strict=True):
                if index in saved["state"]:
                    self.state[p] = states.restore(self.layout(p, hyper)[1], saved["state"][index], p)
        self._launches, self._slots, self._apart = {}, {}, []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._launches, self._slots, self._apart = {}, {}, []
