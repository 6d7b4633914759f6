"""What the reference has and no kernel computes is refused by name, at every door: never stepped in another codec."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.codecs import STATES, WEIGHTS, Form
from refopt_cuda.kernels import step_host
from refopt_cuda.kernels.build import Kernel
from refopt_cuda.rules import named
from tests.optim.pairs import parameter

WITHOUT = sorted(set(refopt.codecs.CODECS) - set(STATES))
OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("dynamic8", {"ties": "even"}, "ties='even'"),
    ("dynamic8", {"compat": "bitsandbytes"}, "compat='bitsandbytes'"),
    ("dynamic8", {"ties": "upper", "compat": "bitsandbytes"}, "ties='upper', compat='bitsandbytes'"),
    ("dynamic8", {"layout": "flat", "ties": "lower"}, "ties='lower', layout='flat'"),
    ("q4", {"scale": "rank1"}, "scale='rank1'"),
    ("q4", {"first": "low"}, "first='low'"),
    ("fp8", {"scale": "tensor"}, "scale='tensor'"),
    ("compand8", {"compat": "flashoptim"}, "compat='flashoptim'"),
]


@pytest.mark.parametrize("stem", WITHOUT)
@pytest.mark.parametrize("given", ["name", "record", "one state"])
def test_a_codec_without_a_kernel_is_refused_at_construction(stem: str, given: str) -> None:
    codec = stem if given == "name" else refopt.codecs.CODECS[stem]
    with pytest.raises(ValueError, match=f"^AdamW8bit: no kernel for codec '{stem}'; there are f32, .*dynamic8"):
        rc.optim.AdamW8bit([parameter(torch.ones(3))], codecs={"m": codec} if given == "one state" else codec)


@pytest.mark.parametrize("stem", sorted(set(refopt.codecs.CODECS) - set(WEIGHTS)))
def test_what_is_no_format_of_weights_is_refused_for_weights(stem: str) -> None:
    with pytest.raises(ValueError, match=f"^AdamW8bit: no kernel for format of weights '{stem}'; there are bf16_sr, "):
        rc.optim.AdamW8bit([parameter(torch.ones(3))], codecs={"p": stem})


@pytest.mark.parametrize(("stem", "options", "odd"), OPTIONS, ids=lambda x: str(x))
def test_an_option_without_a_kernel_is_refused_by_its_name(stem: str, options: dict[str, Any], odd: str) -> None:
    with pytest.raises(ValueError, match=f"^Composed: codecs has {stem} with {re.escape(odd)}; its kernels take "):
        rc.optim.Composed([parameter(torch.ones(3))], "adamw", refopt.codecs.CODECS[stem](**options))


@pytest.mark.parametrize("stem", WITHOUT)
def test_a_checkpoint_in_such_a_codec_changes_nothing(stem: str) -> None:
    p = parameter(torch.ones(3))
    opt = rc.optim.AdamW8bit([p])
    other = copy.deepcopy(opt.state_dict())
    other["param_groups"][0]["codecs"] = {"m": stem, "v": stem}
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises((ValueError, refopt.StateError), match="codec"):
        opt.load_state_dict(other)
    assert opt.state_dict() == before


@pytest.mark.parametrize("stem", WITHOUT)
def test_kernels_refuse_it_too(stem: str) -> None:
    lion = named("lion", 1)
    assert lion is not None
    with pytest.raises(ValueError, match=f"Kernel: no codec '{stem}' for a state; there are"):
        Kernel(lion, (Form(stem),), "float32", "float32")
    p, g = np.ones(3, np.float32), np.ones(3, np.float32)
    kept: Any = [{"codes": np.zeros(3, np.uint8)}]
    with pytest.raises(ValueError, match=f"{stem}.*there are"):
        step_host.step("lion", (stem,), p, g, kept, (3,), (256,), np.zeros(5, np.float32))
    assert (p == 1).all() and not kept[0]["codes"].any()
