"""CPU and CUDA give the same bits: the same class, the same tensors, two devices."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.optim import names

pytestmark = pytest.mark.gpu

WORDS: dict[str, dict[str, Any]] = {"Adafactor": {"relative_step": False}, "AdamMini": {"blocks": "whole"}}
EXACT = [rc.optim.LAMB, rc.optim.LARS, rc.optim.CAME, rc.optim.Adafactor, rc.optim.AdamMini]
CLASSES = [*(getattr(rc.optim, name) for name in names.__all__), *EXACT]
"""Those whose arithmetic is exact; products of matrices are not, and `test_muon`, `test_galore` compare them."""
SHAPES = [(64, 128), (7,), (), (0,), (33, 200), (3, 5, 256), (70_000,)]


def twins(dtype: torch.dtype) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    torch.manual_seed(0)
    host = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    host.append(torch.nn.Parameter(torch.randn(128, 64).to(dtype).t()))
    return host, [torch.nn.Parameter(p.detach().cuda()) for p in host]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a.cpu(), b.cpu()))


def assert_same(one: torch.optim.Optimizer, two: torch.optim.Optimizer, host: list, device: list) -> None:
    for k, (p, q) in enumerate(zip(host, device, strict=True)):
        assert same(p, q), f"parameter {k}"
        for name, value in one.state[p].items():
            other = two.state[q][name]
            assert same(value, other) if isinstance(value, torch.Tensor) else value == other, f"{name} of {k}"


@pytest.mark.filterwarnings("ignore:.*coupled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", CLASSES)
def test_cuda_and_cpu_give_the_same_bits(cls, dtype):
    host, device = twins(dtype)
    words = WORDS.get(cls.__name__, {})
    one, two = (cls(ps, lr=1e-2, weight_decay=0.1, **words) for ps in (host, device))
    for step in range(4):
        for k, (p, q) in enumerate(zip(host, device, strict=True)):
            p.grad = None if k == step else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.cuda()
        one.step(), two.step()
        assert_same(one, two, host, device)


def test_a_step_on_another_stream_waits_for_nothing_and_is_right():
    host, device = twins(torch.bfloat16)
    one, two = (rc.optim.AdamW8bit(ps) for ps in (host, device))
    stream = torch.cuda.Stream()
    for p, q in zip(host, device, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.cuda()
    one.step(), two.step()  # compiles, which takes longer than the stream will sleep
    torch.cuda.synchronize()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        two.step()
    assert not stream.query(), "the step waited for the stream"
    stream.synchronize()
    one.step()
    assert_same(one, two, host, device)


def test_a_gpu_run_resumes_with_the_same_bits():
    _, device = twins(torch.bfloat16)
    one = rc.optim.AdamW8bit(device)
    for q in device:
        q.grad = torch.randn_like(q)
    one.step()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(q.detach().clone()) for q in device]
    two = rc.optim.AdamW8bit(others)
    two.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    for q, r in zip(device, others, strict=True):
        q.grad = torch.randn_like(q)
        r.grad = q.grad.clone()
    one.step(), two.step()
    assert_same(one, two, device, others)
    three = copy.deepcopy(one)
    assert three.rule is one.rule


@pytest.mark.filterwarnings("ignore:.*CUDA Graph is empty")
def test_a_step_in_a_cuda_graph_is_refused():
    q = torch.nn.Parameter(torch.ones(64, 80, device="cuda"))
    opt = rc.optim.AdamW8bit([q])
    q.grad = torch.ones_like(q)
    with pytest.raises(RuntimeError, match=r"^AdamW8bit\.step: .*CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    assert len(opt.state) == 0 and bool((q == 1).all())
