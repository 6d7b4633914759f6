"""Optimizers of some kinds of tensors, and what steps make besides: what is said is what torch's passes allocate."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MEASURED = "llama1b", "Muon", "extra"
RESULTS = Path(__file__).parents[2] / "docs/bench/results.csv"
SHAPES = [(96, 320), (320, 96), (96, 320)]
PASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "GaLoreAdamW": ("galore", {"rank": 24}),
    "APOLLOAdamW": ("apollo", {"rank": 24}),
    "SM3": ("sm3", {}),
}


def traced(name: str, weights: str, words: dict[str, Any]) -> int:
    """The most bytes that the second step of a class has beside weights, gradients and states."""
    import torch

    import refopt_cuda as rc
    from tests.memory.traced import Held

    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = getattr(rc.optim, name)(params, lr=0.01, **words, **({} if name == "SM3" else {"update_proj_gap": 1}))
    opt.step()
    there = [*params, *(p.grad for p in params), *(x for entry in opt.state.values() for x in entry.values())]
    with Held() as held:
        before = [held.see(x) for x in there if isinstance(x, torch.Tensor)] and held.now
        opt.step()
    return held.peak - before


@pytest.mark.parametrize(
    ("name", "weights"),
    [("GaLoreAdamW", "f32"), ("GaLoreAdamW", "bf16"), ("APOLLOAdamW", "bf16"), ("SM3", "f32"), ("SM3", "bf16")],
)
def test_what_passes_of_torch_allocate_was_said(
    ref: ModuleType, name: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the decomposition's own workspace, and APOLLO's projections, which a CPU keeps."""
    pytest.importorskip("torch", reason="counts the tensors of refopt_cuda.optim")
    from refopt_cuda.optim import sm3

    monkeypatch.setattr(sm3, "_root", lambda x: x.sqrt())  # as on CUDA
    rule, words = PASSES[name]
    said = ref.memory.scratch(ref.Optimizer(rule, {"p": weights}, **words), SHAPES)
    aside = {"galore": 32 * 96**2, "apollo": -4 * 24 * 96 * len(SHAPES)}.get(rule, 0)
    assert 0.97 < (said - aside) / traced(name, weights, words) < 1.3


def test_the_stack_of_muon_is_the_one_that_was_measured(ref: ModuleType) -> None:
    """Of Llama-3.2-1B's matrices, on one H100."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["work"], r["subject"], r["metric"]) == MEASURED]
    model = ref.models.named("llama-3.2-1b")
    said = ref.memory.scratch(ref.Optimizer("muon", {"p": "bf16"}), model.shapes) / model.size
    assert said == pytest.approx(float(rows[-1]["value"]), rel=0.001)


def test_a_matrix_that_is_stepped_alone_takes_no_more(ref: ModuleType) -> None:
    shapes = [(2048, 2048)] * 40
    for rule, words in (("muon", {}), ("galore", {"rank": 512}), ("apollo", {"rank": 512}), ("sm3", {})):
        opt = ref.Optimizer(rule, **words)
        assert 0 < ref.memory.scratch(opt, shapes[:1]) <= ref.memory.scratch(opt, shapes, alone=True)
        assert ref.memory.scratch(opt, shapes, alone=True) < ref.memory.scratch(opt, shapes)


@pytest.mark.parametrize(
    ("rule", "codecs", "said"),
    [("adam_mini", None, 0), ("adam_mini", {"m": "dynamic8"}, 4), ("lamb", "dynamic8", 8), ("came", {"m": "q4"}, 4)],
)
def test_codes_of_rules_that_see_whole_tensors_are_decoded(ref: ModuleType, rule: str, codecs: Any, said: int) -> None:
    opt = ref.Optimizer(rule, codecs)
    assert ref.memory.scratch(opt, [(4096, 4096), (8, 8)]) == said * 4096**2
    assert ref.memory.scratch(ref.Optimizer("adamw", "dynamic8"), [(4096, 4096)]) == 0


def test_sm3_holds_the_updates_of_the_tensor_before(ref: ModuleType) -> None:
    opt, large, small = ref.Optimizer("sm3"), (64, 64), (8, 8)
    said = {shapes: ref.memory.scratch(opt, shapes) for shapes in ((large, small), (small, large), (large, large))}
    assert said == {
        (large, small): 17 * 64**2,
        (small, large): 17 * 64**2 + 4 * 8**2,
        (large, large): 21 * 64**2,
    }


def split(ref: ModuleType) -> Any:
    rest = ref.Optimizer("adamw", {"p": "bf16"})
    return ref.memory.Split(ref.Optimizer("galore", {"p": "bf16"}, rank=64), rest, rest)


def test_each_kind_of_tensor_has_the_states_of_its_optimizer(ref: ModuleType) -> None:
    model, opt = ref.models.named("gpt2"), split(ref)
    inside = model.linears()
    outside = model.size - sum(map(math.prod, inside))
    said = ref.memory.states(opt, model)
    assert said == ref.memory.states(opt.matrices, inside) + 8 * outside
    assert said == ref.memory.train(model, opt).states == ref.memory.peak(model, opt, batch=1, sequence=8).states


def test_the_temporaries_of_a_step_come_with_every_gradient_that_is_released(ref: ModuleType) -> None:
    model, opt, tokens = ref.models.named("gpt2"), split(ref), {"batch": 1, "sequence": 64, "blas": 0}
    kept, freed = (ref.memory.moments(model, opt, release=r, **tokens) for r in (False, True))
    alone = ref.memory.scratch(opt, model, alone=True)
    assert freed["first"].scratch - kept["first"].scratch == alone == freed["step"].scratch - kept["first"].scratch


def test_shapes_do_not_tell_tables_from_matrices(ref: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"tell matrices from tables need a Model, .*; got shapes"):
        ref.memory.states(split(ref), [(64, 64)])
    rows, whole = ref.Optimizer("adam_mini"), ref.Optimizer("adam_mini", blocks="whole")
    assert ref.memory.states(ref.memory.Split(rows, rows, whole), [(8, 4), (4,)]) == 4 * (32 + 8 + 4 + 1)


def test_a_rule_that_sees_whole_tensors_gathers_one_of_many_devices(ref: ModuleType) -> None:
    """Muon's largest: weights, gradient and momentum of an MLP's matrix."""
    model, tokens = ref.models.named("llama-2-7b"), {"batch": 1, "sequence": 8, "ranks": 8, "stage": 3, "blas": 0}
    rest = ref.Optimizer("adamw", {"p": "bf16"})
    opt = ref.memory.Split(ref.Optimizer("muon", {"p": "bf16"}), rest, rest)
    found = ref.memory.moments(model, opt, **tokens)["step"].scratch
    assert found == ref.memory.scratch(opt, model, alone=True) + (2 + 2 + 4) * 11008 * 4096
