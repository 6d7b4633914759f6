"""Linear4bit: the oracle's bytes and products, gradients through frozen weights, and what must not touch them."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from refopt import NonFiniteError, ShapeError, codecs, qlora
from refopt_cuda.nn import Linear4bit, scratch
from tests.bits import same_bits

FORMS = [("nf4", True), ("nf4", False), ("fp4", True)]
forms = pytest.mark.parametrize(("kind", "nested"), FORMS)


def plain(out: int = 48, into: int = 65, dtype: Any = torch.float32, device: str = "cpu", bias: bool = True) -> Any:
    """An odd number of columns: blocks run across rows."""
    torch.manual_seed(out * into)
    return torch.nn.Linear(into, out, bias, dtype=dtype).to(device)


def box(w: torch.Tensor, kind: str, nested: bool) -> Any:
    a = w.detach().float().cpu().numpy()
    return codecs.double.encode(a, base=kind) if nested else codecs.CODECS[kind].encode(a)


def bits(t: torch.Tensor) -> np.ndarray:
    t = t.detach().cpu().contiguous()
    return (t.view(torch.int16) if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()


@forms
def test_codes_and_statistics_are_the_oracles(device: str, kind: str, nested: bool) -> None:
    linear = plain(device=device)
    layer, want = Linear4bit.of(linear, quant_type=kind, compress_statistics=nested), box(linear.weight, kind, nested)
    same_bits(bits(layer.weight).reshape(-1), want.codes.reshape(-1), "codes")
    same_bits(bits(layer.absmax), want.scales, "absmax")
    if nested:
        same_bits(bits(layer.nested_absmax), want.scales2, "nested_absmax")
        assert layer.nested_offset.item() == want.offset
    same_bits(bits(layer.dequantize()), want.decode(), "decoded")
    assert not layer.weight.requires_grad and layer.weight.dtype == torch.uint8


def test_weights_in_bfloat16_are_rounded_once(device: str) -> None:
    linear = plain(dtype=torch.bfloat16, device=device)
    layer, want = Linear4bit.of(linear), box(linear.weight, "nf4", True)
    rounded = codecs.bf16.encode(want.decode()).codes
    same_bits(bits(layer.dequantize()).view(np.uint16), rounded.reshape(want.shape), "decoded")


@forms
def test_products_are_those_of_the_decoded_weights(device: str, kind: str, nested: bool) -> None:
    """Forward, and the gradients of x and of a bias that trains: torch.nn.Linear's own bits."""
    layer = Linear4bit.of(plain(device=device), quant_type=kind, compress_statistics=nested)
    W, b = layer.dequantize(), layer.bias.detach().clone().requires_grad_()
    x = torch.randn(2, 3, 65, device=device, requires_grad=True)
    dy = torch.randn(2, 3, 48, device=device)
    y, want = layer(x), F.linear(x, W, b)
    got = torch.autograd.grad(y, [x, layer.bias], dy)
    assert torch.equal(y, want)
    for one, other in zip(got, torch.autograd.grad(want, [x, b], dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_products_are_the_oracles(device: str) -> None:
    """`refopt.qlora` rounds W to bfloat16; with an A of zeros it is this layer."""
    linear = plain(bias=False, device=device)
    layer = Linear4bit.of(linear, compute_dtype=torch.bfloat16)
    x, dy = (torch.randn(4, n, device=device).bfloat16().float() for n in (65, 48))
    A, B = np.zeros((1, 65), np.float32), np.zeros((48, 1), np.float32)
    args = x.cpu().numpy(), box(linear.weight, "nf4", True), A, B, 1.0
    (dx,) = torch.autograd.grad(y := layer(x.requires_grad_()), x, dy)
    scale = float(y.detach().abs().max())
    np.testing.assert_allclose(y.detach().cpu(), qlora.forward(*args), rtol=1e-2, atol=1e-2 * scale)
    np.testing.assert_allclose(dx.cpu(), qlora.backward(dy.cpu().numpy(), *args)[0], rtol=1e-2, atol=1e-2 * scale)


def test_the_dtype_of_a_product(device: str) -> None:
    """The input's, compute_dtype's inside with the input's outside, or autocast's."""
    layer, x = Linear4bit.of(plain(device=device)), torch.randn(3, 65, device=device, requires_grad=True)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    W, b = layer.dequantize(torch.bfloat16), layer.bias.bfloat16()
    half = F.linear(x.bfloat16(), W, b)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, half)
    layer.compute_dtype = torch.bfloat16
    assert torch.equal(layer(x), half.float())
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_no_conversion_of_a_model_touches_the_statistics(device: str) -> None:
    layer = Linear4bit.of(plain(device=device))
    before = {k: bits(v).copy() for k, v in layer.state_dict().items() if k != "bias"}
    for moved in (layer.bfloat16(), layer.to(device, torch.float16), layer.float()):
        after = moved.state_dict()
        assert {k: v.dtype for k, v in after.items() if v.dtype != torch.uint8}.keys() >= {"weight.nested_absmax"}
        for name, value in before.items():
            same_bits(bits(after[name]), value, name)
    assert layer.bias.dtype == torch.float32


@forms
def test_saved_copied_and_pickled_layers_are_the_same(device: str, kind: str, nested: bool) -> None:
    """Into a layer of other settings too: the checkpoint knows its own."""
    layer = Linear4bit.of(plain(device=device), quant_type=kind, compress_statistics=nested)
    other = Linear4bit(65, 48, compress_statistics=not nested, quant_type="nf4", device=device)
    other.load_state_dict(layer.state_dict())
    meta = Linear4bit(65, 48, device="meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    for made in (other, meta, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(made.dequantize(), layer.dequantize()) and torch.equal(made.bias, layer.bias)
        assert made.codec == layer.codec and made.state_dict().keys() == layer.state_dict().keys()


def test_loading_plain_weights_codes_them() -> None:
    linear = plain()
    layer = Linear4bit(65, 48)
    assert not layer.load_state_dict(linear.state_dict()).unexpected_keys
    assert torch.equal(layer.weight, Linear4bit.of(linear).weight)


def test_recomputed_activations_have_the_same_gradients() -> None:
    layer, x = Linear4bit.of(plain()), torch.randn(5, 65, requires_grad=True)
    dx = [
        torch.autograd.grad(f(x).square().sum(), x)[0]
        for f in (layer, lambda x: checkpoint(layer, x, use_reentrant=False))
    ]
    assert torch.equal(*dx)


def test_torch_compile_leaves_the_layer_as_it_is() -> None:
    layer, x = Linear4bit.of(plain()), torch.randn(2, 65)
    assert torch.equal(torch.compile(lambda x: layer(x).relu(), backend="eager")(x), layer(x).relu())


def test_all_layers_share_one_scratch_as_large_as_the_largest() -> None:
    scratch.release()
    small, large = Linear4bit.of(plain(8, 16)), Linear4bit.of(plain())
    for layer in (small, large, small):
        layer(torch.randn(2, layer.in_features))
    assert scratch.held("cpu") == 65 * 48 * 4


def test_threads_do_not_share_the_scratch_at_the_same_time() -> None:
    layers = [Linear4bit.of(plain(64, 64 + k)) for k in range(2)]
    inputs = [torch.randn(4, 64 + k) for k in range(2)]
    wanted, wrong = [layer(x) for layer, x in zip(layers, inputs)], []

    def run(k: int) -> None:
        wrong.extend(1 for _ in range(100) if not torch.equal(layers[k](inputs[k]), wanted[k]))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    layer, x = Linear4bit.of(plain()), torch.randn(2, 65, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


BAD: list[tuple[Any, Any, str]] = [
    (ValueError, lambda: Linear4bit(4, 4, quant_type="int4"), "quant_type must be 'nf4' or 'fp4', got 'int4'"),
    (ValueError, lambda: Linear4bit(4, 4, block=48), "block must be one of 32, .*, got 48"),
    (TypeError, lambda: Linear4bit(4, 4, compute_dtype=torch.int8), "compute_dtype must be float32"),
    (TypeError, lambda: Linear4bit(4, 4, dtype=torch.float64), "dtype must be float32"),
    (ShapeError, lambda: Linear4bit(4, 8).store(torch.zeros(4, 8)), r"must be of shape \(8, 4\), got \(4, 8\)"),
    (TypeError, lambda: Linear4bit(4, 8).store(torch.zeros(8, 4).double()), "got torch.float64"),
    (NonFiniteError, lambda: Linear4bit(4, 8).store(torch.full((8, 4), torch.inf)), "holds NaN or Inf"),
    (NonFiniteError, lambda: Linear4bit(4, 8, compress_statistics=False).store(torch.full((8, 4), torch.nan)), "NaN"),
]


@pytest.mark.parametrize(("error", "call", "says"), BAD, ids=[b[2][:25] for b in BAD])
def test_bad_input_is_named(error: Any, call: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    layer, good = Linear4bit(65, 48), Linear4bit.of(plain()).state_dict()
    before = layer.weight.clone()
    turned = good | {"weight.nested_quant_map": good["weight.nested_quant_map"].flip(0)}
    wrong = {"another shape": Linear4bit(48, 65).state_dict(), "another table": turned}
    wrong["no state"] = {k: v for k, v in good.items() if "quant_state" not in k}
    for what, state in wrong.items():
        with pytest.raises(RuntimeError, match="weight: Linear4bit"):
            layer.load_state_dict(state)
        assert torch.equal(layer.weight, before), what
