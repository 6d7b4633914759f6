"""Optimizers in two places beside each other: pairs, steps and comparisons that tests of places share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.optim.pairs import ADAM, Case, give, weights

ADAMW = Case("AdamW", "adamw", ADAM | {"weight_decay": 0.11})
ADAMW8 = ADAMW._replace(name="AdamW8bit")
SMALL = [(64, 80), (33, 300), (300, 16), (40,), (), (0,), (16, 3, 40)]
PAGES = {"one block": 1, "a prime number of blocks": 7 * 520, "more than there is": 1 << 30}


def pair(
    case: Case, shapes: Any, dtype: torch.dtype, device: str, size: int = 4000, place: Any = "paged", **options: Any
) -> tuple[Any, Any]:
    """The same optimizer twice: states beside the weights, and in another place, a name or what a disk is told."""
    one, two = weights(shapes, dtype, device), weights(shapes, dtype, device)
    where = {"place": place} if isinstance(place, str) else place
    return case.make(one, **options), case.make(two, **options, **where, page_bytes=size)


def params_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def step(opt: Any, seed: int) -> None:
    give(params_of(opt), seed)
    opt.step()


def alike(one: Any, two: Any, steps: int = 3, start: int = 0) -> None:
    """Both take the same steps, compared in weights after each and in states after the last."""
    for t in range(start, start + steps):
        step(one, t)
        step(two, t)
        for k, (p, q) in enumerate(zip(params_of(one), params_of(two), strict=True)):
            assert torch.equal(p, q), f"tensor {k} {tuple(p.shape)}, step {t + 1}"
    for k, (p, q) in enumerate(zip(params_of(one), params_of(two), strict=True)):
        assert one.state[p].keys() == two.state[q].keys()
        for key, x in one.state[p].items():
            y = two.state[q][key]
            same = x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu()) if torch.is_tensor(x) else x == y
            assert same, f"{key} of tensor {k} {tuple(p.shape)}"


def pages_of(opt: Any) -> list[Any]:
    return [page for plan in opt._plans.values() for book in plan.books.values() for page in book.pages]


def owned(opt: Any) -> list[bool]:
    """Of each parameter with states: whether they lie in the slabs."""
    decks = list(opt._home.decks.values())
    return [any(d.owns(opt.state[p]) for d in decks) for p in params_of(opt) if len(opt.state[p]) > 1 and p.numel()]


def tensors(opt: Any) -> list[torch.Tensor]:
    return [x for p in params_of(opt) for x in opt.state[p].values() if torch.is_tensor(x)]


def model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(80, 96), torch.nn.GELU(), torch.nn.Linear(96, 300), torch.nn.Linear(300, 16)]
    return torch.nn.Sequential(*layers).to(device, dtype)


def loss(net: Any, seed: int) -> torch.Tensor:
    first = next(net.parameters())
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(seed)).to(first.device, first.dtype)
    return net(x).square().mean()


def backward(net: Any, seed: int) -> None:
    loss(net, seed).backward()


def trained(net: Any, opt: Any, steps: int, after: Callable[[], Any] = lambda: None) -> None:
    for t in range(steps):
        opt.zero_grad()
        backward(net, t)
        after()
        opt.step()
