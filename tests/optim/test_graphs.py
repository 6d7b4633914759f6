"""On a GPU: steps in CUDA graphs, under a scaler and with clipping, beside plain steps; nobody waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from tests.bits import same_bits

pytestmark = pytest.mark.gpu

SHAPES = [(64, 128), (7,), (), (33, 200), (3, 5, 256), (70_000,)]
CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("AdamW8bit", torch.bfloat16, {}),
    ("AdamW8bit", torch.bfloat16, {"codecs": {"p": "bf16_sr"}, "seed": 5}),
    ("AdamW4bit", torch.float32, {"amsgrad": True}),
    ("Adam", torch.float16, {}),
    ("Lion8bit", torch.bfloat16, {"weight_decay": 0.1}),
    ("SGD", torch.float32, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adagrad", torch.float32, {"lr_decay": 0.01}),
    ("RMSprop8bit", torch.bfloat16, {"momentum": 0.9, "centered": True}),
    ("Signum", torch.bfloat16, {}),
    ("AdEMAMix8bit", torch.bfloat16, {}),
]
NAMES = [f"{name}-{k}" for k, (name, *_) in enumerate(CASES)]
MATRICES = [(64, 128), (128, 64), (33, 200), (64, 128)]
WHOLE: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("LAMB", torch.bfloat16, {"weight_decay": 0.06}),
    ("LAMB", torch.float32, {"variant": "clip", "max_unorm": 0.1, "exclude_1d": True}),
    ("LARS", torch.float32, {"weight_decay": 0.07, "trust_coefficient": 0.02}),
    ("Adafactor", torch.bfloat16, {"relative_step": False, "beta1": 0.8, "weight_decay": 0.2}),
    ("Adafactor", torch.float32, {"variant": "torch", "weight_decay": 0.2}),
    ("CAME", torch.bfloat16, {"weight_decay": 0.2}),
    ("AdamMini", torch.float16, {"weight_decay": 0.11, "blocks": "whole"}),
    ("AdamMini", torch.bfloat16, {"blocks": "elementwise"}),
    ("SM3", torch.bfloat16, {}),
    ("Muon", torch.bfloat16, {"weight_decay": 0.3}),
    ("Muon", torch.float32, {"ns_dtype": "float32", "momentum_dtype": "bfloat16"}),
    ("LAMB8bit", torch.bfloat16, {"codecs": {"m": "bf16"}}),
    ("Adafactor4bit", torch.bfloat16, {"relative_step": False, "beta1": 0.8}),
    ("CAMEFp8", torch.float32, {"min_8bit_size": 1000}),
    ("SM3", torch.bfloat16, {"codecs": "compand8"}),
    ("Muon8bit", torch.bfloat16, {"weight_decay": 0.3}),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever of torch waits for a device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parameters(dtype: torch.dtype, seed: int = 0, device: str = "cuda", shapes: Any = SHAPES) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def fill(params: list[Any], seed: int, scale: float = 1.0) -> None:
    """New gradients where the old ones lie."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for p in params:
        if p.grad is None:
            p.grad = torch.empty_like(p)
        g = torch.randn(p.shape, generator=generator, device="cuda").to(p.grad.dtype)
        p.grad.copy_(g * scale)  # exact for a power of two


def same(one: Any, other: Any, ours: list[Any], theirs: list[Any]) -> None:
    for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(p, q), f"weights {k}"
        for name, x in other.state[q].items():
            y = one.state[p][name]
            assert torch.equal(x, y) if torch.is_tensor(x) and torch.is_tensor(y) else int(x) == int(y), (
                f"{name} of {k}"
            )


@pytest.mark.filterwarnings("ignore:.*coupled")
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize(("name", "dtype", "words"), CASES, ids=NAMES)
def test_200_replays_equal_200_eager_steps(
    name: str, dtype: torch.dtype, words: dict[str, Any], clip: float | None
) -> None:
    """The rate, a tensor on the GPU, changes with every step; one step is skipped for its Inf."""
    ours, theirs = parameters(dtype), parameters(dtype)
    rate = torch.tensor(0.01, device="cuda")
    one = getattr(rc.optim, name)(ours, lr=rate, capturable=True, max_grad_norm=clip, **words)
    other = getattr(rc.optim, name)(theirs, lr=float(torch.tensor(0.01)), max_grad_norm=clip, **words)
    one.grad_scale, one.found_inf = torch.tensor(8.0, device="cuda"), torch.tensor(0.0, device="cuda")
    fill(ours, 0, 8.0)
    one.step()
    fill(theirs, 0)
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.step()
    for t in range(1, 201):
        rates = 0.01 / (1 + 0.1 * t)
        rate.fill_(rates)
        bad = t == 77
        fill(ours, t, 8.0)
        if bad:
            ours[0].grad.view(-1)[3] = float("inf")
        one.found_inf.fill_(float(bad))
        graph.replay()
        if not bad:
            fill(theirs, t)
            other.param_groups[0]["lr"] = float(torch.tensor(rates))
            other.step()
    same(one, other, ours, theirs)
    assert int(one.state[ours[0]]["step"]) == 200
    fill(ours, 300, 8.0)
    fill(theirs, 300)
    one.step()
    other.step()
    same(one, other, ours, theirs)


@pytest.mark.filterwarnings("ignore:.*bitsandbytes")
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize(("name", "dtype", "words"), WHOLE, ids=[f"{name}-{k}" for k, (name, *_) in enumerate(WHOLE)])
def test_20_replays_of_rules_of_whole_tensors_equal_20_eager_steps(
    name: str, dtype: torch.dtype, words: dict[str, Any], clip: float | None
) -> None:
    """The rate, a float64 tensor on the GPU, changes with every step; one step is skipped for its Inf."""
    shapes = MATRICES if name.startswith("Muon") else SHAPES
    ours, theirs = (parameters(dtype, shapes=shapes) for _ in range(2))
    if shapes is SHAPES:  # one that lies by columns goes through a copy
        for some in (ours, theirs):
            some.append(torch.nn.Parameter(some[0].detach().float().t().contiguous().to(dtype).t()))
    rate = torch.tensor(0.01, dtype=torch.float64, device="cuda")
    one = getattr(rc.optim, name)(ours, lr=rate, capturable=True, max_grad_norm=clip, **words)
    other = getattr(rc.optim, name)(theirs, lr=0.01, max_grad_norm=clip, **words)
    one.grad_scale, one.found_inf = torch.tensor(8.0, device="cuda"), torch.tensor(0.0, device="cuda")
    for opt, params, scale in ((one, ours, 8.0), (other, theirs, 1.0)):
        fill(params, 0, scale)
        opt.step()
    same(one, other, ours, theirs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.step()
    for t in range(1, 21):
        bad, rates = t == 7, 0.01 / (1 + 0.1 * t)
        rate.fill_(rates)
        fill(ours, t, 8.0)
        if bad:
            ours[0].grad.view(-1)[3] = float("inf")
        one.found_inf.fill_(float(bad))
        graph.replay()
        if not bad:
            fill(theirs, t)
            other.param_groups[0]["lr"] = rates
            other.step()
    same(one, other, ours, theirs)
    assert int(one.state[ours[0]]["step"]) == 20
    for opt, params, scale in ((one, ours, 8.0), (other, theirs, 1.0)):
        fill(params, 300, scale)
        opt.step()
    same(one, other, ours, theirs)


@pytest.mark.filterwarnings("ignore:.*bitsandbytes")
@pytest.mark.parametrize(("name", "dtype", "words"), WHOLE[:9:2], ids=[name for name, *_ in WHOLE[:9:2]])
def test_clipped_steps_of_rules_of_whole_tensors_have_the_bits_of_the_cpu(name: str, dtype: Any, words: Any) -> None:
    host, device = parameters(dtype, device="cpu"), parameters(dtype)
    one, two = (getattr(rc.optim, name)(some, max_grad_norm=0.5, gnorm_scale=0.3, **words) for some in (host, device))
    for t in range(3):
        fill(device, t)
        for p, q in zip(host, device, strict=True):
            p.grad = q.grad.cpu()
        one.step()
        if t:
            with no_waiting():
                two.step()
        else:
            two.step()
        for k, (p, q) in enumerate(zip(host, device, strict=True)):
            assert torch.equal(p, q.cpu()), f"weights {k}, step {t + 1}"


def test_adafactors_power_is_that_of_the_host_in_float32() -> None:
    """The device's pow may leave the host's by two units of float64; 1 - t^-0.8 and its rest, rounded, do not."""
    from refopt_cuda.kernels import rows_cuda, whole_rules

    for decay in (-0.8, -0.6, -0.37):
        hyper = refopt.rules.adafactor.check("adafactor", {"decay_rate": decay})
        form, stream = whole_rules.form_of("adafactor", hyper), torch.cuda.current_stream().cuda_stream
        steps = [*range(1, 4097), *range(5000, 10**6, 997)]
        room = torch.zeros(rows_cuda.room(len(steps), form), dtype=torch.uint8, device="cuda")
        counts = [(0, t) for t in steps]
        rows_cuda.run(form, hyper, counts, room.data_ptr(), rows_cuda.Factor(), 0, stream)
        got = room.cpu().numpy().view("f4").reshape(-1, rows_cuda.PAIR // 4)[: len(steps), :8]
        want = [whole_rules.rows("adafactor", t, False, hyper).scalars for t in steps]
        same_bits(got, np.array(want), f"decay {decay}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counted", [False, True])
def test_clipping_has_the_bits_of_the_cpu(dtype: torch.dtype, counted: bool) -> None:
    host, device = parameters(dtype, device="cpu"), parameters(dtype)
    one = rc.optim.AdamW8bit(host, lr=0.01, max_grad_norm=0.5, gnorm_scale=0.3)
    two = rc.optim.AdamW8bit(device, lr=0.01, max_grad_norm=0.5, gnorm_scale=0.3, capturable=counted)
    for t in range(4):
        fill(device, t)
        for k, (p, q) in enumerate(zip(host, device, strict=True)):
            q.grad = None if k == t else q.grad
            p.grad = None if q.grad is None else q.grad.cpu()
        one.step()
        two.step()
        for k, (p, q) in enumerate(zip(host, device, strict=True)):
            assert torch.equal(p, q.cpu()), f"weights {k}, step {t + 1}"


@pytest.mark.parametrize(
    "words", [{"capturable": True}, {"max_grad_norm": 0.5}, {"capturable": True, "max_grad_norm": 0.5}]
)
def test_a_step_waits_for_nothing(words: dict[str, Any]) -> None:
    device = parameters(torch.bfloat16)
    opt = rc.optim.AdamW8bit(device, **words)
    fill(device, 0)
    opt.step()
    fill(device, 1)
    opt.step()
    with no_waiting():
        opt.step()
        opt.grad_scale, opt.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
        opt.step()
        opt.step()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "AdamW8bit"])
def test_the_scaler_of_a_gpu_divides_and_skips_as_with_torchs_fused_optimizers(name: str) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    one = getattr(rc.optim, name)(ours, lr=0.01)
    peer = getattr(torch.optim, name.removesuffix("8bit"))(theirs, lr=0.01, fused=True)
    first, second = (torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=3) for _ in range(2))
    for t in range(12):
        before = [p.detach().clone() for p in ours]
        for opt, params, scaler in ((one, ours, first), (peer, theirs, second)):
            opt.zero_grad()
            loss = sum((p**2).sum() for p in params) * (float("inf") if t in (4, 5) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        assert first.get_scale() == second.get_scale()
        assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True)) == (t in (4, 5))
    assert int(one.state[ours[0]]["step"]) == 10
    if name != "AdamW8bit":
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                p, q, rtol=3e-6, atol=2e-7
            )  # ten steps of 0.01, each within ulps: torch contracts


def test_a_scaled_step_waits_for_nothing_after_the_first() -> None:
    device = parameters(torch.float32)  # torch itself unscales no bfloat16
    opt, scaler = rc.optim.AdamW8bit(device), torch.amp.GradScaler("cuda", init_scale=8.0)
    for t in range(3):
        opt.zero_grad()
        scaler.scale(sum((p.float() ** 2).sum() for p in device)).backward()
        if t < 2:
            scaler.step(opt)
        else:
            with no_waiting():
                scaler.step(opt)
        scaler.update()
    assert int(opt.state[device[0]]["step"]) == 3


def test_parameters_of_many_counts_and_two_launches_in_one_graph() -> None:
    """Twelve counts are more than a launch holds; a parameter by columns goes through a copy."""
    ours = [torch.nn.Parameter(torch.randn(16, 32, device="cuda")) for _ in range(12)]
    ours.append(torch.nn.Parameter(torch.randn(32, 16, device="cuda").t()))
    theirs = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ours]
    one, other = rc.optim.AdamW(ours, capturable=True), rc.optim.AdamW(theirs)
    for t in range(12):
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn_like(p) if k >= t else None
            q.grad = None if p.grad is None else p.grad.clone()
        one.step(), other.step()
    fill(ours, 1)
    one.step()
    fill(theirs, 1)
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.step()
    for t in range(5):
        fill(ours, 50 + t)
        graph.replay()
        fill(theirs, 50 + t)
        other.step()
    same(one, other, ours, theirs)


def test_a_graph_outlives_a_loaded_state() -> None:
    """What its launches read stays where it was; it steps the states of before."""
    ours = parameters(torch.bfloat16)
    opt = rc.optim.AdamW8bit(ours, capturable=True, max_grad_norm=1.0)
    fill(ours, 0)
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    opt.load_state_dict(opt.state_dict())
    torch.cuda.empty_cache()
    graph.replay()
    torch.cuda.synchronize()


def test_a_step_on_another_stream_and_in_another_device_context() -> None:
    host, device = parameters(torch.float32, device="cpu"), parameters(torch.float32)
    one = rc.optim.AdamW8bit(host, max_grad_norm=0.5)
    two = rc.optim.AdamW8bit(device, max_grad_norm=0.5, capturable=True)
    stream = torch.cuda.Stream()
    for t in range(3):
        fill(device, t)
        for p, q in zip(host, device, strict=True):
            p.grad = q.grad.cpu()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            two.step()
        torch.cuda.current_stream().wait_stream(stream)
        one.step()
    assert all(torch.equal(p, q.cpu()) for p, q in zip(host, device, strict=True))


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_parameters_of_a_second_gpu() -> None:
    host = parameters(torch.float32, device="cpu")
    there = parameters(torch.float32, device="cuda:1")
    one, two = (
        rc.optim.AdamW8bit(host, max_grad_norm=0.5),
        rc.optim.AdamW8bit(there, max_grad_norm=0.5, capturable=True),
    )
    for _ in range(3):
        for p, q in zip(host, there, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.to("cuda:1")
        one.step(), two.step()
    assert all(torch.equal(p, q.cpu()) for p, q in zip(host, there, strict=True))
    both = rc.optim.AdamW([there[0], torch.nn.Parameter(torch.ones(3, device="cuda:0"))], max_grad_norm=1.0)
    for p in both.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="max_grad_norm needs all gradients on one device"):
        both.step()


def test_a_rate_on_the_gpu_needs_capturable() -> None:
    p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    with pytest.raises(ValueError, match=r"lr must be a number or a CPU tensor .*capturable=True"):
        rc.optim.AdamW8bit([p], lr=torch.tensor(0.1, device="cuda"))


@pytest.mark.filterwarnings("ignore:.*CUDA Graph is empty")
def test_a_capture_before_the_first_step_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(64, 80, device="cuda"))
    p.grad = torch.ones_like(p)
    opt = rc.optim.AdamW8bit([p], capturable=True)
    with pytest.raises(RuntimeError, match="cannot make states"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    assert bool((p == 1).all())
