"""A run that changes its optimizer in the middle: the same weights under another library's, one step further."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from refopt_cuda.convert.walk import places
from tests.optim.pairs import give, weights

SHAPES = [(64, 256), (64, 80), (9,)]
"""Whole blocks; rows that are none; never coded."""
ALIGNED = [0, 2]
"""Those whose states pass bit for bit."""


def run(
    make: Callable[[Any], Any], dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, device: str = "cpu"
) -> Any:
    """An optimizer after two steps."""
    params = weights(shapes, dtype, device)
    opt = make(params)
    for t in range(2):
        give(params, t)
        opt.step()
    return opt


def filled(make: Callable[[Any], Any], dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, seed: int = 0) -> Any:
    """An optimizer of ours that was never stepped, with states of random codes and numbers, at step 2."""
    opt, random = make(weights(shapes, dtype, "cpu")), torch.Generator().manual_seed(seed)
    saved = opt.state_dict()
    for place in places(opt):
        drawn = {part.key: draw(part.shape, part.dtype, random) for part in place.layout.all}
        saved["state"][place.number] = {"step": 2, **drawn}
    opt.load_state_dict(saved)
    return opt


def draw(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    """Any code (-128 is none); numbers from 1/2 to 3/2."""
    if dtype.is_floating_point:
        return (torch.rand(shape, generator=random) + 0.5).to(dtype)
    low = 0 if dtype == torch.uint8 else -torch.iinfo(dtype).max
    return torch.randint(low, torch.iinfo(dtype).max + 1, shape, dtype=torch.int32, generator=random).to(dtype)


def twins(opt: Any) -> list[Any]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params_of(opt)]


def params_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def quietly(call: Callable[..., Any], *args: Any, **words: Any) -> tuple[Any, list[str]]:
    """(what it returns, its warnings)."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = call(*args, **words)
    return out, [str(w.message) for w in seen]


def step_both(one: Any, other: Any, seed: int = 9) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The next step of both: how far their weights part, and the spacing of float32 at the largest of the old weight,
    the new one and their difference."""
    sides = params_of(one), params_of(other)
    before = [p.detach().float().cpu().clone() for p in sides[0]]
    for side in sides:
        give(side, seed)
    one.step()
    other.step()
    pairs = [[p.detach().float().cpu() for p in pair] for pair in zip(*sides, strict=True)]
    apart = [(p - q).abs().numpy() for p, q in pairs]
    sizes = [torch.stack([old, q, q - old]).abs().amax(0) for old, (_, q) in zip(before, pairs, strict=True)]
    return apart, [np.spacing(size.numpy()) for size in sizes]


def same_tree(one: Any, other: Any, where: str = "") -> None:
    """Assert that two state dicts hold the same bits."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            same_tree(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            same_tree(a, b, f"{where}[{k}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other), where
    else:
        assert one == other, where


def frozen(opt: Any, call: Callable[[], Any]) -> Any:
    """What `call` returns; `opt` is as it was."""
    before = copy.deepcopy(opt.state_dict())
    out = call()
    same_tree(opt.state_dict(), before)
    return out
