"""Dictionaries that note changes: every way of changing one is noted, and looking is not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.optim.watched import WAYS, Entries, Entry

CHANGES: dict[str, Callable[[Any], Any]] = {
    "__setitem__": lambda d: d.__setitem__("step", 2),
    "__delitem__": lambda d: d.__delitem__("step"),
    "__ior__": lambda d: d.__ior__({"step": 2}),
    "clear": lambda d: d.clear(),
    "pop": lambda d: d.pop("step"),
    "popitem": lambda d: d.popitem(),
    "setdefault": lambda d: d.setdefault("other", 1),
    "update": lambda d: d.update(step=2),
}


def fresh(kind: type) -> Any:
    made = kind(step=1) if kind is Entry else kind(dict, {"step": 1})
    made.changed = False
    return made


@pytest.mark.parametrize("kind", [Entry, Entries])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_changing_it_is_noted_and_done(kind, way):
    noted, plain = fresh(kind), {"step": 1}
    CHANGES[way](noted)
    CHANGES[way](plain)
    assert noted.changed
    assert dict(noted) == plain


@pytest.mark.parametrize("kind", [Entry, Entries])
def test_looking_is_not_noted(kind):
    noted = fresh(kind)
    assert noted["step"] == noted.get("step") == 1
    assert list(noted.items()) == [("step", 1)]
    assert not noted.changed


def test_an_unknown_parameter_makes_an_entry_and_a_note():
    noted = fresh(Entries)
    assert noted["nobody"] == {}
    assert noted.changed


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", [Entry, Entries])
def test_copies_are_of_the_kind_and_noted_as_changed(kind, again):
    twin = again(fresh(kind))
    assert type(twin) is kind
    assert twin == {"step": 1}
    twin["step"] = 5
    assert twin.changed


def test_what_an_optimizer_saves_are_plain_dictionaries():
    p = torch.nn.Parameter(torch.ones(64, 80))
    opt = rc.optim.AdamW8bit([p])
    p.grad = torch.ones_like(p)
    opt.step()
    assert type(opt.state[p]) is Entry
    assert type(opt.state_dict()["state"]) is dict
    assert type(opt.state_dict()["state"][0]) is dict
    opt.state[p] = dict(opt.state[p])
    opt.step()
    assert opt.state[p]["step"] == 2
