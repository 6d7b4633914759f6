"""GaLore as a drop-in: the reference's steps to 1e-4, its directions, and galore_torch's words."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt import ShapeError, StateError
from refopt_cuda.optim import galore
from refopt_cuda.optim.galore import GaLoreAdamW, GaLoreAdamW8bit, basis
from tests.optim.pairs import exact, parameter, snapshot, unchanged
from tests.optim.test_checkpoints import resume_alike, through_a_file, twins
from tests.optim.test_muon import F32, give, matrices, part

ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
GALORE = {"rank": 3, "update_proj_gap": 3, "scale": 0.5}
WORDS = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "wd": 0.1, "rank": 3, "gap": 3, "scale": 0.5}
SHAPES = [(12, 20), (20, 12), (9, 9), (64, 32), (3, 40)]
NAMES = {"P": "P", "Q": "Q", "m": "exp_avg", "v": "exp_avg_sq"}


def walk(params: Any, steps: int, **words: Any) -> GaLoreAdamW:
    opt = GaLoreAdamW(params, **(ADAM | GALORE | words))
    for t in range(steps):
        give(params, t)
        opt.step()
    return opt


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_every_step_is_the_references(proj_type: str, device: str) -> None:
    """Seven steps, three looks for directions; the reference begins each step where the drop-in stands."""
    params = matrices(SHAPES, device=device)
    opt = GaLoreAdamW([{"params": params, **GALORE, "proj_type": proj_type}], **ADAM)
    ref = refopt.Optimizer("galore", **WORDS, proj_type=proj_type)
    state = ref.init([exact(p) for p in params])
    for t in range(7):
        give(params, t)
        before = [exact(p) for p in params]
        want, state = ref.step(before, [exact(p.grad) for p in params], state)
        opt.step()
        for k, (p, w, b) in enumerate(zip(params, want, before, strict=True)):
            kept = exact(p) - b, w - b
            assert part(*kept) <= 1e-4, (tuple(p.shape), t, part(*kept))
            names = set(opt.state[p]) - {"step"}
            assert names == {NAMES[name] for name in state[k] if name in NAMES}
            for name in names & {"P", "Q"}:
                assert part(exact(opt.state[p][name]), state[k][name]) <= 1e-5
            for name in ("m", "v"):
                np.testing.assert_allclose(exact(opt.state[p][NAMES[name]]), state[k][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit", "APOLLOAdamW", "APOLLOAdamW8bit"])
def test_how_many_matrices_are_projected_at_a_time_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, kept, together, turns = getattr(rc.optim, name), [], galore.together, []

    def counted(work: Any, full: Any) -> Any:
        some = list(together(work, full))
        turns.append(len(some))
        return some

    monkeypatch.setattr(galore, "together", counted)
    for most in (galore.MOST, 400, 0):
        monkeypatch.setattr(galore, "MOST", most)
        params = matrices(SHAPES)
        opt = made(params, lr=0.02, rank=3, update_proj_gap=2, min_8bit_size=30)
        for t in range(3):
            give(params, t)
            opt.step()
        kept.append([exact(p) for p in params])
    all_at_once, some, alone = (set(turns[k : k + len(turns) // 3]) for k in range(0, len(turns), len(turns) // 3))
    assert all_at_once == {1} and min(some) > 1 and min(alone) > max(some)
    assert all(np.array_equal(a, b) for one in kept[1:] for a, b in zip(kept[0], one, strict=True))


def test_directions_are_those_of_the_singular_value_decomposition(device: str) -> None:
    """As projectors, and of both sides; signs by the entry of largest magnitude, the first of equals."""
    rng = np.random.default_rng(0)
    for shape in ((12, 40), (40, 12), (16, 16)):
        g = rng.standard_normal(shape).astype(F32)
        u = np.linalg.svd(g.astype(float))[0][:, :5]
        kept = exact(basis(torch.from_numpy(g).to(device), 5))
        np.testing.assert_allclose(kept @ kept.T, u @ u.T, atol=1e-6)
        assert (np.take_along_axis(kept, np.abs(kept).argmax(0)[None], 0) > 0).all()
    tie = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device)
    assert basis(tie, 1)[0, 0] > 0 > basis(tie, 1)[1, 0]


@pytest.mark.parametrize("size", [1e-25, 1e30])
def test_directions_do_not_depend_on_the_gradients_size(size: float) -> None:
    g = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 30)).astype(F32))
    torch.testing.assert_close(basis(g * size, 3), basis(g, 3), rtol=1e-4, atol=1e-5)


def test_a_group_without_rank_takes_the_references_adamw(device: str) -> None:
    """galore_torch's AdamW: eps before the bias correction, decay after the step; any number of axes."""
    params = matrices([(12, 20), (7,), ()], device=device)
    opt = GaLoreAdamW(params, **ADAM)
    words = {name: WORDS[name] for name in ("lr", "beta1", "beta2", "eps", "wd")}
    ref = refopt.Optimizer("adamw", eps_at="uncorrected", decay_order="after", **words)
    state = ref.init([exact(p) for p in params])
    for t in range(4):
        give(params, t)
        before = [exact(p) for p in params]
        want, state = ref.step(before, [exact(p.grad) for p in params], state)
        opt.step()
        for p, w, b in zip(params, want, before, strict=True):
            assert part(exact(p) - b, w - b) <= 1e-4
    assert set(opt.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("rank", [None, 16])
def test_8_bit_moments_are_the_references(rank: int | None, device: str) -> None:
    """Each step from the drop-in's weights. R is rounded otherwise: a few codes lie on the other side of a midpoint."""
    params = matrices([(24, 640), (640, 24), (16, 16)], device=device)
    words = {name: WORDS[name] for name in ("lr", "beta1", "beta2", "eps", "wd")}
    opt = GaLoreAdamW8bit(params, **ADAM, rank=rank, update_proj_gap=3, scale=0.5)
    codecs = [{"m": "dynamic8", "v": "dynamic8"}, {}]
    more = {"eps_at": "uncorrected", "decay_order": "after"} if rank is None else {"rank": 16, "gap": 3, "scale": 0.5}
    refs = [refopt.Optimizer("adamw" if rank is None else "galore", codecs[k == 2], **words, **more) for k in range(3)]
    state = [ref.init([exact(p)]) for ref, p in zip(refs, params, strict=True)]
    for t in range(5):
        give(params, t)
        before = [exact(p) for p in params]
        opt.step()
        for k, (p, b) in enumerate(zip(params, before, strict=True)):
            (want,), state[k] = refs[k].step([b], [exact(p.grad)], state[k])
            assert part(exact(p) - b, want - b) <= 2e-3, (t, tuple(p.shape))
            entry = opt.state[p]
            assert ("m.codes" in entry) == (k < 2) == ("exp_avg" not in entry)
            for name in ("m", "v") if k < 2 else ():
                box = state[k][0][name]
                assert (entry[f"{name}.codes"].cpu().numpy() != box.codes).mean() <= 2e-3
                np.testing.assert_allclose(entry[f"{name}.scales"].cpu(), box.scales, rtol=1e-4)


@pytest.mark.parametrize("rank", [None, 16])
def test_8_bit_moments_of_a_matrix_that_lies_by_columns_are_those_of_its_row_major_twin(rank: int | None, device: str):
    rows = matrices([(64, 128)], device=device)
    columns = [torch.nn.Parameter(rows[0].detach().t().contiguous().t())]
    one, two = (GaLoreAdamW8bit(params, **ADAM, rank=rank) for params in (rows, columns))
    for t in range(3):
        give(rows, t)
        columns[0].grad = rows[0].grad.t().contiguous().t()
        one.step(), two.step()
    assert columns[0].stride() == (1, 64)
    assert part(exact(columns[0]), exact(rows[0])) <= 1e-5


def test_groups_are_written_as_for_galore_torch() -> None:
    one, other = matrices([(12, 20), (20, 12)])
    opt = GaLoreAdamW([{"params": [other]}, {"params": [one], **GALORE, "proj_type": "std"}], lr=0.01)
    give([one, other], 0)
    opt.step()
    assert opt.state[one]["exp_avg"].shape == (3, 20) and opt.state[other]["exp_avg"].shape == (20, 12)
    assert opt.defaults["betas"] == (0.9, 0.999) and opt.defaults["eps"] == 1e-6 and opt.defaults["weight_decay"] == 0


def test_moments_stay_when_directions_change() -> None:
    (p,) = matrices([(12, 20)])
    opt = walk([p], 3)
    P, m = opt.state[p]["P"].clone(), opt.state[p]["exp_avg"].clone()
    p.grad = torch.from_numpy(np.random.default_rng(7).standard_normal((12, 20)).astype(F32))
    opt.step()
    new = opt.state[p]["P"]
    assert not torch.allclose(new, P)
    torch.testing.assert_close(opt.state[p]["exp_avg"], 0.8 * m + (1 - 0.8) * (new.mT @ p.grad), rtol=1e-4, atol=1e-6)


def test_a_step_stays_in_the_directions_kept() -> None:
    (p,) = matrices([(12, 20)])
    before = exact(p)
    opt = walk([p], 3, weight_decay=0.0)
    moved, P = exact(p) - before, exact(opt.state[p]["P"])
    assert np.linalg.matrix_rank(moved, tol=1e-4) == 3
    np.testing.assert_allclose(P @ (P.T @ moved), moved, atol=1e-5)


def test_resuming_8_bit_moments_changes_no_bit(device: str) -> None:
    params = matrices([(24, 640), (12, 20)], torch.bfloat16, device)
    opt = GaLoreAdamW8bit(params, **ADAM, rank=8)
    for t in range(2):
        give(params, t)
        opt.step()
    other = GaLoreAdamW8bit(twins(params, device), rank=8)
    other.load_state_dict(through_a_file(opt.state_dict()))
    resume_alike(opt, other)
    with pytest.raises(StateError, match=r"a group has codecs .*'dynamic8'.*, this optimizer has .*'f32'"):
        GaLoreAdamW(twins(params, device), rank=8).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resuming_changes_no_bit(dtype: torch.dtype, device: str) -> None:
    """Over a look for new directions."""
    params = matrices(SHAPES, dtype, device)
    opt = walk(params, 2)
    other = GaLoreAdamW(twins(params, device), rank=1)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.param_groups[0]["rank"] == 3
    assert {x.dtype for s in other.state.values() for x in s.values() if torch.is_tensor(x)} == {torch.float32}
    resume_alike(opt, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_are_widened_and_rounded_once(dtype: torch.dtype, device: str) -> None:
    (p,) = matrices([(12, 20)], dtype, device)
    q = parameter(p.detach().float())
    give([p], 0)
    q.grad = p.grad.float().cpu()
    for w in (p, q):
        GaLoreAdamW([w], **ADAM, **GALORE).step()
    unequal = p.detach().cpu() != q.detach().cpu().to(dtype)
    assert unequal.sum() <= 2, "the GPU's sums may round a few otherwise"


def test_what_is_not_finite_stays_in_its_matrix(device: str) -> None:
    params = matrices([(12, 20), (12, 20)], device=device)
    give(params, 0)
    params[0].grad[3, 4] = float("inf")
    opt = GaLoreAdamW(params, **ADAM, **GALORE)
    opt.step()
    assert params[0].isnan().all() and opt.state[params[0]]["P"].isnan().all() and params[1].isfinite().all()


ARGUMENTS = [
    ({"lr": -1.0}, ValueError, "lr .*-1.0"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] .*1.0"),
    ({"betas": 0.9}, ValueError, "betas .*0.9"),
    ({"rank": 0}, ValueError, "rank .*0"),
    ({"rank": 2.5}, ValueError, "rank .*2.5"),
    ({"update_proj_gap": 0}, ValueError, "update_proj_gap .*0"),
    ({"scale": -1.0}, ValueError, "scale .*-1.0"),
    ({"proj_type": "middle"}, ValueError, "proj_type must be one of 'std'.*'middle'"),
]


@pytest.mark.parametrize(("words", "error", "message"), ARGUMENTS)
def test_impossible_arguments_are_named(words: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^GaLoreAdamW: {message}"):
        GaLoreAdamW(matrices([(12, 20)]), **(GALORE | words))
    with pytest.raises(TypeError, match="no argument 'blocks'; it takes max_grad_norm, gnorm_scale, codecs, block"):
        GaLoreAdamW(matrices([(12, 20)]), blocks=128)
    with pytest.raises(ValueError, match=r"min_8bit_size .*-1"):
        GaLoreAdamW8bit(matrices([(12, 20)]), min_8bit_size=-1)
    opt = GaLoreAdamW(matrices([(12, 20)]))
    with pytest.raises(error, match=f"^GaLoreAdamW.add_param_group: {message}"):
        opt.add_param_group({"params": matrices([(20, 12)])} | GALORE | words)
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((7,), ShapeError, "needs two axes, others take adamw"),
        ((2, 3, 4), ShapeError, "needs two axes"),
        ((2, 9), ValueError, "rank must be <= 2, got 3"),
    ],
)
def test_what_cannot_be_projected_is_refused(shape: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^GaLoreAdamW.*{message}"):
        GaLoreAdamW(matrices([shape]), **GALORE)


@pytest.mark.parametrize("fault", ["lr", "rank", "gradient", "state"])
def test_an_error_leaves_everything_unchanged(fault: str, device: str) -> None:
    params = matrices([(12, 20), (20, 12)], device=device)
    opt = GaLoreAdamW([{"params": params[:1]}, {"params": params[1:]}], **ADAM, **GALORE)
    give(params, 0)
    opt.step()
    give(params, 1)
    if fault == "lr":
        opt.param_groups[1]["lr"] = float("nan")
    elif fault == "rank":
        opt.param_groups[1]["rank"] = 4
    elif fault == "gradient":
        params[1].data = params[1].data.double()
    else:
        del opt.state[params[1]]["Q"]
    before = snapshot(opt)
    with pytest.raises((TypeError, ValueError, StateError), match=r"^GaLoreAdamW\.step: "):
        opt.step()
    unchanged(opt, before)


def test_the_state_of_another_rank_or_side_is_refused() -> None:
    opt = walk(matrices([(12, 20)]), 1)
    before, saved = snapshot(opt), opt.state_dict()
    for change in ({"rank": 2}, {"proj_type": "right"}, {"rank": None}):
        other = copy.deepcopy(saved)
        other["param_groups"][0] |= change
        with pytest.raises((ShapeError, StateError)):
            opt.load_state_dict(other)
    unchanged(opt, before)


@pytest.mark.gpu
def test_a_step_between_two_looks_waits_for_nothing() -> None:
    params = matrices([(64, 128), (128, 64)], torch.bfloat16, "cuda")
    opt = walk(params, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
