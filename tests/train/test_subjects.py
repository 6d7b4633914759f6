"""Names of optimizers, and bytes counted from tensors."""

from __future__ import annotations

import pytest
import torch

from refopt_cuda.train import subjects
from refopt_cuda.train.errors import InputError


def test_the_default_list_is_known() -> None:
    names = [s.name for s in subjects.parse_all(subjects.DEFAULT)]
    assert names == ["torch.AdamW", "AdamW", "AdamW8bit", "Lion8bit", "AdamW:v=int8_linear"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("AdamW8bit,AdamW", "names stand apart with spaces"),
        ("AdamW8bits", "did you mean AdamW8bit"),
        ("adamw", "did you mean AdamW"),
        ("torch.Muon", "of torch.optim there are"),
        ("AdamW:q=f32", "states are m, v"),
        ("AdamW:v=int3", "codecs f32"),
        ("Adafactor:vr=dynamic8", "takes no codec"),
        ("AdamW:p=dynamic8", "weights are p, codecs bf16_sr"),
    ],
)
def test_an_unknown_one_is_refused_with_what_there_is(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        subjects.parse_all([name])


def test_none_is_named_twice() -> None:
    with pytest.raises(InputError, match="twice"):
        subjects.parse_all(["AdamW", "AdamW"])


@pytest.mark.parametrize(("place", "found"), [("paged", "paged"), ("host", "host"), ("auto", "resident")])
def test_a_rule_of_whole_tensors_goes_where_it_can(place: str, found: str) -> None:
    opt = subjects.parse("Adafactor").make([torch.nn.Parameter(torch.ones(2, 3))], 1e-3, place)
    assert opt._placed.place == found  # type: ignore[attr-defined]


SHAPES = [(64, 96), (200,), (33, 130)]
MIXED = ("AdamW:v=int8_linear", "AdamW8bit:p=bf16_rem16")


@pytest.mark.parametrize("name", [*subjects.OURS, *(f"torch.{c}" for c in subjects.TORCH), *MIXED])
def test_bytes_without_allocating_are_the_bytes_of_the_tensors(name: str) -> None:
    subject = subjects.parse(name)
    params = [torch.nn.Parameter(torch.ones(s, dtype=subject.dtype)) for s in SHAPES]
    opt = subject.make(params, 1e-3)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert subjects.bytes_for(subject, SHAPES) == subjects.state_bytes(opt) > 0
