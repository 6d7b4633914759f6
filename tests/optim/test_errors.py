"""Bad input is one sentence that names the argument and its value, raised before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt import ShapeError, StateError
from tests.optim.pairs import ADAM, Case, give, gradient, parameter, snapshot, unchanged, walk, weights

SHAPES = [(64, 80), (9,), (80, 64)]
ADAMW8 = Case("AdamW8bit", "adamw", ADAM | {"weight_decay": 0.11})

ARGUMENTS = [
    ("AdamW", {"lr": -1e-3}, ValueError, "lr .*-0.001"),
    ("AdamW", {"lr": float("nan")}, ValueError, "lr .*nan"),
    ("AdamW", {"lr": "fast"}, TypeError, "lr .*'fast'"),
    ("AdamW", {"lr": torch.ones(2)}, ValueError, "lr "),
    ("Adam", {"eps": -1.0}, ValueError, "eps .*-1.0"),
    ("Lion", {"betas": (0.9, 1.0)}, ValueError, r"betas|beta2.*1\.0"),
    ("Lion", {"betas": (0.9,)}, ValueError, r"betas .*\(0\.9,\)"),
    ("Lion", {"betas": 0.9}, ValueError, "betas .*0.9"),
    ("AdamW8bit", {"weight_decay": -0.1}, ValueError, "-0.1"),
    ("SGD", {"momentum": -0.5}, ValueError, "momentum .*-0.5"),
    ("SGD", {"nesterov": True}, ValueError, "nesterov"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "dampening"),
    ("SGD", {"nesterov": 1, "momentum": 0.9}, TypeError, "nesterov .*1"),
    ("AdamW", {"rho": 1}, TypeError, "'rho'"),
    ("AdamW8bit", {"block": 0}, ValueError, "block .*0"),
    ("AdamW8bit", {"block": 2.5}, ValueError, "block .*2.5"),
    ("AdamW8bit", {"min_8bit_size": -1}, ValueError, "min.*size .*-1"),
    ("AdamW8bit", {"codecs": "dynamic9"}, ValueError, "'dynamic9'.*dynamic8"),
    ("AdamW8bit", {"codecs": {"u": "f32"}}, ValueError, "'u'.*m, v, w and p"),
    ("AdamW8bit", {"codecs": {"p": "bf16"}}, ValueError, "no kernel for format of weights 'bf16'"),
    ("AdamW8bit", {"codecs": 8}, (TypeError, ValueError), "8"),
    ("AdamW8bit", {"place": "cloud"}, ValueError, "place must be .*'resident'.*'cloud'"),
    ("SGD", {"momentum": 0.9, "lr_at": "insane"}, ValueError, "lr_at must be .*'insane'"),
    ("Lion", {"decay_order": "added"}, ValueError, "decay_order must be .*'added'"),
    ("AdamW8bit", {"codecs": {"p": "bf16_rem"}}, ValueError, "no format of weights 'bf16_rem'.*bf16_rem16"),
    ("AdamW8bit", {"codecs": {"p": "bf16_ecc.12"}}, ValueError, "'bf16_ecc.12': bf16_ecc takes 8, 16"),
    ("AdamW8bit", {"codecs": {"p": "bf16_rem16"}}, ValueError, "format of bfloat16 weights; these are float32"),
    ("AdamW", {"codecs": "fp8.e3m4"}, ValueError, "'fp8.e3m4': fp8 takes e4m3, e5m2"),
    ("AdamW", {"codecs": "q4:0"}, ValueError, "'q4:0': behind the colon stands a block size"),
    ("AdamW", {"codecs": "f32:64"}, ValueError, "'f32:64': behind the colon stands a block size"),
    ("AdamW", {"codecs": "q4:65"}, ValueError, "block must be even, got 65"),
    ("AdamW", {"codecs": {"m": "dynamic8:100", "v": "q4:64"}}, ValueError, r"divide the largest, got \[100, 64"),
    ("AdamW", {"seed": 0.5}, ValueError, "seed must be a whole number, got 0.5"),
    ("Composed", {"rule": "adamv"}, ValueError, "no rule 'adamv'.*adamw"),
    ("Composed", {"rule": "apollo"}, ValueError, "no kernel for rule 'apollo'.*adamw"),
    ("Composed", {"rule": refopt.rules.apollo}, ValueError, "no kernel for rule 'apollo'.*adamw"),
    ("Composed", {"rule": "sgd", "betas": (0.9, 0.99)}, TypeError, "'betas'.*momentum"),
]


@pytest.mark.parametrize(("name", "words", "error", "message"), ARGUMENTS)
def test_impossible_arguments_are_named(name: str, words: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{name}.*{message}" if error is not TypeError else message) as caught:
        getattr(rc.optim, name)([parameter(torch.ones(3))], **words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool], ids=str)
def test_weights_of_other_dtypes_are_refused_at_construction(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype).replace("torch.", "")):
        rc.optim.AdamW([torch.ones(3, dtype=dtype)])


def test_what_torch_refuses_is_refused() -> None:
    p = parameter(torch.ones(3))
    with pytest.raises(ValueError, match="empty"):
        rc.optim.AdamW([])
    with pytest.raises(TypeError):
        rc.optim.AdamW(p)
    with pytest.raises(ValueError, match=r"duplicate|more than one"):
        rc.optim.AdamW([{"params": [p]}, {"params": [p]}])


def test_an_option_that_is_set_later_is_followed_from_the_next_step_on() -> None:
    p = parameter(torch.ones(3))
    opt = rc.optim.SGD([p], lr=0.5, weight_decay=0.5)
    for decay, want in (("coupled", 0.25), ("decoupled", -0.3125)):
        opt.param_groups[0]["decay"] = decay
        p.grad = torch.ones(3)
        opt.step()
        assert p.tolist() == [want] * 3


GROUPS = [
    ({"lr": -1.0}, ValueError, "lr .*-1.0"),
    ({"block": 0}, ValueError, "block"),
    ({"min_size": -2}, ValueError, "min_size"),
    ({"codecs": "q3"}, ValueError, "'q3'"),
    ({"codecs": {"u": "f32"}}, ValueError, "'u'"),
    ({"rule": "lion"}, ValueError, "rule"),
    ({"params": [torch.ones(3, dtype=torch.int32)]}, TypeError, "int32"),
]


@pytest.mark.parametrize(
    ("words", "error", "message"), GROUPS, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_an_impossible_group_is_not_added(words: dict[str, Any], error: type[Exception], message: str) -> None:
    opt = ADAMW8.make([parameter(torch.ones(3))])
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": [parameter(torch.ones(4))]} | words)
    assert len(opt.param_groups) == 1


def bad_gradient(p: Any, fault: str) -> Any:
    """A gradient for `p` that no step can take."""
    g = gradient(p, 0)
    return {
        "sparse": lambda: g.to_sparse(),
        "float64": lambda: g.double(),
        "integer": lambda: g.int(),
        "complex": lambda: g.to(torch.complex64),
        "shape": lambda: g.t(),
        "elements": lambda: g[:5],
    }[fault]()


class Pretender(torch.nn.Parameter):
    """A parameter whose `.grad` is whatever it is told: torch itself checks assignments."""

    told: Any = None

    @property
    def grad(self) -> Any:  # type: ignore[override]
        return self.told


FAULTS = [("sparse", TypeError), ("float64", TypeError), ("integer", TypeError), ("complex", TypeError)]
FAULTS += [("shape", ShapeError), ("elements", ShapeError)]


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize(("fault", "error"), FAULTS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_gradient_stops_the_step_before_anything_is_written(
    fault: str, error: type[Exception], first: bool, device: str
) -> None:
    good = weights(SHAPES, torch.float32, device)
    bad = Pretender(weights([(64, 80)], torch.float32, device)[0].detach())
    opt = ADAMW8.make([{"params": good}, {"params": [bad]}])
    give(good, 0)
    if not first:
        bad.told = gradient(bad, 1)
        opt.step()
    bad.told = bad_gradient(bad, fault)
    before = snapshot(opt)
    with pytest.raises(error, match=r"^AdamW8bit\.step: "):
        opt.step()
    unchanged(opt, before)


def test_a_sparse_embedding_is_refused_with_a_word_on_what_to_do() -> None:
    layer = torch.nn.Embedding(300, 16, sparse=True)
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        ADAMW8.make(layer.parameters()).step()


@pytest.mark.parametrize("value", [-1.0, float("inf")])
def test_a_schedule_to_an_impossible_rate_stops_the_step(value: float, device: str) -> None:
    params = weights(SHAPES, torch.float32, device)
    opt = walk(ADAMW8, params, 1)
    opt.param_groups[0]["lr"] = value
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"^AdamW8bit\.step: lr "):
        opt.step()
    unchanged(opt, before)


def alter(state: dict[str, Any], fault: str) -> type[Exception] | tuple[type[Exception], ...]:
    """Damage a state; what the next step must raise."""
    if fault == "dtype":
        state["m.scales"] = state["m.scales"].bfloat16()
        return TypeError, StateError
    if fault == "shape":
        state["m.scales"] = state["m.scales"][:-1].clone()
        return ShapeError, StateError
    if fault == "gone":
        del state["v.codes"]
        return (StateError,)
    state["m.codes"] = state["m.codes"].cpu() if state["m.codes"].is_cuda else state["m.codes"].to("meta")
    return TypeError, StateError


@pytest.mark.parametrize("fault", ["dtype", "shape", "gone", "device"])
def test_an_altered_state_stops_the_step_before_anything_is_written(fault: str, device: str) -> None:
    params = weights(SHAPES, torch.float32, device)
    opt = walk(ADAMW8, params, 1)
    errors = alter(opt.state[params[2]], fault)
    give(params, 1)
    kept, states = [p.detach().clone() for p in params], snapshot(opt)[:2]
    with pytest.raises(errors, match=r"AdamW8bit\.step: .*(m\.scales|v\.codes|m\.codes)"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))
    for (_, was), (_, now) in zip(states, snapshot(opt), strict=False):
        assert all(torch.equal(was[k], now[k]) if torch.is_tensor(was[k]) else was[k] == now[k] for k in was)


def test_codecs_may_be_records_of_the_reference() -> None:
    params = weights(SHAPES, torch.float32, "cpu")
    opt = rc.optim.AdamW(params, codecs={"m": refopt.codecs.dynamic8, "v": refopt.codecs.f32})
    give(params, 0)
    opt.step()
    assert set(opt.state[params[0]]) == {"step", "m.codes", "m.scales", "exp_avg_sq"}


def test_a_records_block_is_not_lost() -> None:
    """`codecs.dynamic8(block=64)` is kept in blocks of 64, or refused; never silently in blocks of 256."""
    params = weights([(64, 128)], torch.float32, "cpu")
    try:
        opt = rc.optim.AdamW(params, codecs=refopt.codecs.dynamic8(block=64))
    except ValueError as error:
        assert "block" in str(error)
        return
    give(params, 0)
    opt.step()
    assert opt.state[params[0]]["m.scales"].shape == (64, 2)


def test_weights_whose_elements_share_memory_are_refused() -> None:
    p = torch.nn.Parameter(torch.ones(64, 1).expand(64, 80))
    opt = ADAMW8.make([p])
    p.grad = torch.ones(64, 80)
    with pytest.raises(ValueError, match="memory"):
        opt.step()
    assert (p.detach() == np.float32(1)).all()


def test_a_parameter_that_is_listed_twice_is_refused() -> None:
    """torch warns at construction, and would step it twice."""
    params = weights([(64, 80)], torch.float32, "cpu")
    with pytest.warns(UserWarning, match="duplicate"):
        opt = ADAMW8.make([*params, *params])
    give(params, 0)
    before = snapshot(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^AdamW8bit\.step: .*share memory"):
            opt.step()
    unchanged(opt, before)


def test_columns_of_one_matrix_are_apart() -> None:
    params = [torch.nn.Parameter(half) for half in torch.ones(64, 256).chunk(2, dim=1)]
    walk(ADAMW8, params, 2)


GROUP_CHANGES = [
    ({"codecs": "f32"}, ValueError, "codecs .*'f32'"),
    ({"codecs": {"m": "f32"}}, ValueError, "codecs .*m, v"),
    ({"codecs": {"m": "f32", "v": "f32"}}, StateError, "exp_avg"),
    ({"block": 128}, ShapeError, r"m\.scales"),
    ({"block": 0}, ValueError, "block .*0"),
    ({"min_size": 10**6}, StateError, "exp_avg"),
]


@pytest.mark.parametrize(("words", "error", "message"), GROUP_CHANGES, ids=str)
def test_a_group_changed_between_steps_stops_the_step(words: dict[str, Any], error: Any, message: str) -> None:
    """The states that it has are of the settings before."""
    params = weights([(64, 512)], torch.float32, "cpu")
    opt = walk(ADAMW8, params, 1)
    opt.param_groups[0] |= words
    before = snapshot(opt)
    for _ in range(2):
        with pytest.raises(error, match=r"^AdamW8bit\.step: .*" + message):
            opt.step()
    unchanged(opt, before)
