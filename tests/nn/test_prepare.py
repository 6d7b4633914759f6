"""A whole model, swapped in place: what is skipped, what is tied, and that no more than one weight is there uncoded."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from refopt import StateError
from refopt_cuda.nn import Linear4bit, LoRALinear, adapt, merge, prepare


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    """Two blocks; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = h * self.scale.to(h.dtype)
        for block in self.blocks:
            h = block(h)
        return self.lm_head(h)


X = torch.arange(6).view(2, 3)
LAYERS = [f"blocks.{k}.{n}" for k in range(2) for n in ("up", "down")]


def model() -> Model:
    torch.manual_seed(3)
    return Model()


def of(m: nn.Module, kind: Any) -> list[str]:
    return [n for n, layer in m.named_modules() if type(layer) is kind]


def test_linear_layers_are_swapped_and_the_head_stays_tied() -> None:
    told: list[Any] = []
    plain, made = model(), prepare(model(), progress=lambda *now: told.append(now))
    assert of(made, Linear4bit) == LAYERS and of(made, nn.Linear) == ["lm_head"]
    assert made.lm_head.weight is made.embed.weight
    assert told == [(n, k + 1, 4) for k, n in enumerate(LAYERS)]
    assert not any(p.requires_grad for p in made.parameters())
    error = (made(X) - plain(X)).norm() / plain(X).norm()
    assert 0 < error < 0.2


def test_patterns_say_what_is_skipped() -> None:
    made = prepare(model(), skip=["lm_head", "blocks.1.*"])
    assert of(made, Linear4bit) == LAYERS[:2]


def test_nothing_left_to_swap_is_an_error_that_changes_nothing() -> None:
    m = model()
    with pytest.raises(ValueError, match=r"Model has no linear layer that skip=\('\*',\) leaves"):
        prepare(m, skip=["*"])
    with pytest.raises(ValueError, match="quant_type must be"):
        prepare(m, quant_type="int3")
    with pytest.raises(ValueError, match="no Linear4bit that targets"):
        adapt(m)
    assert of(m, nn.Linear) == [*LAYERS, "lm_head"] and all(p.requires_grad for p in m.parameters())


def test_weights_stream_one_at_a_time_into_a_model_on_the_meta_device() -> None:
    """When a weight is asked for, the one before it is gone."""
    state, wanted = model().state_dict(), prepare(model())
    with torch.device("meta"):
        empty = Model()
    empty.lm_head.weight = empty.embed.weight
    empty.scale = torch.ones(1)
    live: list[weakref.ref[torch.Tensor]] = []

    def weights(name: str) -> torch.Tensor | None:
        if name in state and state[name].ndim == 2 and name != "embed.weight":
            assert all(r() is None for r in live), name
            live.append(weakref.ref(w := state[name].clone()))
            return w
        return state.get(name)

    made = prepare(empty, weights=weights)
    assert torch.equal(made(X), wanted(X)) and made.lm_head.weight is made.embed.weight
    assert len(live) == 4


def test_coded_weights_are_taken_as_they_are() -> None:
    made = prepare(model(), quant_type="fp4", block=32)
    state = made.state_dict()
    with torch.device("meta"):
        empty = Model()
    empty.scale = torch.ones(1)
    again = prepare(empty, weights=state.get)
    assert torch.equal(again(X), made(X)) and again.blocks[0].up.codec == "double.fp4"


def test_a_weight_that_is_lacking_is_named() -> None:
    state = model().state_dict()
    for name in ("blocks.1.down.weight", "blocks.0.norm.bias"):
        with torch.device("meta"):
            empty = Model()
        empty.scale = torch.ones(1)
        with pytest.raises(StateError, match=name):
            prepare(empty, weights=lambda n, name=name: None if n == name else state.get(n))


def test_adapters_train_and_merge_into_plain_layers() -> None:
    made = adapt(prepare(model()), r=4, targets=["*.up"])
    assert of(made, LoRALinear) == [n for n in LAYERS if n.endswith("up")]
    names = [n for n, p in made.named_parameters() if p.requires_grad]
    assert [n.rpartition(".")[2] for n in names] == ["lora_A", "lora_B"] * 2
    for layer in (m for m in made.modules() if isinstance(m, LoRALinear)):
        nn.init.normal_(layer.lora_B)
    y = made(X)
    assert of(merge(made), nn.Linear) == [*LAYERS, "lm_head"]
    torch.testing.assert_close(made(X), y, rtol=1e-4, atol=1e-4)
    assert merge(prepare(model()), torch.bfloat16).blocks[0].up.weight.dtype == torch.bfloat16


def test_a_wrong_rank_is_refused_before_anything_is_changed() -> None:
    made = prepare(model())
    with pytest.raises(ValueError, match="r must be whole, 1 to 16"):
        adapt(made, r=17)
    assert of(made, Linear4bit) == LAYERS


def test_the_rest_takes_the_dtype_that_is_asked_for() -> None:
    made = prepare(model(), dtype=torch.bfloat16)
    assert made.embed.weight.dtype == made.blocks[0].norm.weight.dtype == torch.bfloat16
    assert made.blocks[0].up.nested_absmax.dtype == torch.float32
    assert made(X).dtype == torch.bfloat16
