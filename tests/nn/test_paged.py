"""Adapters over 4-bit weights with states that are paged: the bits of resident states, saved, loaded and merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from refopt_cuda import optim
from refopt_cuda.nn import LoRALinear, adapt, merge, prepare

PAGED = [n for n in dir(optim) if n.startswith("Paged")]
CASES: list[Any] = [("cpu", n) for n in ("PagedAdamW", "PagedAdamW8bit", "PagedLion8bit")]
"""On a CPU those whose loops other tests compile; the others take seconds each."""
CASES += [pytest.param("cuda", n, marks=pytest.mark.gpu) for n in PAGED]


def model(device: str) -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))
    return adapt(prepare(made, device=device), r=8)


def optimizer(name: str, net: nn.Module) -> Any:
    small = {} if name in ("AdamW", "PagedAdamW") else {"min_8bit_size": 0}
    pages = {"page_bytes": 2048} if name.startswith("Paged") else {}
    words = {"relative_step": False} if "Adafactor" in name else {}
    params = [p for p in net.parameters() if p.requires_grad]
    return getattr(optim, name)(params, lr=0.01, **small, **pages, **words)


def train(net: nn.Module, opt: Any, steps: range, device: str) -> None:
    for k in steps:
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(k)).to(device)
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()


def adapters(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in net.parameters() if p.requires_grad]


def same(one: nn.Module, other: nn.Module, what: str) -> None:
    for a, b in zip(adapters(one), adapters(other), strict=True):
        assert torch.equal(a, b), what


@pytest.mark.parametrize(("device", "name"), CASES)
def test_paged_states_train_adapters_to_the_bits_of_resident_ones(device: str, name: str) -> None:
    """Three steps; then saved after two, loaded into a new model by either class, and stepped once; then merged."""
    resident, paged = model(device), model(device)
    opts = [optimizer(n, net) for n, net in ((name.removeprefix("Paged"), resident), (name, paged))]
    for net, opt in zip((resident, paged), opts, strict=True):
        train(net, opt, range(2), device)
    saved = {k: v.clone() for k, v in paged.state_dict().items()}, opts[1].state_dict()
    loaded = []
    for kind in (name, name.removeprefix("Paged")):
        net = model(device)
        net.load_state_dict(saved[0])
        opt = optimizer(kind, net)
        opt.load_state_dict(saved[1])
        loaded.append((kind, net, opt))
    for net, opt in [(resident, opts[0]), (paged, opts[1]), *((net, opt) for _, net, opt in loaded)]:
        train(net, opt, range(2, 3), device)
    before = adapters(model(device))
    assert not any(torch.equal(a, b) for a, b in zip(before, adapters(paged), strict=True))
    same(resident, paged, "paged")
    for kind, net, _ in loaded:
        same(resident, net, f"loaded by {kind}")
    merged = [[m.weight for m in merge(net) if isinstance(m, nn.Linear)] for net in (resident, paged)]
    assert len(merged[0]) == 2 and all(map(torch.equal, *merged))


def test_every_adapter_is_among_what_is_paged() -> None:
    net = model("cpu")
    layers = [m for m in net.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 2 and len(adapters(net)) == 4 and len(PAGED) == 66
