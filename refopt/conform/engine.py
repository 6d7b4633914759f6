"""Run the levels over every setting and put the findings together."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import Any

from refopt.conform import levels
from refopt.conform.levels import Subject
from refopt.conform.load import load
from refopt.conform.report import LEVELS, Finding, Report
from refopt.conform.settings import claimed, settings
from refopt.conform.special import special
from refopt.conform.target import Target

RUN = {
    "L0": levels.smoke,
    "L1": levels.rule_level,
    "L2": levels.trajectory,
    "L3": levels.codec_level,
    "L4": levels.place_level,
    "L5": levels.persistence,
    "L6": special,
    "L7": levels.memory_level,
}


def run(
    target: Target | str,
    claim: str,
    *,
    only: Iterable[str] = tuple(LEVELS),
    dtypes: Iterable[str] | None = None,
    **options: Any,
) -> Report:
    """Everything that can be said about `target`, which is said to follow `claim` ("adamw", "adam(decay=decoupled)").

    - target: a Target, or "module:Name", with `options` for a torch optimizer's constructor
    - only: the levels to run; L1 is run for all but L0, which rest on it
    - dtypes: formats of weights, by default all that the target has; bfloat16 is run under the first setting alone

    Raises ValueError or TypeError for a claim or a path that leads nowhere.
    """
    began = time.perf_counter()
    subject = load(target, **options) if isinstance(target, str) else target
    rule, claims = claimed(claim)
    formats = subject.dtypes if dtypes is None else tuple(dtypes)
    if unknown := [x for x in formats if x not in subject.dtypes]:
        raise ValueError(f"{subject.name} has no weights in {', '.join(unknown)}; it has {', '.join(subject.dtypes)}")
    report = Report(subject.name, claim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, setting in enumerate(settings(rule, claims)):
            for dtype in formats:
                if k == 0 or dtype == "float32":
                    report.findings += one(Subject(subject, rule, setting, dtype), set(only))
    if all(f.id in ("refused", "not-offered") for f in report.findings):
        said = "; ".join(dict.fromkeys(f.text for f in report.findings)) or "no setting was run"
        report.findings.append(Finding("L0", "all", "fail", "nothing-asked", f"no setting could be run: {said}"))
    report.seconds = time.perf_counter() - began
    return report


def one(s: Subject, wanted: set[str]) -> list[Finding]:
    """The levels of one setting. A target that cannot be given a hyper-parameter, or cannot step, is asked no more."""
    refused = s.target.refuses(s.rule, s.setting.hyper)
    if refused == ["wd"]:
        note = "; the target takes no weight decay, so that nothing tells its decay from another"
        s, refused = Subject(s.target, s.rule, s.setting.without("wd"), s.dtype, note), []
    if refused:
        return [s.finding("L0", "skip", "not-offered", f"the target takes no {', '.join(refused)}")]
    first = levels.smoke(s)
    if any(f.status == "skip" or "raises" in f.id or f.id == "half-state" for f in first):
        return first
    out = first if "L0" in wanted else []
    for level, ask in RUN.items():
        if level == "L0" or not (level in wanted or (level == "L1" and wanted - {"L0"})):
            continue
        try:
            found = ask(s)
        except Exception as error:
            found = [s.finding(level, "fail", "raises", f"{LEVELS[level]}: {levels.said(error)}")]
        out += found if level in wanted else []
    return out
