"""Embeddings that ask for float32 states: as bitsandbytes' layers, and the wish survives what happens to modules."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

import refopt_cuda as rc  # noqa: E402
from refopt_cuda.nn import embedding  # noqa: E402
from refopt_cuda.optim import overrides  # noqa: E402

LAYERS = [rc.nn.Embedding, rc.nn.StableEmbedding]


def saved(layer: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replaced(layer: torch.nn.Module) -> torch.nn.Module:
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    return layer


WAYS: dict[str, Callable] = {
    "as it is": lambda layer: layer,
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "saved": saved,
    "replaced": replaced,
    "from meta": lambda layer: layer.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", LAYERS)
def test_its_states_are_float32_whatever_happened_to_the_module(layer: type, way: str) -> None:
    model = torch.nn.Sequential(WAYS[way](layer(128, 64)), torch.nn.Linear(64, 128, dtype=torch.float32))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt = rc.optim.Lion8bit(model.parameters())
    opt.step()
    assert opt.state[model[0].weight]["exp_avg"].dtype == torch.float32
    assert "m.codes" in opt.state[model[1].weight]


def test_both_packages_call_the_mark_alike() -> None:
    assert embedding.MARK == overrides.MARK


@pytest.mark.parametrize("name", ["Embedding", "StableEmbedding"])
def test_weights_and_outputs_are_those_of_bitsandbytes(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    made = []
    for package in (rc, bnb):
        torch.manual_seed(0)
        made.append(getattr(package.nn, name)(40, 16, padding_idx=3))
    ours, theirs = made
    x = torch.tensor([[0, 3, 39], [7, 3, 1]])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.weight, theirs.weight) and not ours.weight[3].any()
    assert torch.equal(ours(x), theirs(x))


def test_the_norm_is_taken_in_float32_for_bfloat16_weights() -> None:
    layer = rc.nn.StableEmbedding(40, 16).to(torch.bfloat16)
    x = torch.tensor([1, 2, 3])
    want = torch.nn.functional.layer_norm(layer.weight[x].float(), (16,)).to(torch.bfloat16)
    assert torch.equal(layer(x), want)
