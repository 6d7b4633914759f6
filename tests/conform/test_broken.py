"""Each optimizer that is wrong on purpose gets the right diagnosis, and the one that is right gets none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from refopt import conform
from refopt.conform.broken import BROKEN
from refopt.conform.broken_kernels import BROKEN_KERNELS, SquaresInCodes
from refopt.conform.report import Report
from refopt.spec import Rule

BY_NAME, KERNELS = "refopt.conform.broken:", "refopt.conform.broken_kernels:"
EVERY = {BY_NAME + name: x for name, x in BROKEN.items()} | {KERNELS + name: x for name, x in BROKEN_KERNELS.items()}


def judged(name: str, claim: str) -> Report:
    return conform.run(name if ":" in name else BY_NAME + name, claim)


@pytest.mark.parametrize("path", EVERY)
def test_a_broken_optimizer_gets_the_right_diagnosis(path: str) -> None:
    claim, key = EVERY[path]
    report = judged(path, claim)
    assert report.target == path
    failed = {f.key for f in report.findings if f.status == "fail"}
    assert key in failed
    assert {k for k in failed if k.startswith("L1/")} <= {key}, "the rule itself is diagnosed once"


def test_scales_that_overlap_are_found_at_their_neighbours() -> None:
    """What an outsider needs to find the slip: which state, whose scale, and that whole blocks are right."""
    found = {f.id: f.text for f in judged(KERNELS + "ademamix_shifts_its_scales", "ademamix").findings}
    assert "whole blocks: the reference's equations" in found["short-block"]
    assert "tensor 1, m2: the scale of block 0" in found["scale-of-neighbour"]


def test_tensors_in_codes_and_others_are_explained_apart() -> None:
    """A target that takes momentum and ignores it, in both of its kernels."""

    class Ignores(SquaresInCodes):
        def refuses(self, rule: Rule, hyper: dict[str, Any]) -> list[str]:
            return [n for n in ("centered",) if hyper.get(n)]

    report = conform.run(Ignores(), "rmsprop", only=["L1", "L3"])
    found = {f.key: f.text for f in report.findings if f.status == "fail"}
    both = "one-minus-beta-f32+momentum-ignored+decay-skips-the-step"
    assert found.keys() >= {"L1/momentum/momentum-ignored", f"L1/momentum/{both}"}
    assert "those that are not: the reference's equations" in found["L1/base/one-minus-beta-f32+decay-skips-the-step"]
    assert [f.status for f in report.of("L3") if f.setting != "centered"] == ["pass", "pass"]


def test_twenty_are_shipped_and_none_shares_its_name_with_another() -> None:
    assert len(BROKEN) >= 20
    assert len({(claim, key) for claim, key in BROKEN.values()}) == len(BROKEN)


def test_the_right_one_passes_every_level_that_it_can_be_asked() -> None:
    report = judged("right", "adamw")
    assert report.ok
    assert {f.level for f in report.findings if f.status == "pass"} == {"L0", "L1", "L2", "L5", "L6", "L7"}


def test_the_first_difference_comes_with_what_went_in() -> None:
    (found,) = [f for f in judged("adamw_skips_the_tail", "adamw").of("L1") if f.status == "fail"]
    for word in ("step 1", "tensor 1", "p[4096]", "got", "expected", "g=", "m=0", "v=0"):
        assert word in found.text


def test_two_changes_at_once_are_both_named() -> None:
    """Signum under Lion's name whose decay goes through the gradient as well."""

    def update(p, g, s, *, t, lr, beta1, beta2, wd):  # type: ignore[no-untyped-def]
        import numpy as np

        f32 = np.float32
        m = f32(beta1) * s["m"] + f32(1 - beta1) * (g + f32(wd) * p)
        return p - f32(lr) * ((m > 0).astype(f32) - (m < 0)), {"m": m}

    target = conform.FunctionalTarget(lambda p: {"m": 0 * p}, update)
    assert conform.run(target, "lion", only=["L1"]).ids == {"decay-coupled+signum-beta1"}


def test_a_report_is_plain_data() -> None:
    report = judged("adamw_swaps_its_betas", "adamw")
    data = json.loads(report.json())
    assert data["claim"] == "adamw"
    assert {f["id"] for f in data["findings"] if f["status"] == "fail"} == {"betas-swapped"}
