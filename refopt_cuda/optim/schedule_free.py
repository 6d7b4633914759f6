"""`ScheduleFreeAdamW`: AdamW whose average of weights stands in for a schedule, with the words of schedulefree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from refopt.rules import RULES
from refopt.spec import Rule, State, StateError
from refopt_cuda.codecs import named
from refopt_cuda.kernels import step_cuda, step_host
from refopt_cuda.optim import names, states
from refopt_cuda.optim.checks import NUMBERS
from refopt_cuda.optim.matrix import MatrixOptimizer, Work
from refopt_cuda.optim.run import words as memory
from refopt_cuda.optim.settings import Coding
from refopt_cuda.rules import form_of
from refopt_cuda.rules.schedule_free import Past, following

__all__ = [
    "ScheduleFreeAdamW",
    "ScheduleFreeAdamW4bit",
    "ScheduleFreeAdamW8bit",
    "ScheduleFreeAdamW32bit",
    "ScheduleFreeAdamWFp8",
]

FORM, FLOAT = form_of("schedule_free", {}), named("f32")
WORDS: Mapping[str, tuple[str, int | None]] = {
    "lr": ("lr", None),
    "beta1": ("betas", 0),
    "beta2": ("betas", 1),
    "eps": ("eps", None),
    "wd": ("weight_decay", None),
    "r": ("r", None),
    "lr_power": ("weight_lr_power", None),
    "warmup": ("warmup_steps", None),
}


class ScheduleFreeAdamW(MatrixOptimizer):
    """Schedule-Free AdamW (Defazio et al., arXiv 2405.15682), as schedulefree.AdamWScheduleFree.

    params           tensors or parameter groups; float32, bfloat16 or float16, gradients likewise
    lr               step length, >= 0; no schedule lowers it
    betas            share of the average in the weights that are stepped; decay of the second moment; each in [0, 1)
    eps              added to the root of the second moment
    weight_decay     joins the step, at the weights that are stepped
    warmup_steps     steps in which the rate grows to lr
    r                exponent of the step count in the weight of a step
    weight_lr_power  exponent of the largest rate in the weight of a step
    options          by keyword: codecs, of the second moment ("dynamic8", or {"v": ...}), block, min_8bit_size,
                     overrides, maximize, max_grad_norm and gnorm_scale as for `Composed`

    Weights are those to step; `eval()` makes them those to judge and to keep, `train()` brings them back, both to
    rounding: with bfloat16 weights that is theirs. One begins with weights to step; the group's `train_mode` says which
    they are, and a checkpoint holds it, so that weights must be saved beside it. Steps have the bits of `refopt`.

    State: `step`, `z`, the base that steps, float32; `exp_avg_sq`, or "v.codes" and "v.scales"; and two numbers,
    `weight_sum` and `lr_max`. CUDA tensors take one launch for each combination of dtypes; nothing waits.

    Raises TypeError or ValueError that name the argument, and StateError for a state that was altered and for a step in
    evaluation; nothing is changed then.
    """

    codable: ClassVar[Mapping[str, State]] = {"v": State("v", "second moment", nonnegative=True, torch="exp_avg_sq")}

    def __init__(
        self,
        params: Any,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Any,
    ) -> None:
        if options.pop("capturable", False):
            raise ValueError(
                f"{type(self).__name__}: capturable=True: the host weighs each step by powers and adds the weights up, "
                "which a CUDA graph cannot repeat"
            )
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "r": r}
        defaults |= {"warmup_steps": warmup_steps, "weight_lr_power": weight_lr_power, "train_mode": True}
        super().__init__(params, defaults, options)

    def _forget(self) -> None:
        super()._forget()
        self._launches: dict[Any, tuple[step_cuda.Launch, list[step_cuda.Tensor]]] = {}

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["schedule_free"]

    def _words(self, group: Mapping[str, Any]) -> Mapping[str, tuple[str, int | None]]:
        return WORDS

    def _layout(self, group: Mapping[str, Any], hyper: Mapping[str, Any], p: Tensor) -> states.Layout:
        inner, shape = self._inner(group, p, tuple(p.shape)), tuple(p.shape)
        z = (states.Part("z", shape, torch.float32, 0.0),)
        return states.Layout((Coding(FLOAT, 0), *inner.codings), (z, *inner.parts))

    @torch.no_grad()
    def train(self) -> None:
        """Make the weights those to step, as they are at first. Nothing is done where they are."""
        for p, z, beta1 in self._turned(True, "train"):
            x = p.float()
            p.copy_(x + (z - x) * (1.0 - beta1))

    @torch.no_grad()
    def eval(self) -> None:
        """Make the weights those to judge and to keep, the average. Nothing is done where they are.

        Raises ValueError for betas[0] = 0, with which the weights hold nothing of the average.
        """
        for p, z, beta1 in self._turned(False, "eval"):
            y = p.float()
            p.copy_(y + (z - y) * (1.0 - 1.0 / beta1))

    def _turned(self, train: bool, name: str) -> list[tuple[Tensor, Tensor, float]]:
        """The parameters of groups whose weights are not so yet, with their bases and beta1; the groups are told."""
        call, out = f"{type(self).__name__}.{name}", []
        for group in self.param_groups:
            beta1 = self._hyper(group, call)["beta1"]
            if not train and not beta1 > 0:
                raise ValueError(f"{call}: betas[0] must be > 0, got {beta1!r}: weights hold nothing of the average")
            if group["train_mode"] != train:
                out += [(p, self.state[p]["z"], beta1) for p in group["params"] if "z" in self.state.get(p, {})]
        for group in self.param_groups:
            group["train_mode"] = train
        return out

    def _step(self, only: bool) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise StateError(f"{type(self).__name__}.step: the weights are those to judge; call train() before")
        super()._step(only)

    def _run(self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work]) -> None:
        kinds: dict[Any, list[Work]] = {}
        for w in work:
            if "weight_sum" not in w.state:
                w.state["z"].copy_(w.p)
            plain = isinstance(w.now.gs, float)
            w = w._replace(g=(w.g if plain else w.gradient).contiguous())
            kinds.setdefault((w.t, _past(w.state), w.kept.codings[1], w.p.device, w.p.dtype, w.g.dtype), []).append(w)
        for number, ((t, past, coding, *_), some) in enumerate(kinds.items()):
            gs = some[0].now.gs
            row, after = following(past, t, **hyper, gscale=gs if isinstance(gs, float) else 1.0)
            dense = [w.p.contiguous() for w in some]
            if some[0].p.is_cuda:
                self._launch((number, id(group)), dense, some, coding, row)
            else:
                for p, w in zip(dense, some, strict=True):
                    _on_cpu(p, w, coding, row)
            for p, w in zip(dense, some, strict=True):
                w.state.update(after._asdict())
                if p is not w.p:
                    w.p.copy_(p)

    def _launch(self, key: Any, dense: Sequence[Tensor], some: Sequence[Work], coding: Coding, row: Any) -> None:
        """Launches on torch's current stream, bound to tensors that nearly always are those of the step before."""
        device, kind = some[0].p.device, (dense[0].dtype, some[0].g.dtype)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            for low in range(0, len(some), step_cuda.SIZES[-1]):
                part = slice(low, low + step_cuda.SIZES[-1])
                tensors = [
                    step_cuda.Tensor(p.data_ptr(), _addresses(w, coding), tuple(p.shape))
                    for p, w in zip(dense[part], some[part], strict=True)
                ]
                where = (*key, low, device, coding, *kind)
                launch, bound = self._launches.get(where, (None, []))
                if launch is None:
                    forms, blocks = (FLOAT, coding.form), (256, coding.block or 256)
                    launch = step_cuda.Launch(FORM, forms, NUMBERS[kind[0]], NUMBERS[kind[1]], blocks)
                if tensors != bound:
                    with step_cuda.on_stream(stream):
                        launch.bind(tensors)
                    self._launches[where] = launch, tensors
                launch.run([w.g.data_ptr() for w in some[part]], row[None], None, stream, [0])

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        call = f"{type(self).__name__}.load_state_dict"
        for index, entry in saved["state"].items():
            for name in Past._fields:
                x = entry.get(name, 0.0)
                if isinstance(x, bool) or not isinstance(x, int | float) or not (x >= 0 or math.isnan(x)):
                    raise StateError(f"{call}: state[{index}]: {name!r} must be a number >= 0, got {x!r}")
        super()._check_saved(_without(saved))

    def _restore(self, saved: Mapping[str, Any], before: Mapping[Any, Any]) -> None:
        super()._restore(_without(saved), before)
        for group, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            for index, p in zip(theirs["params"], group["params"], strict=True):
                have = saved["state"].get(index, {})
                if p in self.state:
                    self.state[p].update({name: have[name] for name in Past._fields if name in have})


def _past(state: Mapping[str, Any]) -> Past:
    """What the steps so far have left of a parameter."""
    return Past(*(state.get(name, 0.0) for name in Past._fields))


def _without(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors and counts alone."""
    state = {k: {n: x for n, x in entry.items() if n not in Past._fields} for k, entry in saved["state"].items()}
    return {**saved, "state": state}


def _tensors(w: Work, coding: Coding) -> list[list[Tensor]]:
    """What each state is kept in."""
    v = ["v.codes", "v.scales"] if coding.form.scaled else ["exp_avg_sq"]
    return [[w.state["z"]], [w.state[key] for key in v]]


def _addresses(w: Work, coding: Coding) -> tuple[tuple[int, int], ...]:
    return tuple((ts[0].data_ptr(), ts[1].data_ptr() if len(ts) > 1 else 0) for ts in _tensors(w, coding))


def _on_cpu(p: Tensor, w: Work, coding: Coding, row: Any) -> None:
    """One parameter, by the compiled loops."""
    arrays = [dict(zip(("codes", "scales"), map(memory, ts), strict=False)) for ts in _tensors(w, coding)]
    forms, blocks = (FLOAT, coding.form), (256, coding.block or 256)
    step_host.step(FORM, forms, memory(p), memory(w.g), arrays, tuple(p.shape), blocks, row)


ScheduleFreeAdamW8bit, ScheduleFreeAdamW4bit, ScheduleFreeAdamWFp8, ScheduleFreeAdamW32bit = names.kept(
    ScheduleFreeAdamW, __name__
)
