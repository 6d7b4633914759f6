"""LAMB, LARS, Adafactor, CAME and Adam-mini for torch: the bits of the reference, and refusals that change nothing."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import refopt
from refopt.spec import ShapeError, StateError
from refopt_cuda.kernels import whole_cuda
from refopt_cuda.kernels.whole_rules import form_of, rows
from refopt_cuda.optim import whole_launch, whole_names
from tests.bits import same_bits
from tests.kernels.whole_emulator import Emulated
from tests.optim.pairs import exact, give, parameter, weights

SHAPES = [(), (0,), (7,), (257,), (3, 40), (33, 300), (2, 5, 264), (0, 4)]


class Case(NamedTuple):
    """A class, its arguments, and the same for the reference."""

    name: str
    words: dict[str, Any]
    stem: str
    hyper: dict[str, Any]

    def make(self, params: Any, **more: Any) -> Any:
        return getattr(whole_names, self.name)(params, **(self.words | more))

    def __str__(self) -> str:
        return "-".join([self.name, *(str(v) for v in self.words.values() if isinstance(v, str))])


BETAS = {"betas": (0.8, 0.97), "eps": 1e-7, "lr": 0.013}
OURS = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "lr": 0.013}
FACTORS = {"eps": (1e-12, 0.03), "clip_threshold": 0.8, "decay_rate": -0.6, "weight_decay": 0.3}
CASES = [
    Case(
        "LAMB",
        BETAS | {"weight_decay": 0.06, "phi": (0.3, 4.0)},
        "lamb",
        OURS | {"wd": 0.06, "phi_low": 0.3, "phi_high": 4.0},
    ),
    Case(
        "LAMB",
        BETAS | {"variant": "clip", "weight_decay": 0.06, "max_unorm": 0.1, "exclude_1d": True},
        "lamb",
        OURS | {"variant": "clip", "wd": 0.06, "max_unorm": 0.1, "exclude_1d": True},
    ),
    Case(
        "LARS",
        {"lr": 0.7, "momentum": 0.85, "weight_decay": 0.07, "trust_coefficient": 0.02, "eps": 1e-6},
        "lars",
        {"lr": 0.7, "momentum": 0.85, "wd": 0.07, "trust": 0.02, "eps": 1e-6},
    ),
    Case(
        "Adafactor",
        FACTORS,
        "adafactor",
        {"eps1": 1e-12, "eps2": 0.03, "clip": 0.8, "decay_rate": -0.6, "wd": 0.3},
    ),
    Case(
        "Adafactor",
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "beta1": 0.8, "weight_decay": 0.2},
        "adafactor",
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "beta1": 0.8, "wd": 0.2},
    ),
    Case(
        "Adafactor",
        {"variant": "torch", "lr": 4e-3, "weight_decay": 3, "d": 0.8, "beta2_decay": -0.6},
        "adafactor",
        {"variant": "torch", "lr": 4e-3, "wd": 3, "clip": 0.8, "decay_rate": -0.6},
    ),
    Case(
        "CAME",
        {"lr": 0.003, "betas": (0.8, 0.97, 0.99), "eps": (1e-12, 1e-6), "clip_threshold": 0.8, "weight_decay": 0.2},
        "came",
        {"lr": 0.003, "beta1": 0.8, "beta2": 0.97, "beta3": 0.99, "eps1": 1e-12, "eps2": 1e-6, "clip": 0.8, "wd": 0.2},
    ),
    Case(
        "AdamMini",
        BETAS | {"weight_decay": 0.11, "blocks": "whole"},
        "adam_mini",
        OURS | {"wd": 0.11, "blocks": "whole"},
    ),
    Case("AdamMini", BETAS | {"blocks": "elementwise"}, "adam_mini", OURS | {"blocks": "elementwise"}),
]


def mirrored(case: Case, params: list[Any], steps: int, **more: Any) -> Any:
    """The torch optimizer after some steps that the reference has taken as well, compared after each."""
    opt, ours = case.make(params, **more), refopt.Optimizer(case.stem, **(case.hyper | more))
    values = [exact(p) for p in params]
    state = ours.init(values)
    keys = {s.name: s.torch or s.name for s in ours.rule.states}
    for t in range(steps):
        give(params, t)
        if t == 1:
            params[2].grad = None
        grads = [None if p.grad is None else exact(p.grad) for p in params]
        opt.step()
        with np.errstate(all="ignore"):
            values, state = ours.step(values, grads, state)
        values = [
            torch.from_numpy(np.array(x)).to(p.dtype).float().numpy() for x, p in zip(values, params, strict=True)
        ]
        for p, x, s in zip(params, values, state, strict=True):
            same_bits(exact(p), x, f"step {t}: p {tuple(p.shape)}")
            assert opt.state[p]["step"] == s["t"]
            for n in s.keys() - {"t"}:
                same_bits(opt.state[p][keys[n]].cpu().numpy(), np.asarray(s[n]), f"step {t}: {n} {tuple(p.shape)}")
    return opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_class_steps_as_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    mirrored(case, weights(SHAPES, dtype, device), 3)


@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_ascent_is_a_step_against_the_gradient(case: Case, device: str) -> None:
    mirrored(case, weights(SHAPES, torch.float32, device), 2, maximize=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resuming_changes_no_bit(case: Case, device: str) -> None:
    params = weights(SHAPES, torch.bfloat16, device)
    opt = mirrored(case, params, 2)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    copies = [parameter(p.detach().clone(), p.dtype, device) for p in params]
    other = case.make(copies)
    other.load_state_dict(torch.load(file, weights_only=True))
    for t in (7, 8):
        give(params, t)
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad
        opt.step()
        other.step()
    for p, q in zip(params, copies, strict=True):
        same_bits(exact(q), exact(p), "p")
        assert opt.state[p].keys() == other.state[q].keys()
        for key, x in opt.state[p].items():
            y = other.state[q][key]
            assert (x.dtype == y.dtype == torch.float32 and torch.equal(x, y)) if torch.is_tensor(x) else x == y


@pytest.mark.gxx
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=str)
def test_a_launch_is_bound_once_and_steps_as_the_loops_of_the_cpu(
    case: Case, gxx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens on CUDA devices, over an emulated one, with step counts that differ."""
    grid, binds = Emulated(gxx, tmp_path), []
    bind = whole_cuda.Whole.bind
    monkeypatch.setattr(whole_cuda, "Cuda", lambda: grid)
    monkeypatch.setattr(
        whole_cuda.Whole, "bind", lambda self, tensors: (binds.append(len(tensors)), bind(self, tensors))
    )
    monkeypatch.setattr(whole_launch, "on_stream", lambda stream: contextlib.nullcontext())
    sides = []
    for launched in (False, True):
        params = weights([(7,), (3, 40), (33, 304)], torch.float32, "cpu")
        params.append(parameter(torch.ones(5, 264)))
        opt, launch = case.make(params), None
        for t in range(4):
            give(params, t)
            if t == 1:
                params[0].grad = None
            if not launched:
                opt.step()
                continue
            hyper = opt.hyper(opt.param_groups[0], "") | {"maximize": False}
            form = form_of(case.stem, hyper)
            work = [opt._ready((p, p.grad), hyper, form, 0, "") for p in params if p.grad is not None]
            launch = launch or whole_launch.Launch(form, hyper, (torch.float32, torch.float32))
            launch.step(work, {w.kind: rows(case.stem, *w.kind, hyper) for w in work}, 0)
            for w in work:
                w.slot.entry["step"], opt.state[w.p] = w.t, w.slot.entry
        sides.append((opt, params))
    assert binds == [4, 3, 4], "again only where the set of parameters has changed"
    (one, ours), (other, theirs) = sides
    for p, q in zip(ours, theirs, strict=True):
        same_bits(exact(q), exact(p), "p")
        for key, x in one.state[p].items():
            y = other.state[q][key]
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y


def test_groups_of_adam_mini_have_blocks_of_their_own(device: str) -> None:
    a, b = weights([(6, 40), (40,)], torch.float32, device)
    opt = whole_names.AdamMini([{"params": [a], "blocks": "heads", "heads": 3}, {"params": [b], "blocks": "whole"}])
    give([a, b], 0)
    opt.step()
    assert [tuple(opt.state[p]["v"].shape) for p in (a, b)] == [(3,), ()]


def test_a_parameter_that_is_not_row_major_is_stepped_in_place(device: str) -> None:
    (p,) = weights([(5, 300)], torch.float32, device)
    q = parameter(p.detach().clone().t().contiguous(), torch.float32, device)
    q.data = q.data.t()
    assert not q.is_contiguous()
    give([p], 0)
    q.grad = p.grad.clone()
    for x in (p, q):
        whole_names.CAME([x]).step()
    assert torch.equal(p, q)


def test_nothing_changes_where_a_step_is_refused(device: str) -> None:
    params = weights([(3, 40), (7,)], torch.float32, device)
    opt = mirrored(CASES[3], [*params, *weights([(5,)], torch.float32, device)], 2)
    give(params, 5)
    before = [exact(p) for p in params]
    opt.state[params[1]]["variance"] = torch.zeros(8, device=device)
    with pytest.raises(ShapeError, match=r"variance.*\(8,\)"):
        opt.step()
    opt.state[params[1]]["variance"] = torch.zeros(7, dtype=torch.float64, device=device)
    with pytest.raises(StateError, match="float64"):
        opt.step()
    for p, x in zip(params, before, strict=True):
        same_bits(exact(p), x, "p")
    assert opt.state[params[0]]["step"] == 2


def test_arguments_are_checked_under_their_names() -> None:
    p = [parameter(torch.ones(3, 4))]
    wrong: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"LAMB: betas\[1\] must be in", lambda: whole_names.LAMB(p, betas=(0.9, 1.5))),
        (ValueError, "LAMB: betas must be 2 numbers", lambda: whole_names.LAMB(p, betas=(0.9,))),  # type: ignore[arg-type]
        (ValueError, "LARS: weight_decay must be", lambda: whole_names.LARS(p, weight_decay=-1.0)),
        (ValueError, "lr must be None with relative_step=True", lambda: whole_names.Adafactor(p, lr=1e-3)),
        (ValueError, "CAME: lr must be > 0", lambda: whole_names.CAME(p, lr=0.0)),
        (ValueError, "AdamMini: blocks must be one of", lambda: whole_names.AdamMini(p, blocks="columns")),
        (TypeError, "maximize must be True or False", lambda: whole_names.LAMB(p, maximize=1)),  # type: ignore[arg-type]
        (ShapeError, "needs two axes", lambda: whole_names.AdamMini([parameter(torch.ones(3))])),
        (TypeError, "must be dense float32", lambda: whole_names.CAME([parameter(torch.ones(3), torch.float64)])),
    ]
    for error, words, make in wrong:
        with pytest.raises(error, match=words):
            make()


def test_the_state_of_another_shape_is_refused() -> None:
    one, other = (whole_names.Adafactor([parameter(torch.ones(n, 4))]) for n in (3, 4))
    one.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    one.step()
    with pytest.raises(ShapeError, match="row_var"):
        other.load_state_dict(one.state_dict())
    assert not other.state
