"""LoRALinear: begins as its base, has the oracle's products, trains A and B alone, merges without loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from refopt import qlora
from refopt_cuda import optim
from refopt_cuda.nn import Linear4bit, LoRALinear
from tests.nn.test_linear4bit import box, plain


def trained(device: str = "cpu", **options: Any) -> tuple[LoRALinear, torch.nn.Linear]:
    """A layer whose B is no longer zero, and what its base was made of."""
    linear = plain(bias=False, device=device)
    layer = LoRALinear(Linear4bit.of(linear), r=4, alpha=6, **options)
    torch.nn.init.normal_(layer.lora_B)
    return layer, linear


def gradients(layer: LoRALinear, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y, dx, dA, dB."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy)]


def test_a_layer_begins_as_its_base(device: str) -> None:
    base = Linear4bit.of(plain(device=device))
    layer, x = LoRALinear(base, r=8), torch.randn(3, 65, device=device)
    assert torch.equal(layer(x), base(x))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.abs().max() <= 65**-0.5


def test_products_and_gradients_are_the_oracles(device: str) -> None:
    """In float32, with the oracle's W as a matrix: it rounds a Box to bfloat16, this layer to its own dtype."""
    layer, linear = trained(device)
    W = box(linear.weight, "nf4", True).decode()
    x, dy = torch.randn(2, 3, 65, device=device), torch.randn(2, 3, 48, device=device)
    A, B = (p.detach().cpu().numpy() for p in (layer.lora_A, layer.lora_B))
    args = x.cpu().numpy(), W, A, B, layer.s
    wanted = [qlora.forward(*args), *qlora.backward(dy.cpu().numpy(), *args)]
    for name, got, want in zip(("y", "dx", "dA", "dB"), gradients(layer, x, dy), wanted, strict=True):
        np.testing.assert_allclose(got.cpu(), want, rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_correction_in_the_base_s_product_is_the_correction_beside_it() -> None:
    """One function for both, or, around a plain layer of the same weights, torch's own operations."""
    layer, _ = trained()
    apart = LoRALinear(LoRALinear(layer.base, r=4).merged(), r=4, alpha=6)
    apart.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora" in k}, strict=False)
    x, dy = torch.randn(5, 65), torch.randn(5, 48)
    for got, want in zip(gradients(layer, x, dy), gradients(apart, x, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_and_autocast_give_bfloat16(device: str) -> None:
    layer, x = trained(device)[0], torch.randn(3, 65, device=device)
    exact = layer(x).detach()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    y.float().sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_A.grad.dtype == torch.float32


def test_dropout_is_of_the_correction_and_off_in_evaluation() -> None:
    layer, x = trained(dropout=0.5)[0], torch.randn(3, 65)
    kept = layer.eval()(x)
    assert torch.equal(kept, layer(x))
    assert not torch.allclose(layer.train()(x), kept)
    torch.nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base(x))


TRAINED: list[Any] = [("cpu", "AdamW")]  # each takes seconds to compile on a CPU
TRAINED += [pytest.param("cuda", n, marks=pytest.mark.gpu) for n in ("AdamW", "AdamW8bit", "Lion8bit", "AdamW4bit")]


@pytest.mark.parametrize(("device", "name"), TRAINED)
def test_training_moves_the_adapters_alone(device: str, name: str) -> None:
    layer, _ = trained(device)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    small = {"min_8bit_size": 0} if "bit" in name else {}
    opt = getattr(optim, name)([p for p in layer.parameters() if p.requires_grad], lr=0.01, **small)
    x = torch.randn(8, 65, device=device)
    for _ in range(3):
        opt.zero_grad()
        layer(x).square().mean().backward()
        opt.step()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]) == ("lora" not in key), key


def test_a_merged_layer_is_plain_and_loses_nothing() -> None:
    layer, linear = trained()
    x = torch.randn(3, 65)
    merged = layer.merged()
    assert type(merged) is torch.nn.Linear and merged.weight.dtype == torch.float32
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-4, atol=1e-4)
    A, B = (p.detach().numpy() for p in (layer.lora_A, layer.lora_B))
    want = qlora.merge(box(linear.weight, "nf4", True).decode(), A, B, layer.s)
    np.testing.assert_allclose(merged.weight, want, rtol=1e-5, atol=1e-6)
    assert layer.merged(torch.bfloat16).weight.dtype == torch.bfloat16


BAD: list[tuple[Any, Any, str]] = [
    (TypeError, lambda b: LoRALinear(torch.nn.ReLU()), "base must be a Linear4bit or torch.nn.Linear, got ReLU"),
    (ValueError, lambda b: LoRALinear(b, r=0), "r must be whole, 1 to 48"),
    (ValueError, lambda b: LoRALinear(b, r=49), "r must be whole, 1 to 48 for this base, got 49"),
    (ValueError, lambda b: LoRALinear(b, r=4, alpha=float("nan")), "alpha must be finite"),
    (ValueError, lambda b: LoRALinear(b, r=4, dropout=1.0), "dropout must be >= 0 and < 1"),
]


@pytest.mark.parametrize(("error", "call", "says"), BAD, ids=[b[2][:25] for b in BAD])
def test_bad_input_is_named(error: Any, call: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        call(Linear4bit(65, 48, device="meta"))


def test_the_scale() -> None:
    base = Linear4bit(65, 48, device="meta")
    assert LoRALinear(base, r=16).s == 1.0 == qlora.scale(16, 16)
    assert LoRALinear(base, r=16, stabilized=True).s == 4.0 == qlora.scale(16, 16, stabilized=True)
