"""The drop-ins take the steps of `refopt.Optimizer`, bit for bit: weights, codes and scales."""

from __future__ import annotations

import pytest
import torch

import refopt_cuda as rc
from tests.optim.pairs import CASES, CODED, SHAPES, Case, Mirror, give, gradient, parameter, walk, weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ADAMW = Case("AdamW", "adamw", {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.11})
ADAMW8 = ADAMW._replace(name="AdamW8bit")
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_class_steps_as_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    walk(case, weights(SHAPES, dtype, device), 3)


@pytest.mark.parametrize(
    ("p_dtype", "g_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_a_gradient_may_have_another_dtype(p_dtype: torch.dtype, g_dtype: torch.dtype, device: str) -> None:
    params = weights([(64, 80), (50,)], p_dtype, device)
    opt, mirrors = ADAMW8.make(params), [Mirror(ADAMW8, p) for p in params]
    for t in range(3):
        for k, (p, mirror) in enumerate(zip(params, mirrors, strict=True)):
            p.grad = gradient(p, t + 10 * k)
            p.grad.data = g = gradient(p, t + 10 * k, g_dtype)
            mirror.step(g)
        opt.step()
        for p, mirror in zip(params, mirrors, strict=True):
            mirror.agrees(p, opt.state[p], f"step {t + 1}")


@pytest.mark.parametrize("codec", ["bf16", "int8_linear", "dynamic8"])
@pytest.mark.parametrize("role", ["m", "v"])
def test_each_state_takes_a_codec_of_its_own(role: str, codec: str, device: str) -> None:
    params = weights(SHAPES[:5], torch.float32, device)
    walk(ADAMW, params, 3, ADAMW.make(params, codecs={role: codec}), **{role: codec})


@pytest.mark.parametrize("block", [64, 100, 2048])
def test_any_block_size(block: int, device: str) -> None:
    params = weights([(33, 200), (6, 4096)], torch.float32, device)
    opt, mirrors = ADAMW8.make(params, block=block), [Mirror(ADAMW8, p, block=block) for p in params]
    for t in range(2):
        give(params, t)
        opt.step()
        for p, mirror in zip(params, mirrors, strict=True):
            mirror.step(p.grad)
            mirror.agrees(p, opt.state[p], f"block {block}, step {t + 1}")


def test_composed_is_the_named_class(device: str) -> None:
    one, other = (weights(SHAPES, torch.bfloat16, device) for _ in range(2))
    walk(ADAMW8, one, 2)
    walk(ADAMW8, other, 2, rc.optim.Composed(other, rule="adamw", codecs="dynamic8", **ADAMW8.words))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CODED[-3:], ids=str)
def test_parameters_that_are_not_contiguous_are_stepped_in_row_major_order(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    base = weights([(96, 64), (32, 16, 5, 20), (40, 300)], dtype, device)
    params = [
        parameter(base[0].detach().t(), dtype, device),
        parameter(base[1].detach().to(memory_format=torch.channels_last), dtype, device),
        parameter(base[2].detach()[:, ::2], dtype, device),
    ]
    params[2].data = base[2].detach()[:, ::2]
    assert not any(p.is_contiguous() for p in params)
    walk(case, params, 3)


def test_the_rest_of_a_tensor_is_not_touched_through_a_view(device: str) -> None:
    whole = torch.ones(64, 256, device=device)
    p = torch.nn.Parameter(whole[:, :128])
    walk(ADAMW8, [p], 2)
    assert p.data_ptr() == whole.data_ptr() and (whole[:, 128:] == 1).all() and (whole[:, :128] != 1).any()


@pytest.mark.parametrize("form", ["transposed", "expanded", "offset", "strided"])
def test_gradients_in_any_layout(form: str, device: str) -> None:
    params = weights([(64, 96)], torch.float32, device)
    p, opt, mirror = params[0], ADAMW8.make(params), Mirror(ADAMW8, params[0])
    for t in range(3):
        big = gradient(torch.empty(200, 200, device=device), t)
        p.grad = {
            "transposed": big[:96, :64].t(),
            "expanded": big[0, :96].expand(64, 96),
            "offset": big.reshape(-1)[1 : 1 + 64 * 96].view(64, 96),
            "strided": big[:64, : 2 * 96 : 2],
        }[form]
        before = p.grad.clone()
        opt.step()
        mirror.step(before)
        mirror.agrees(p, opt.state[p], f"{form}, step {t + 1}")
        assert torch.equal(p.grad, before)


@pytest.mark.parametrize("case", [ADAMW, ADAMW8], ids=str)
def test_a_parameter_without_gradient_keeps_its_own_count(case: Case, device: str) -> None:
    params = weights([(64, 80), (80, 64), (5,)], torch.float32, device)
    opt, mirrors = case.make(params), [Mirror(case, p) for p in params]
    for t, live in enumerate([(0, 1), (1,), (0, 1, 2), (), (0, 2), (0, 1, 2)]):
        for k, p in enumerate(params):
            p.grad = gradient(p, 10 * t + k) if k in live else None
        opt.step()
        for k in live:
            mirrors[k].step(params[k].grad)
            mirrors[k].agrees(params[k], opt.state[params[k]], f"step {t + 1}, tensor {k}")
    assert [opt.state[p]["step"] for p in params] == [4, 4, 3]


def test_ten_step_counts_at_once(device: str) -> None:
    """More than the rows of scalars that one launch holds."""
    params = weights([(8, 32)] * 11, torch.float32, device)
    opt, mirrors = ADAMW.make(params), [Mirror(ADAMW, p) for p in params]
    for t in range(11):
        for k, p in enumerate(params):
            p.grad = gradient(p, 10 * t + k) if k <= t else None
            if k <= t:
                mirrors[k].step(p.grad)
        opt.step()
    assert [opt.state[p]["step"] for p in params] == list(range(11, 0, -1))
    for k, (p, mirror) in enumerate(zip(params, mirrors, strict=True)):
        mirror.agrees(p, opt.state[p], f"tensor {k}")


def test_replaced_storage_is_noticed(device: str) -> None:
    """`p.data = ...` and states that were moved: the step goes where the tensors are now."""
    params = weights([(64, 80), (40,)], torch.float32, device)
    opt, mirrors = ADAMW8.make(params), [Mirror(ADAMW8, p) for p in params]
    for t in range(4):
        if t == 1:
            params[0].data = params[0].detach().clone()
        if t == 2:
            for state in opt.state.values():
                for x in state.values():
                    if torch.is_tensor(x):
                        x.data = x.detach().clone()
        if t == 3:
            for p in params:
                opt.state[p] = {k: x.clone() if torch.is_tensor(x) else x for k, x in opt.state[p].items()}
        give(params, t)
        opt.step()
        for p, mirror in zip(params, mirrors, strict=True):
            mirror.step(p.grad)
            mirror.agrees(p, opt.state[p], f"step {t + 1}")


@pytest.mark.parametrize("min_size", [0, 1024, 8193])
def test_smaller_tensors_keep_float32_states(min_size: int, device: str) -> None:
    params = weights([(64, 128), (2, 16), (32, 33)], torch.float32, device)
    opt, mirrors = ADAMW8.make(params, min_8bit_size=min_size), [Mirror(ADAMW8, p, min_size) for p in params]
    give(params, 0)
    opt.step()
    for p, mirror in zip(params, mirrors, strict=True):
        mirror.step(p.grad)
        mirror.agrees(p, opt.state[p], str(tuple(p.shape)))


def test_nan_and_inf_go_where_the_arithmetic_takes_them(device: str) -> None:
    params = weights([(64, 128), (50,)], torch.float32, device)
    opt, mirrors = ADAMW8.make(params), [Mirror(ADAMW8, p) for p in params]
    for t in range(3):
        give(params, t)
        if t == 1:
            params[0].grad[3, 5], params[0].grad[9, 0], params[1].grad[7] = float("nan"), float("inf"), float("-inf")
        opt.step()
        for p, mirror in zip(params, mirrors, strict=True):
            mirror.step(p.grad)
            mirror.agrees(p, opt.state[p], f"step {t + 1}")
