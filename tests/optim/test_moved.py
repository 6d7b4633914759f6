"""bfloat16 weights that a step cannot move: the prediction holds for every weight, and it is reported once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refopt_cuda as rc
from refopt_cuda.optim import dialect, moved
from tests.optim.pairs import parameter
from tests.optim.test_dialect import untold  # noqa: F401

WORDS = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
FINITE = WORDS[WORDS.isfinite() & (WORDS.abs() < 1e30)][::5]
"""Every fifth bfloat16, but the largest: all exponents, all mantissas."""


@settings(max_examples=25, deadline=None)
@given(
    exponent=st.floats(-38, 0),
    rule=st.sampled_from(["Lion", "Signum", "AdamW", "Adam"]),
    toward=st.sampled_from([-1, 1]),
)
def test_a_step_moves_every_weight_that_is_not_held_and_no_other(exponent: float, rule: str, toward: int) -> None:
    """Lion and Signum step by lr exactly; Adam's first steps are lr to rounding, and no longer."""
    lr = 10.0**exponent
    p = parameter(FINITE.clone(), torch.bfloat16)
    p.grad = torch.full_like(p, toward)
    dialect.TOLD.add("bf16")
    getattr(rc.optim, rule)([p], lr=lr, **({"eps": 0.0} if rule.startswith("Adam") else {}), weight_decay=0.0).step()
    still = p.detach() == FINITE
    held = moved.held(FINITE, lr)
    assert still[held].all()
    # The rest moves unless the step ends on a tie, the rounding to float32 makes one, or the weight is a power of two,
    # whose neighbours lie at two distances.
    mantissa = torch.frexp(FINITE.double().abs())[0]
    clear = ~moved.held(FINITE, lr * (1 - 1e-3)) & (mantissa != 0.5)
    assert not still[clear].any(), FINITE[clear & still]


def small(
    lr: float = 1e-5, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **words: Any
) -> rc.optim.Composed:
    return rc.optim.AdamW([parameter(torch.full((64, 64), 0.02), dtype, device)], lr=lr, **words)


def test_weights_that_cannot_move_are_reported_once_with_the_remedy(device: str) -> None:
    with pytest.warns(
        UserWarning, match="AdamW: an update as long as lr = 1e-05 cannot move 100%.*bf16_rem16.*bf16_sr"
    ) as w:
        small(device=device)
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(device=device)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "words",
    [
        {"lr": 1e-3},
        {"lr": 0.0},
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"codecs": {"p": "bf16_rem16"}},
        {"codecs": {"p": "bf16_sr"}},
    ],
    ids=str,
)
def test_nothing_is_said_of_weights_that_move(words: dict[str, Any]) -> None:
    small(**words)


@pytest.mark.parametrize(("share", "said"), [(0.4, False), (0.6, True)])
def test_it_is_said_where_most_of_the_weights_stand(share: float, said: bool) -> None:
    x = torch.full((100, 100), 1e-4, dtype=torch.bfloat16)
    x[:, : int(100 * share)] = 1.0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rc.optim.Lion([parameter(x, torch.bfloat16)], lr=1e-5)
    assert bool(told) is said


def test_a_step_looks_at_no_weight() -> None:
    opt = small(1e-3)
    opt.param_groups[0]["lr"] = 1e-6
    (p,) = opt.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert "bf16" not in dialect.TOLD
