"""What an outsider gets wrong has a clear word, and nothing that was not asked counts as passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refopt import conform
from refopt.__main__ import main
from refopt.conform import FunctionalTarget, Report, Target
from refopt.conform.broken import moments, right, right_adamw

f32 = np.float32


def adamw_like(change: Any) -> FunctionalTarget:
    """The right one whose result is changed on its way out."""

    def update(p: Any, g: Any, s: Any, *, t: int, lr: float, beta1: float, beta2: float, eps: float, wd: float) -> Any:
        return change(*right_adamw(p, g, s, t=t, lr=lr, beta1=beta1, beta2=beta2, eps=eps, wd=wd))

    return FunctionalTarget(moments, update, "mine")


def raising(error: Exception) -> Any:
    def change(p: Any, s: Any) -> Any:
        raise error

    return change


def key_and_text(target: Target, claim: str = "adamw") -> tuple[str, str]:
    """The first failure of a run of the smoke test."""
    report = conform.run(target, claim, only=["L0"])
    assert len({f.id for f in report.findings if f.status == "fail"}) == 1
    found = next(f for f in report.findings if f.status == "fail")
    return found.key, found.text


CHANGED = {
    "raises": (raising(RuntimeError("no kernel for sm_35")), "L0/base/raises", "RuntimeError: no kernel for sm_35"),
    "nan": (lambda p, s: (p * f32(np.nan), s), "L0/base/not-finite", "tensor 0 has NaN or Inf after one step"),
    "float64": (lambda p, s: (p.astype(np.float64), s), "L0/base/raises", "float64 of shape (64, 96)"),
    "shape": (lambda p, s: (p.reshape(-1), s), "L0/base/raises", "float32 of shape (6144,)"),
    "list": (lambda p, s: [p, s], "L0/base/raises", "update() gives a list, (weights, dict of states) was expected"),
    "weights alone": (lambda p, s: p, "L0/base/raises", "update() gives a ndarray"),
    "state no dict": (lambda p, s: (p, [s]), "L0/base/raises", "update() gives a tuple of ndarray, list"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_step_that_gives_something_else_is_told_what_it_gave(name: str) -> None:
    change, key, text = CHANGED[name]
    got, said = key_and_text(adamw_like(change))
    assert got == key
    assert text in said


def test_a_wrong_signature_is_shown_as_python_says_it() -> None:
    got, said = key_and_text(FunctionalTarget(moments, lambda p, g, s, lr, beta1, beta2, eps, wd, more: (p, s)))
    assert got == "L0/base/raises"
    assert "'more'" in said


def test_states_that_are_no_dict_are_refused_with_what_they_are() -> None:
    got, said = key_and_text(FunctionalTarget(lambda p: [p], right_adamw))
    assert got == "L0/all/nothing-asked"
    assert "init() gives a list, a dict of states was expected" in said


def test_a_target_that_takes_none_of_the_rules_words_has_not_passed() -> None:
    got, said = key_and_text(FunctionalTarget(moments, lambda p, g, s, lr: (p, s)))
    assert got == "L0/all/nothing-asked"
    assert "the target takes no beta1, beta2, eps, wd" in said


def test_a_functional_step_need_not_take_t() -> None:
    def update(p: Any, g: Any, s: Any, lr: float, wd: float) -> Any:
        return p - f32(lr) * (g + f32(wd) * p), {}

    assert conform.run(FunctionalTarget(lambda p: {}, update), "sgd", only=["L1"]).ok


MADE = """
import types
tx = types.SimpleNamespace(init=0, update=0)
def falls(): raise KeyError("x")
def nothing(): pass
"""
NOWHERE = [
    (["math:pi", "--as", "adamw"], "math:pi is a float, not an optimizer, nor makes one"),
    (["math:nope", "--as", "adamw"], "has no attribute 'nope'"),
    (["refopt.conform.report:Report", "--as", "adamw"], "is a class without step"),
    (["my_broken_module:X", "--as", "adamw"], "cannot import my_broken_module: ZeroDivisionError"),
    (["refopt.conform.broken:right", "--as", "adamw", "--option", "lr=1"], "takes no options, got lr"),
    (["refopt.conform.broken:right", "--as", "adamw", "--weights", "float16"], "it has float32"),
    (["refopt.conform.broken:right", "--as", "adamw", "--device", "cuda"], "takes no options, got device"),
    (["my_made:tx", "--as", "adamw"], "name the function that makes it"),
    (["my_made:falls", "--as", "adamw"], "raises KeyError when it is called"),
    (["my_made:nothing", "--as", "adamw"], "neither a torch optimizer nor a refopt.conform.Target"),
]


@pytest.mark.parametrize(("argv", "says"), NOWHERE, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_what_is_no_target_is_refused_in_one_line(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The files are found in the working directory, as a script's own are not by an installed command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_broken_module.py").write_text("1 / 0\n", "utf-8")
    (tmp_path / "my_made.py").write_text(MADE, "utf-8")
    assert main(["conform", *argv]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_states_without_subnormals_are_told() -> None:
    flushed = adamw_like(lambda p, s: (p, {n: np.where(np.abs(x) < 2.0**-126, f32(0), x) for n, x in s.items()}))
    assert conform.run(flushed, "adamw", only=["L6"]).ids == {"no-subnormals"}


def test_numbers_that_are_not_finite_are_written_as_json_can_hold_them() -> None:
    report = Report("x", "adamw", conform.run(right(), "adamw", only=["L1"]).findings)
    report.findings[0].data.update(worst_ulps={"p": np.inf, "m": np.nan}, share=np.float32(0.5), n=np.int64(3))

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    data = json.loads(report.json(), parse_constant=refused)["findings"][0]["data"]
    assert data["worst_ulps"] == {"p": "inf", "m": "nan"}
    assert (data["share"], data["n"]) == (0.5, 3)


def test_torch_optimizers_with_habits_of_their_own_get_a_word() -> None:
    torch = pytest.importorskip("torch")

    class NeedsClosure(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            assert closure() == 0
            return super().step()

    class Widens(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            super().step()
            for p in self.param_groups[0]["params"]:
                p.data = p.data.double()

    class TensorRate(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return self.param_groups[0]["lr"].item()

    def asked(cls: type, **options: Any) -> Report:
        return conform.run(conform.TorchTarget(cls, **options), "sgd", only=["L0"], dtypes=["float32"])

    assert asked(NeedsClosure).ok, "a closure that is asked for is given"
    assert "weights were torch.float32 and are torch.float64" in asked(Widens).text()
    assert "'float' object has no attribute 'item'" in asked(TensorRate).text()
    assert "lr cannot be an option: the suite sets it itself" in asked(torch.optim.SGD, lr=0.1).text()
    assert "unexpected keyword argument 'colour'" in asked(torch.optim.SGD, colour=1).text()
