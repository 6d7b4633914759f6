"""Settings of single parameters: bitsandbytes' manager, groups by name, and embeddings that ask for float32."""

from __future__ import annotations

import copy
import doctest
import pickle
import warnings
from typing import Any

import pytest
import torch

import refopt_cuda as bnb  # as a program of bitsandbytes has it
from refopt_cuda.optim import overrides
from tests.optim.pairs import give, parameter

manager = bnb.optim.GlobalOptimManager.get_instance()
SHAPE = (64, 64)


def two(device: str = "cpu") -> list[torch.nn.Parameter]:
    return [parameter(torch.ones(SHAPE), device=device) for _ in range(2)]


def kept(opt: torch.optim.Optimizer, p: torch.Tensor) -> set[str]:
    return set(opt.state[p]) - {"step"}


CODED, PLAIN = {"m.codes", "m.scales", "v.codes", "v.scales"}, {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("late", [False, True])
def test_a_parameter_of_32_bits_stays_so_among_those_of_8(late: bool) -> None:
    """Before or after the optimizer is made: bitsandbytes' programs do both."""
    p, q = two()
    if not late:
        manager.override_config(q, "optim_bits", 32)
    opt = bnb.optim.Adam([p, q], optim_bits=8)
    if late:
        manager.override_config(q, "optim_bits", 32)
    give([p, q], 0)
    opt.step()
    assert (kept(opt, p), kept(opt, q)) == (CODED, PLAIN)
    assert len(opt.param_groups) == 1


def test_its_bits_are_those_of_a_group_of_its_own(device: str) -> None:
    p, q = two(device)
    one, other = (parameter(x.detach().clone(), device=device) for x in (p, q))
    manager.override_config([q], key_value_dict={"optim_bits": 8, "min_8bit_size": 0, "block": 128, "lr": 0.5})
    opt = bnb.optim.AdamW([p, q], lr=0.01)
    group = {"params": [other], "lr": 0.5, "codecs": "dynamic8", "min_size": 0, "block": 128}
    apart = bnb.optim.AdamW([{"params": [one]}, group], lr=0.01)
    for t in range(3):
        give([p, q], t)
        for x, y in ((p, one), (q, other)):
            y.grad = x.grad.clone()
        opt.step()
        apart.step()
    assert torch.equal(p, one) and torch.equal(q, other)
    assert torch.equal(opt.state[q]["m.codes"], apart.state[other]["m.codes"])
    assert [g["lr"] for g in opt.param_groups] == [0.01, 0.5]


def test_a_schedule_keeps_what_was_overridden_apart() -> None:
    p, q = two()
    manager.override_config(q, "lr", 0.5)
    opt = bnb.optim.AdamW([("p", p), ("q", q)], lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5)
    give([p, q], 0)
    opt.step()
    assert [(g["param_names"], g["lr"]) for g in opt.param_groups] == [(["p"], 0.005), (["q"], 0.25)]


def test_a_module_may_get_another_weight_before_the_first_step() -> None:
    layer = torch.nn.Linear(*SHAPE, bias=False)
    manager.register_module_override(layer, "weight", {"optim_bits": 32})
    layer.weight = torch.nn.Parameter(torch.ones(SHAPE))
    opt = bnb.optim.AdamW8bit(layer.parameters())
    give(layer.parameters(), 0)
    opt.step()
    assert kept(opt, layer.weight) == PLAIN


def test_a_hyper_parameter_that_comes_late_is_refused_and_nothing_moves() -> None:
    p, q = two()
    opt = bnb.optim.Lion([p, q])
    manager.override_config(q, "lr", 0.5)
    give([p, q], 0)
    with pytest.raises(RuntimeError, match=r"Lion\.step: lr of a parameter was overridden after Lion was made"):
        opt.step()
    assert torch.equal(p, torch.ones(SHAPE)) and not opt.state


def test_an_override_after_the_first_step_is_told() -> None:
    (p, q) = two()
    opt = bnb.optim.Lion8bit([p])
    give([p], 0)
    opt.step()
    with pytest.warns(UserWarning, match="Lion8bit has stepped this parameter and keeps its settings"):
        manager.override_config(p, "optim_bits", 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.override_config(q, "optim_bits", 32)
    give([p], 1)
    opt.step()
    assert kept(opt, p) == {"m.codes", "m.scales"}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_and_checkpoints_keep_them(way: Any) -> None:
    p, q = two()
    manager.override_config(q, "optim_bits", 32)
    opt = bnb.optim.AdamW8bit([p, q])
    give([p, q], 0)
    opt.step()
    other = way(opt)
    again = bnb.optim.AdamW8bit([p, q])
    again.load_state_dict(opt.state_dict())
    for one in (other, again):
        params = one.param_groups[0]["params"]
        give(params, 1)
        one.step()
        assert [kept(one, x) for x in params] == [CODED, PLAIN]
    plain = bnb.optim.AdamW8bit(two())
    with pytest.raises(RuntimeError, match=r"group 0 has overrides \{1: .*this optimizer has \{\}"):
        plain.load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optim_bits": 16}, "optim_bits must be 32, 8 or 4, got 16"),
        ({"is_paged": True}, "is_paged cannot be set for one parameter, got True"),
        ({"percentile_clipping": 5}, "percentile_clipping must be 100 or left out, got 5"),
    ],
)
def test_what_no_parameter_can_have_alone_is_refused(config: dict[str, Any], message: str) -> None:
    (p, _) = two()
    with pytest.raises(ValueError, match=message):
        manager.override_config(p, key_value_dict=config)
    assert overrides.settings_of(p) == {}


def test_wrong_calls_are_named() -> None:
    p, q = two()
    with pytest.raises(RuntimeError, match="get_instance"):
        bnb.optim.GlobalOptimManager()
    with pytest.raises(ValueError, match="give a key and its value, or key_value_dict"):
        manager.override_config(p)
    with pytest.raises(ValueError, match="Linear has no parameter 'wieght'"):
        manager.register_module_override(torch.nn.Linear(2, 2), "wieght", {"optim_bits": 32})
    manager.override_config(q, "learning_rate", 1.0)
    with pytest.raises(ValueError, match=r"Lion\.add_param_group: learning_rate is overridden.*there are lr, betas"):
        bnb.optim.Lion([q])


@pytest.mark.parametrize(
    ("name", "words"), [("LAMB", {"variant": "clip"}), ("AdamMini", {}), ("Muon", {}), ("GaLoreAdamW", {"rank": 16})]
)
def test_rules_of_whole_tensors_know_hyper_parameters_of_single_ones(name: str, words: dict[str, Any]) -> None:
    p, q = two()
    manager.override_config(q, key_value_dict={"lr": 0.5, "optim_bits": 32})
    opt = getattr(bnb.optim, name)([p, q], lr=0.25, **words)
    assert [(g["lr"], len(g["params"])) for g in opt.param_groups] == [(0.25, 1), (0.5, 1)]
    manager.override_config(p, key_value_dict={"optim_bits": 8, "min_8bit_size": 0})
    opt = getattr(bnb.optim, name)([p, q], lr=0.25, **words)
    give([p, q], 0)
    opt.step()
    coded = [[key for key in opt.state[x] if key.endswith(".codes")] for x in (p, q)]
    assert coded[0] and not coded[1]


@pytest.mark.parametrize("name", ["Muon8bit", "LAMB8bit"])
def test_equal_matrices_of_a_group_may_be_kept_in_different_ways(name: str) -> None:
    p, q = two()
    manager.override_config(q, "optim_bits", 32)
    opt = getattr(bnb.optim, name)([p, q], lr=0.01)
    for t in range(2):
        give([p, q], t)
        opt.step()
    assert len(opt.param_groups) == 1
    assert ["m.codes" in kept(opt, x) or "B.codes" in kept(opt, x) for x in (p, q)] == [True, False]


def test_galore_in_8_bits_keeps_an_embedding_in_32() -> None:
    p, q = two()
    manager.override_config(q, "optim_bits", 32)
    opt = bnb.optim.GaLoreAdamW8bit([p, q])
    (group,) = opt.param_groups
    hyper = opt._hyper(group, "")
    assert [set(opt._layout(group, hyper, x).keys) for x in (p, q)] == [CODED, PLAIN]


def test_patterns_of_names_make_groups() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(64, 64), "norm": torch.nn.LayerNorm(64)})
    patterns = {"*embed*": {"optim_bits": 32}, "*.bias": {"weight_decay": 0.0}}
    opt = bnb.optim.AdamW8bit(model.named_parameters(), overrides=patterns, min_8bit_size=0)
    give(model.parameters(), 0)
    opt.step()
    embed, weight, bias = model.parameters()
    assert [kept(opt, x) for x in (embed, weight, bias)] == [PLAIN, CODED, CODED]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.01, 0.01, 0.0]
    assert torch.optim.SGD(bnb.optim.groups(model, {"*.bias": {"lr": 0.5}})).param_groups[1]["lr"] == 0.5


def test_patterns_without_names_and_without_a_match_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"AdamW: patterns of names need pairs .*model\.named_parameters"):
        bnb.optim.AdamW(model.parameters(), overrides={"*": {}})
    with pytest.raises(ValueError, match=r"groups: no parameter's name matches '\*embed\*'; there are weight, bias"):
        bnb.optim.groups(model, {"*embed*": {}})


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "SM3"])
def test_a_setting_that_no_group_holds_is_refused(name: str) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=rf"^{name}: overrides has 'weight_dekay', which no group holds; there are "):
        getattr(bnb.optim, name)(model.named_parameters(), overrides={"*": {"weight_dekay": 0.0}})


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_what_is_said_too_late_is_refused_by_all(name: str) -> None:
    p, q = two()
    opt = getattr(bnb.optim, name)([p, q])
    manager.override_config(q, "weight_decay", 0.5)
    give([p, q], 0)
    with pytest.raises(RuntimeError, match=rf"^{name}\.step: weight_decay of a parameter was overridden after {name}"):
        opt.step()
    assert torch.equal(p, torch.ones(SHAPE)) and not opt.state


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(overrides).failed == 0
