"""Muon as a drop-in: the reference's momentum to the bit, its direction to a part of the norm; torch's words."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import refopt
from refopt import ShapeError, StateError
from refopt_cuda.optim import newton_schulz
from refopt_cuda.optim.muon import ROOM, Muon
from tests.bits import same_bits
from tests.optim.pairs import exact, parameter, snapshot, unchanged
from tests.optim.test_checkpoints import resume_alike, through_a_file, twins

HYPER = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.3}
SHAPES = [(64, 32), (32, 32), (24, 96), (200, 24), (1, 17), (9, 1), (33, 65)]
PART = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}
"""How far a direction may be from float64's, of its norm."""
F32 = np.float32


def matrices(shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [parameter(torch.from_numpy(np.asarray(rng.standard_normal(s), F32)), dtype, device) for s in shapes]


def give(params: Any, seed: int) -> None:
    """Normal gradients, each matrix's at a size of its own."""
    rng = np.random.default_rng(1000 + seed)
    for k, p in enumerate(params):
        g = rng.standard_normal(tuple(p.shape)).astype(F32) * F32(10.0 ** (k % 5 - 3))
        p.grad = torch.from_numpy(np.asarray(g)).to(p.device, p.dtype)


def walk(params: Any, steps: int, **words: Any) -> Muon:
    opt = Muon(params, **(HYPER | words))
    for t in range(steps):
        give(params, t)
        opt.step()
    return opt


def part(got: Any, want: Any) -> float:
    got, want = (np.asarray(x, float) for x in (got, want))
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("ns_dtype", PART)
def test_every_step_is_the_references(ns_dtype: str, nesterov: bool, adjust: str, device: str) -> None:
    """Momentum bit for bit. The direction is read off weights of 0, which a step leaves at minus lr kappa X."""
    params = matrices(device=device)
    opt = Muon(params, **HYPER, nesterov=nesterov, adjust_lr_fn=adjust, ns_dtype=ns_dtype)
    words = {"lr": 0.02, "momentum": 0.8, "wd": 0.3, "nesterov": nesterov, "adjust_lr": adjust}
    ref = refopt.Optimizer("muon", **words)
    state = ref.init([exact(p) for p in params])
    for t in range(4):
        give(params, t)
        with torch.no_grad():
            for p in params:
                p.zero_()
        moved, state = ref.step([exact(p) for p in params], [exact(p.grad) for p in params], state)
        opt.step()
        for k, (p, want) in enumerate(zip(params, moved, strict=True)):
            assert part(exact(p), want) <= PART[ns_dtype], (tuple(p.shape), t)
            same_bits(exact(opt.state[p]["momentum_buffer"]), state[k]["B"], "B")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decay_and_step_are_rounded_as_the_reference_has_them(dtype: torch.dtype, device: str) -> None:
    """Given X: no Newton-Schulz steps and one entry, so that X is 1."""
    (p,) = matrices([(1, 1)], dtype, device)
    opt = Muon([p], lr=0.1, weight_decay=0.7, ns_steps=0, ns_dtype="float32", adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        p.grad = torch.full_like(p, 2.0)
        before = exact(p)
        opt.step()
        want = before * F32(1 - 0.1 * 0.7) - F32(0.1 * 0.2) * F32(1)
        assert exact(p) == torch.from_numpy(want).to(dtype).float().numpy()


@pytest.mark.parametrize("shape", [(64, 32), (24, 96), (48, 48)])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_ten_steps_beside_torch_optim_muon(shape: Any, adjust: Any, device: str) -> None:
    """torch's products are in bfloat16; weights begin at the same place in each step."""
    (p,), (q,) = (matrices([shape], device=device) for _ in range(2))
    ours, theirs = Muon([p], **HYPER, adjust_lr_fn=adjust), torch.optim.Muon([q], **HYPER, adjust_lr_fn=adjust)
    for t in range(10):
        give([p], t)
        q.grad = p.grad.clone()
        with torch.no_grad():
            q.copy_(p)
        before = exact(p) * (1 - 0.02 * 0.3)
        ours.step()
        theirs.step()
        assert part(exact(p) - before, exact(q) - before) <= 3e-2
        torch.testing.assert_close(
            ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"], rtol=2e-6, atol=2e-6
        )


def test_arguments_stand_where_torch_has_them() -> None:
    (p,) = matrices([(3, 4)])
    given = (0.1, 0.2, 0.3, False, (2.0, -1.5, 0.5), 1e-6, 3, "match_rms_adamw")
    ours, theirs = Muon([p], *given), torch.optim.Muon([p], *given)
    assert {key: ours.defaults[key] for key in theirs.defaults} == theirs.defaults
    assert {key: Muon([p]).defaults[key] for key in theirs.defaults} == torch.optim.Muon([p]).defaults


SPECTRA = {
    "gaussian": lambda k, rng: None,
    "power 1": lambda k, rng: 1 / np.arange(1, k + 1),
    "four decades": lambda k, rng: 10 ** (-4 * np.linspace(0, 1, k)),
    "low rank": lambda k, rng: np.where(np.arange(k) < 8, 1.0, 3e-2),
}


def spectrum(name: str, shape: Any) -> Any:
    """A matrix with these singular values, as float64."""
    rng = np.random.default_rng(4)
    m, n = shape
    s = SPECTRA[name](min(m, n), rng)
    if s is None:
        return rng.standard_normal(shape)
    u, v = (np.linalg.qr(rng.standard_normal((k, min(m, n))))[0] for k in (m, n))
    return (u * s) @ v.T


def directions(Z: Any, dtype: torch.dtype, steps: int = 5, coefficients: Any = (3.4445, -4.7750, 2.0315)) -> Any:
    unit = newton_schulz.UNITS[dtype]
    X = torch.from_numpy(Z * (unit / np.linalg.norm(Z))).to(dtype)[None]
    return newton_schulz.orthogonal(X, coefficients, steps)[0].double().numpy() / unit


def polynomial(Z: Any, steps: int, coefficients: Any) -> Any:
    """The same in float64."""
    a, b, c = coefficients
    X = Z / np.linalg.norm(Z)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 96), (64, 256), (64, 80), (64, 1024)])
def test_float16_stays_near_float64_for_every_spectrum(shape: Any, name: str) -> None:
    """Where bfloat16 leaves by 1 to 8 per cent, float16 leaves by at most 2, and by much less than that."""
    Z = spectrum(name, shape)
    want = polynomial(Z, 5, (3.4445, -4.7750, 2.0315))
    half, brain = (part(directions(Z, dtype), want) for dtype in (torch.float16, torch.bfloat16))
    assert half <= 2e-2 and half <= brain / 1.5, (half, brain)
    assert part(directions(Z, torch.float32), want) <= 3e-5


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize(
    "coefficients", [(3.4445, -4.7750, 2.0315), (1.5, -0.5, 0.0), (2.0, -1.5, 0.5), (1.5, -4.0, 0.1)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(16, 20), (16, 64), (16, 200)])
def test_any_number_of_steps_of_any_polynomial(dtype: torch.dtype, coefficients: Any, steps: int, shape: Any) -> None:
    Z = spectrum("gaussian", shape)
    want = polynomial(Z, steps, coefficients)
    assert part(directions(Z, dtype, steps, coefficients), want) <= (1e-2 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize(("m", "n"), [(2048, 2048), (512, 2048), (2048, 8192), (2048, 128256), (100, 149)])
def test_the_way_is_never_dearer_than_the_plain_one(m: int, n: int) -> None:
    for steps in range(1, 12):
        plain = newton_schulz.Way((1,) * steps, "X")
        found = newton_schulz.way(m, n, torch.float16, steps)
        assert sum(found.segments) == steps and max(found.segments) <= newton_schulz.SEGMENT
        assert newton_schulz.products(m, n, found) <= newton_schulz.products(m, n, plain)
        assert newton_schulz.way(m, n, torch.bfloat16, steps) == plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("own", [0.0, 2.0])
@pytest.mark.parametrize("m", [256, 300, 515])
def test_stripes_hold_all_from_the_diagonal_on(m: int, own: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    A = torch.randn(2, m, m).mul_(0.1)
    A = (A + A.mT).to(dtype)
    whole, striped = (torch.full_like(A, float("nan")) for _ in range(2))
    newton_schulz._product(A, A, 0.5, whole, own)
    newton_schulz._upper(A, A, 0.5, striped, own)
    torch.testing.assert_close(striped.triu(), whole.triu(), rtol=2e-3 if dtype == torch.float16 else 1e-4, atol=1e-4)
    assert striped.isnan().float().mean() > 0.2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_stack_that_is_made_in_pieces_is_the_same(dtype: str, monkeypatch: Any) -> None:
    Z = spectrum("gaussian", (16, 700))
    whole = directions(Z, getattr(torch, dtype))
    monkeypatch.setattr(newton_schulz, "PIECE", 5000)
    np.testing.assert_allclose(directions(Z, getattr(torch, dtype)), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ns_dtype", ["float16", "float32"])
def test_matrices_of_one_shape_go_together_and_it_changes_nothing(ns_dtype: str, device: str) -> None:
    shapes = [(24, 64)] * 5 + [(64, 24)] * 3 + [(40, 40)] * 2
    together, alone = (matrices(shapes, device=device) for _ in range(2))
    for p, q in zip(together, alone, strict=True):
        assert torch.equal(p, q)
    opt, single = Muon(together, **HYPER, ns_dtype=ns_dtype), [Muon([q], **HYPER, ns_dtype=ns_dtype) for q in alone]
    for t in range(3):
        give(together, t)
        opt.step()
        for p, q, one in zip(together, alone, single, strict=True):
            q.grad = p.grad
            one.step()
            assert part(exact(p), exact(q)) <= 1e-6
            assert torch.equal(opt.state[p]["momentum_buffer"], one.state[q]["momentum_buffer"])
            with torch.no_grad():
                q.copy_(p)


def test_room_bounds_how_many_go_together(monkeypatch: Any) -> None:
    monkeypatch.setattr("refopt_cuda.optim.muon.ROOM", 3 * 4 * 24 * 64 * 3)
    sizes: list[int] = []
    real = newton_schulz.orthogonal
    monkeypatch.setattr(newton_schulz, "orthogonal", lambda X, *a: sizes.append(len(X)) or real(X, *a))
    walk(matrices([(24, 64)] * 7), 1)
    assert sum(sizes) == 7 and max(sizes) == 3


@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resuming_changes_no_bit(dtype: torch.dtype, momentum_dtype: str, device: str) -> None:
    params = matrices(dtype=dtype, device=device)
    opt = walk(params, 3, momentum_dtype=momentum_dtype)
    other = Muon(twins(params, device), momentum_dtype=momentum_dtype)
    other.load_state_dict(through_a_file(opt.state_dict()))
    buffers = {s["momentum_buffer"].dtype for s in other.state.values()}
    assert buffers == {getattr(torch, momentum_dtype)}
    assert {k: other.param_groups[0][k] for k in HYPER} == HYPER
    resume_alike(opt, other)


def test_a_state_of_torch_optim_muon_loads(device: str) -> None:
    params = matrices([(24, 64), (40, 40)], torch.bfloat16, device)
    theirs = torch.optim.Muon(params, **HYPER)
    give(params, 0)
    theirs.step()
    ours = Muon(twins(params, device))
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for p, q in zip(ours.param_groups[0]["params"], params, strict=True):
        kept = ours.state[p]["momentum_buffer"]
        assert kept.dtype == torch.float32 and torch.equal(kept, theirs.state[q]["momentum_buffer"].float())
    assert {k: ours.param_groups[0][k] for k in HYPER} == HYPER
    give(ours.param_groups[0]["params"], 1)
    ours.step()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_with_the_same_bits(way: Any) -> None:
    opt = walk(matrices(), 2)
    resume_alike(opt, way(opt))


def test_the_momentum_in_bfloat16_is_the_references_rounded(device: str) -> None:
    (p,) = matrices([(33, 65)], device=device)
    opt = walk([p], 1, momentum_dtype="bfloat16")
    before = exact(opt.state[p]["momentum_buffer"])
    give([p], 1)
    opt.step()
    new = F32(0.8) * before + F32(1 - 0.8) * exact(p.grad)
    assert torch.equal(opt.state[p]["momentum_buffer"].cpu(), torch.from_numpy(new).bfloat16())


def test_parameters_and_gradients_need_not_be_row_major(device: str) -> None:
    (p,), (q,) = (matrices([(24, 64)], device=device) for _ in range(2))
    q.data = q.data.t().contiguous().t()
    one, other = Muon([p], **HYPER), Muon([q], **HYPER)
    for t in range(2):
        give([p], t)
        q.grad = p.grad.t().contiguous().t()
        one.step()
        other.step()
        torch.testing.assert_close(p, q.contiguous(), rtol=1e-6, atol=1e-7)


def test_no_gradient_no_step_and_zero_gradients_move_nothing(device: str) -> None:
    params = matrices([(24, 64), (8, 8), (0, 4)], device=device)
    opt = Muon(params, lr=0.1, weight_decay=0.0)
    before = [exact(p) for p in params]
    params[1].grad, params[2].grad = torch.zeros_like(params[1]), torch.zeros_like(params[2])
    opt.step()
    assert params[0] not in opt.state and all((exact(p) == b).all() for p, b in zip(params, before, strict=True))
    assert opt.state[params[1]]["step"] == 1


def test_what_is_not_finite_stays_in_its_matrix(device: str) -> None:
    params = matrices([(24, 64), (24, 64)], device=device)
    opt = Muon(params, **HYPER)
    give(params, 0)
    params[0].grad[3, 4] = float("inf")
    opt.step()
    assert params[0].isnan().all() and params[1].isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e15])
def test_a_gradients_size_does_not_matter(size: float, device: str) -> None:
    """Above eps; 1e-30 lies below, and with eps 0 above."""
    (p,), (q,) = (matrices([(24, 64)], device=device) for _ in range(2))
    for w, factor in ((p, 1.0), (q, size)):
        give([w], 0)
        w.grad.mul_(factor * 1000)
        Muon([w], eps=0.0, ns_dtype="float32").step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


ARGUMENTS = [
    ({"lr": -1.0}, ValueError, "lr .*-1.0"),
    ({"lr": "fast"}, TypeError, "lr .*'fast'"),
    ({"momentum": 1.0}, ValueError, "momentum .*1.0"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay .*-0.1"),
    ({"nesterov": 1}, TypeError, "nesterov .*1"),
    ({"ns_steps": 100}, ValueError, "ns_steps .*100"),
    ({"ns_steps": 2.5}, ValueError, "ns_steps .*2.5"),
    ({"eps": -1e-7}, ValueError, "eps .*-1e-07"),
    ({"ns_coefficients": (1.0, 2.0)}, ValueError, r"ns_coefficients .*\(1.0, 2.0\)"),
    ({"ns_coefficients": (1.0, 2.0, float("nan"))}, ValueError, "ns_coefficients .*nan"),
    ({"adjust_lr_fn": "none"}, ValueError, "adjust_lr_fn must be one of None, 'original'.*'none'"),
    ({"ns_dtype": "fp8"}, ValueError, "ns_dtype must be one of .*'fp8'"),
    ({"momentum_dtype": "float16"}, ValueError, "momentum_dtype must be one of .*'float16'"),
]


@pytest.mark.parametrize(("words", "error", "message"), ARGUMENTS)
def test_impossible_arguments_are_named(words: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^Muon: {message}"):
        Muon(matrices([(3, 4)]), **words)
    opt = Muon(matrices([(3, 4)]))
    with pytest.raises(error, match=f"^Muon.add_param_group: {message}"):
        opt.add_param_group({"params": matrices([(4, 3)])} | words)
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (8, 3, 3, 3)])
def test_what_is_no_matrix_is_refused_with_a_word_on_what_to_do(shape: Any) -> None:
    with pytest.raises(ShapeError, match=r"^Muon.*muon needs two axes.*flatten a convolution to \(out, -1\)"):
        Muon(matrices([(3, 4), shape]))


@pytest.mark.parametrize("fault", ["gradient dtype", "lr", "shared", "momentum dtype", "momentum shape"])
def test_an_error_leaves_everything_unchanged(fault: str, device: str) -> None:
    params = matrices([(24, 64), (8, 8)], device=device)
    opt = Muon([{"params": params[:1]}, {"params": params[1:]}], **HYPER)
    give(params, 0)
    opt.step()
    give(params, 1)
    entry = opt.state[params[1]]
    if fault == "lr":
        opt.param_groups[1]["lr"] = -1.0
    elif fault == "shared":
        params[1].data = params[0].data.view(-1)[:64].view(8, 8)
    elif fault == "momentum dtype":
        entry["momentum_buffer"] = entry["momentum_buffer"].half()
    elif fault == "momentum shape":
        entry["momentum_buffer"] = entry["momentum_buffer"].view(4, 16)
    else:
        params[1].data = params[1].data.double()
    before = snapshot(opt)
    with pytest.raises((TypeError, ValueError, StateError), match=r"^Muon\.step: "):
        opt.step()
    unchanged(opt, before)


def test_the_state_of_other_shapes_or_another_optimizer_is_refused() -> None:
    opt = walk(matrices([(24, 64)]), 1)
    before = snapshot(opt)
    other = walk(matrices([(64, 24)]), 1)
    with pytest.raises(ShapeError, match=r"\(64, 24\).*\(24, 64\)"):
        opt.load_state_dict(other.state_dict())
    adam = torch.optim.AdamW(matrices([(24, 64)]))
    give(adam.param_groups[0]["params"], 0)
    adam.step()
    with pytest.raises((StateError, ValueError)):
        opt.load_state_dict(adam.state_dict())
    unchanged(opt, before)


def test_a_learning_rate_may_be_a_tensor_or_follow_a_schedule() -> None:
    (p,), (q,) = (matrices([(24, 64)]) for _ in range(2))
    rate = torch.tensor(0.1)
    one, other = Muon([p], lr=rate), Muon([q], lr=float(rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda t: 0.5**t)
    for t in range(3):
        give([p], t)
        q.grad = p.grad
        one.step()
        other.step()
        schedule.step()
        rate.mul_(0.5)
        assert torch.equal(p, q)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 2048), (1100, 4500), (4500, 1100), (1024, 40000)])
@pytest.mark.parametrize("ns_dtype", ["float16", "bfloat16", "float32"])
def test_large_matrices_on_a_device(shape: Any, ns_dtype: str) -> None:
    """Products in stripes; beside float64 on the device."""
    torch.manual_seed(0)
    Z = torch.randn(3, *shape, device="cuda", dtype=torch.float64)
    params = [torch.nn.Parameter(torch.zeros(shape, device="cuda")) for _ in Z]
    for p, z in zip(params, Z, strict=True):
        p.grad = z.float()
    Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw", ns_dtype=ns_dtype).step()
    for p, z in zip(params, Z, strict=True):
        X = z.float().double()
        X = (X.mT if shape[0] > shape[1] else X) / X.norm()
        for _ in range(5):
            A = X @ X.mT
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * (A @ A)) @ X
        X = X.mT if shape[0] > shape[1] else X
        got = p.double() / (-0.2 * max(shape) ** 0.5)
        assert (got - X).norm() <= PART[ns_dtype] * X.norm(), ((got - X).norm() / X.norm()).item()


@pytest.mark.gpu
def test_a_step_waits_for_nothing() -> None:
    params = matrices([(256, 256)] * 3 + [(128, 1024)], torch.bfloat16, "cuda")
    opt = walk(params, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 8192), (2048, 2048), (20000, 1024)])
def test_a_step_takes_no_more_room_than_it_says(shape: Any) -> None:
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for _ in range(40)]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = Muon(params)
    opt.step()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    opt.step()
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.max_memory_allocated() - held <= 1.1 * ROOM
