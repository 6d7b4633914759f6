"""What is stepped in shards and whole: rules, codecs, formats of weights, and shapes that break others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

import refopt_cuda as rc
from refopt_cuda.codecs import WEIGHTS
from tests.kernels.covering import CODECS, words_of
from tests.optim.pairs import CASES, Case, gradient, weights
from tests.optim.test_every_codec import ADAMW, MORE, SUFFIXES
from tests.optim.test_whole import CASES as WHOLE

SHAPES = [(31, 256), (33, 384), (16, 512), (7, 16), (1,), (4096, 16), (2, 2048), (5, 3, 320), (300,)]
"""Uneven rows, fewer rows than ranks, one element, LoRA's, a coded matrix of two rows, three dimensions, a vector."""
STEPS = 10


class Work(NamedTuple):
    """One optimizer over one parameter of each shape."""

    case: Any
    dtype: torch.dtype
    options: dict[str, Any]
    label: str
    shapes: Sequence[tuple[int, ...]] = tuple(SHAPES)

    def weights(self) -> list[torch.Tensor]:
        """The whole weights, on the CPU."""
        return [p.detach() for p in weights(self.shapes, self.dtype, "cpu", seed=7)]

    def make(self, params: Any) -> Any:
        """The optimizer; options under "params" go to the group."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*coupled")
            options = dict(self.options)
            groups = [{"params": list(params), **options.pop("params")}] if "params" in options else params
            return getattr(rc.optim, self.case.name)(groups, **(self.case.words | options))

    def __str__(self) -> str:
        return self.label


@cache
def gradients(shape: tuple[int, ...], dtype: torch.dtype, k: int, t: int) -> torch.Tensor:
    """The whole gradient of tensor `k` in step `t`, reduced."""
    return gradient(torch.empty(shape, dtype=dtype), 1000 * t + k)


def element_works() -> list[Work]:
    """Every T0 rule; every codec of states and every format of weights; each in one at least."""
    half, whole = torch.bfloat16, torch.float32
    out = [Work(ADAMW, half, {"codecs": codec}, f"AdamW-{codec}") for codec in CODECS]
    for text in words_of(WEIGHTS):
        out.append(Work(ADAMW, half, {"codecs": {"p": text, "v": "q4:64"}, "seed": 3}, f"AdamW-{text}-q4"))
    for case in MORE:
        for suffix in ("", *SUFFIXES):
            name = case.name + suffix
            label = f"{name}-amsgrad" if "amsgrad" in case.words else name
            out.append(Work(case._replace(name=name), whole, {}, label))
    return out + [Work(case, whole, {}, str(case)) for case in CASES]


def clipped_works() -> list[Work]:
    """With a norm over all gradients that is less than theirs."""
    words = {"codecs": {"p": "bf16_rem16", "m": "dynamic8", "v": "dynamic8"}, "max_grad_norm": 0.5}
    return [Work(ADAMW, torch.bfloat16, words, "AdamW-clipped")]


def whole_works() -> list[Work]:
    """Rules that see whole tensors: T1, over shapes of every number of axes, and T2, over matrices."""
    seen: dict[str, Any] = {str(case): case for case in WHOLE}
    out = [
        Work(case, torch.float32, {}, f"{label}-{k}", ((33, 300), (2, 5, 264), (257,), (1,)))
        for k, (label, case) in enumerate(seen.items())
    ]
    shapes = ((31, 64), (64, 48), (2, 512))
    out.append(Work(Case("Muon", "muon", {"lr": 0.02}), torch.float32, {}, "Muon", shapes))
    out.append(Work(Case("Muon", "muon", {"lr": 0.02}), torch.bfloat16, {}, "Muon-bf16", shapes))
    low = {"lr": 0.01, "rank": 4, "update_proj_gap": 4}
    for name in ("GaLoreAdamW", "GaLoreAdamW8bit", "APOLLOAdamW"):
        out.append(Work(Case(name, name, {}), torch.float32, {"params": low}, name, ((31, 64), (64, 48), (96, 512))))
    return out


def words(x: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8)


class Reference:
    """The same optimizer over whole tensors: its weights and states after some steps, as copies on the CPU."""

    def __init__(self, work: Work, device: str, steps: Sequence[int], grads: Any = None) -> None:
        params = [torch.nn.Parameter(x.to(device)) for x in work.weights()]
        opt, self.at = work.make(params), {}
        for t in range(max(steps)):
            for k, p in enumerate(params):
                p.grad = gradients(tuple(p.shape), p.dtype, k, t).to(device)
            opt.step()
            if t + 1 in steps:
                self.at[t + 1] = [{"p": p.detach().cpu().clone(), **_copied(opt.state[p])} for p in params]


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: x.detach().cpu().clone() if isinstance(x, torch.Tensor) else x for k, x in state.items()}
