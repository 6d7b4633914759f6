"""Words of torch.optim and bitsandbytes: what they mean here, what is said once, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import refopt_cuda as bnb  # as a program of bitsandbytes has it
from refopt_cuda.optim import dialect
from tests.optim.pairs import give, parameter


@pytest.fixture(autouse=True)
def untold() -> Iterator[None]:
    """Nothing has been said yet."""
    before = set(dialect.TOLD)
    dialect.TOLD.clear()
    yield
    dialect.TOLD.clear()
    dialect.TOLD.update(before)


def one(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [parameter(torch.ones(64, 64, dtype=dtype))]


SAID = [
    ("Adam", {"weight_decay": 0.1}, "decoupled_weight_decay=True, or AdamW"),
    ("SGD", {"momentum": 0.9, "dampening": 0.1}, "dampening=0, nesterov=False"),
    ("SGD8bit", {"momentum": 0.9, "nesterov": True}, "dampening=0, nesterov=False"),
    ("RMSprop", {"momentum": 0.9}, "momentum=0"),
    ("LAMB", {}, "variant='clip', eps=1e-8, weight_decay=0"),
    ("LARS", {}, "variant='clip', momentum=0"),
    ("AdamW", {"percentile_clipping": 100}, "percentile_clipping has no effect and can be left out"),
    ("Lion8bit", {"block_wise": True}, "block_wise has no effect and can be left out"),
    ("Lion", {"skip_zeros": False}, "skip_zeros has no effect and can be left out"),
]


@pytest.mark.parametrize(("name", "words", "remedy"), SAID)
def test_where_bitsandbytes_differs_the_way_back_is_told_once(name: str, words: dict[str, Any], remedy: str) -> None:
    with pytest.warns(UserWarning, match=remedy.replace("(", r"\(")) as told:
        getattr(bnb.optim, name)(one(), **words)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(bnb.optim, name)(one(), **words)


SILENT = [
    ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("Adam8bit", {}),
    ("AdamW", {"weight_decay": 0.1, "foreach": True, "fused": None, "capturable": False, "differentiable": False}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("Lion", {"weight_decay": 0.1}),
    ("RMSprop", {"centered": True}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("LAMB", {"variant": "clip", "max_unorm": 0.5}),
    ("LARS", {"variant": "clip", "max_unorm": 0.5}),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "words"), SILENT)
def test_nothing_is_said_where_there_is_no_difference_or_it_was_chosen(name: str, words: dict[str, Any]) -> None:
    getattr(bnb.optim, name)(one(), **words)


def test_adam_with_decoupled_decay_is_adamw() -> None:
    (p,), (q,) = one(), one()
    adam = bnb.optim.Adam([p], 0.1, weight_decay=0.2, decoupled_weight_decay=True)
    adamw = bnb.optim.AdamW([q], 0.1, weight_decay=0.2)
    for t in range(2):
        give([p], t)
        q.grad = p.grad.clone()
        adam.step()
        adamw.step()
    assert torch.equal(p, q)


BITS = [
    ("AdamW", {"optim_bits": 8}, "dynamic8"),
    ("AdamW", {"optim_bits": 4}, "q4"),
    ("AdamW", {}, "f32"),
    ("AdamW8bit", {}, "dynamic8"),
    ("AdamW8bit", {"optim_bits": 8}, "dynamic8"),
    ("AdamW4bit", {}, "q4"),
    ("AdamWFp8", {}, "fp8"),
    ("AdamW32bit", {}, "f32"),
    ("Adagrad8bit", {"optim_bits": 8}, "dynamic8"),
    ("AdamW", {"optim_bits": 8, "codecs": {"m": "bf16"}}, "bf16 dynamic8 dynamic8"),
]


@pytest.mark.parametrize(("name", "words", "codecs"), BITS)
def test_bits_are_the_codec_of_every_state_that_none_is_named_for(name: str, words: dict, codecs: str) -> None:
    opt = getattr(bnb.optim, name)(one(), **words)
    table = list(opt.param_groups[0]["codecs"].values())
    assert table == (codecs.split() if " " in codecs else [codecs] * len(table))


REFUSED = [
    ("AdamW", {"optim_bits": 16}, "AdamW: optim_bits must be 32, 8 or 4, got 16"),
    ("AdamW", {"optim_bits": True}, "AdamW: optim_bits must be 32, 8 or 4, got True"),
    ("AdamW32bit", {"optim_bits": 8}, "AdamW32bit: optim_bits must be 32, as the name says, got 8"),
    ("AdamW4bit", {"optim_bits": 8}, "AdamW4bit: optim_bits must be 4, as the name says, got 8"),
    ("AdamW", {"args": {"optim_bits": 8}}, "AdamW: args must be None.*give optim_bits and min_8bit_size themselves"),
    ("AdamW", {"percentile_clipping": 5}, "percentile_clipping must be 100 or left out, got 5"),
    ("AdamW", {"block_wise": False}, "block_wise must be True or left out, got False"),
    ("AdamW", {"skip_zeros": True}, "skip_zeros must be False or left out, got True"),
    ("AdamW", {"differentiable": True}, "AdamW: differentiable=True: "),
    ("AdamW", {"is_paged": 1}, "is_paged must be True or False, got 1"),
    ("LAMB", {"amsgrad": True}, "LAMB: amsgrad must be False, got True"),
    ("LAMB", {"adam_w_mode": False}, "LAMB: adam_w_mode must be True, got False"),
    ("LAMB", {"max_unorm": 2.0}, "LAMB: max_unorm is of variant='clip'"),
    ("LARS", {"dampening": 0.5}, r"LARS: dampening must be 0\.0, got 0\.5"),
    ("LARS", {"nesterov": True}, "LARS: nesterov must be False, got True"),
    ("LARS32bit", {"optim_bits": 8}, "LARS32bit: optim_bits must be 32, as the name says, got 8"),
]


@pytest.mark.parametrize(("name", "words", "message"), REFUSED)
def test_words_that_ask_for_what_is_not_here_are_refused(name: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(bnb.optim, name)(one(), **words)


def test_unknown_words_are_refused() -> None:
    for name in ("AdamW", "LAMB", "LARS"):
        with pytest.raises(TypeError, match=f"{name}: no argument 'learning_rate'"):
            getattr(bnb.optim, name)(one(), learning_rate=1.0)


GROUPS = [
    ("AdamW", {"optim_bits": 8}, {"codecs": {"m": "dynamic8", "v": "dynamic8", "w": "dynamic8"}}),
    ("LAMB8bit", {"optim_bits": 32}, {"codecs": {"m": "f32", "v": "f32"}}),
    ("Muon", {"optim_bits": 4}, {"codecs": {"B": "q4"}}),
    ("Lion8bit", {"min_8bit_size": 64}, {"min_size": 64}),
    ("Signum", {"momentum": 0.5}, {"beta": 0.5}),
    ("Adafactor", {"d": 2.0, "beta2_decay": -0.5}, {"clip_threshold": 2.0, "decay_rate": -0.5}),
]


@pytest.mark.filterwarnings("ignore:LAMB8bit")
@pytest.mark.parametrize(("name", "words", "held"), GROUPS)
def test_an_argument_means_in_a_group_what_it_means_of_the_class(name: str, words: dict, held: dict) -> None:
    (group,) = getattr(bnb.optim, name)([{"params": one(), **words}]).param_groups
    assert {key: group[key] for key in held} == held and not words.keys() & group.keys()


GROUPS_REFUSED = [
    ("AdamW", {"is_paged": True}, "is_paged is of the whole optimizer, not of a group, got True"),
    ("LAMB", {"place": "paged"}, "place is of the whole optimizer, not of a group, got 'paged'"),
    ("Adam", {"optim_bits": 8, "codecs": "q4"}, "a group has optim_bits and codecs, which say the same"),
    ("Adam", {"decoupled_weight_decay": True}, "decoupled_weight_decay must be False as elsewhere, got True"),
    ("Muon", {"optim_bits": 3}, "optim_bits must be 32, 8 or 4, got 3"),
    ("AdamW", {"block_wise": False}, "block_wise must be True or left out, got False"),
]


@pytest.mark.filterwarnings("ignore:LAMB")
@pytest.mark.parametrize(("name", "words", "message"), GROUPS_REFUSED)
def test_what_no_group_can_have_alone_is_refused(name: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\.add_param_group: {message}"):
        getattr(bnb.optim, name)([{"params": one(), **words}])


NAMES = [
    ("PytorchLARS", r"take LARS\(variant='clip'\)"),
    ("PagedMuon8bit", "take Muon8bit; it has no fast path in another place"),
    ("SM38bit", r"take SM3\(codecs='dynamic8'\)"),
    ("NAdam", "it is in torch.optim, and its rule is not here"),
    ("FusedLAMB", "is it .*LAMB"),
]


@pytest.mark.parametrize(("name", "hint"), NAMES)
def test_a_name_that_is_not_here_says_what_is(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=rf"^refopt_cuda\.optim has no {name}: {hint}"):
        getattr(bnb.optim, name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("LinearNF4", "take Linear4bit, whose default it is"), ("Linear8bitLt", "8-bit matrix products are not built; ")],
)
def test_a_layer_that_is_not_here_says_what_is(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=rf"^refopt_cuda\.nn has no {name}: {hint}"):
        getattr(bnb.nn, name)


def test_what_torch_has_beside_optimizers_is_found() -> None:
    """`import refopt_cuda.optim as optim` in the place of torch.optim: schedules and the base class go on to work."""
    opt = bnb.optim.SGD(one(), lr=1.0)
    assert isinstance(opt, bnb.optim.Optimizer)
    bnb.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5)
    assert opt.param_groups[0]["lr"] == 0.5


def test_clipped_lars_steps_as_bitsandbytes_does() -> None:
    theirs = pytest.importorskip("bitsandbytes").optim.LARS
    p, q = (parameter(torch.linspace(-1, 1, 4096).view(64, 64)) for _ in range(2))
    words = {"lr": 0.1, "momentum": 0.9}
    ours, other = bnb.optim.LARS([p], **words, variant="clip"), theirs([q], **words)
    for t in range(4):
        give([p], t)
        q.grad = p.grad.clone()
        ours.step()
        other.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
