"""The trace is the step: its last values are step's bits, and each of its lines is a line of the rule's file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import parts, same_bits, same_state
from tests.cases import CODECS, EVERY, RULES, STEMS, WEIGHTS, RuleCase, label
from tests.places.laws import some_codecs
from tests.strategies import SHAPES, f32, follow, runs

every_rule = pytest.mark.parametrize("case", RULES, ids=label)


def taken(run: Any) -> tuple[list[Any], Any]:
    """All lines of a trace, and what it returns."""
    out = []
    while True:
        try:
            out.append(next(run))
        except StopIteration as stop:
            return out, stop.value


def prepared(ref: ModuleType, case: RuleCase, codecs: Any, shape: tuple[int, ...] = (3, 40)) -> Any:
    """An optimizer after two steps, and the third gradient."""
    rng = np.random.default_rng(9)
    p, *grads = rng.standard_normal((4, *shape)).astype(f32)
    opt = case.optimizer(ref, codecs, gscale=0.7, maximize=True)
    p, state = follow(opt, [p], [[g] for g in grads[:2]])
    return opt, p, [grads[2]], state


@every_rule
@pytest.mark.parametrize("weights", ["f32", "bf16"])
@pytest.mark.parametrize("stem", STEMS)
def test_the_last_traced_values_are_the_steps_bits(ref: ModuleType, case: RuleCase, stem: str, weights: str) -> None:
    codecs = dict.fromkeys(case.states, stem) | {"p": weights}
    opt, p, g, state = prepared(ref, case, codecs)
    want_p, want = opt.step(p, g, state)
    lines, (got_p, got) = taken(ref.trace(opt, p, g, state))
    last = {line.name: line.value for line in lines}
    same_bits(last["p"], want_p[0], "last traced p")
    for role in case.states:
        for name, a in parts(want[0][role]).items():
            key = role if isinstance(want[0][role], np.ndarray) else f"{role}.{name}"
            same_bits(last[key], a, f"last traced {key}")
    same_bits(got_p[0], want_p[0], "returned p")
    same_state(got[0], want[0])


@pytest.mark.parametrize("case", EVERY, ids=label)
@given(data=st.data(), delay=st.sampled_from([0, 1]), reads=st.sampled_from(["fresh", "stored"]))
def test_a_run_of_traces_has_the_bits_of_a_run_of_steps(
    ref: ModuleType, case: RuleCase, delay: int, reads: str, data: Any
) -> None:
    """Any codecs, formats of weights that draw bits or keep a remainder, a gradient that waits, one that is missing."""
    weights = data.draw(st.sampled_from([None, *WEIGHTS]))
    codecs = some_codecs(ref, case, data) | ({"p": weights.record(ref)} if weights else {})
    opt = case.optimizer(ref, codecs, seed=5, delay=delay, reads=reads)
    drawn = [data.draw(runs(3, case.shapes or SHAPES)) for _ in range(2)]
    params = traced = [p for p, _ in drawn]
    state = kept = opt.init(params)
    for t in range(3):
        grads = [g[t] if (t, k) != (1, 1) else None for k, (_, g) in enumerate(drawn)]
        try:
            params, state = opt.step(params, grads, state)
        except ValueError as error:
            assert "reads='stored' cannot be had" in str(error)
            return
        _, (traced, kept) = taken(ref.trace(opt, traced, grads, kept))
        for k, (a, b) in enumerate(zip(traced, params, strict=True)):
            same_bits(a, b, f"params[{k}]")
            same_state(kept[k], state[k], f"state[{k}]")


@every_rule
def test_each_line_of_a_rule_carries_its_source(ref: ModuleType, case: RuleCase) -> None:
    opt, p, g, state = prepared(ref, case, "dynamic8")
    lines, _ = taken(ref.trace(opt, p, g, state))
    ruled = [line for line in lines if line.where]
    assert {"p"} <= {line.name for line in ruled}
    for line in ruled:
        path, number = line.where.rsplit(":", 1)
        source = Path(path).read_text("utf-8").splitlines()[int(number) - 1].strip()
        assert (Path(path).name, line.equation) == (f"{case.stem}.py", source)
        assert line.name in source.split("=")[0], f"{line.name} is not set by {source!r}"


@every_rule
def test_each_traced_value_is_what_its_line_computes(ref: ModuleType, case: RuleCase) -> None:
    """Every equation of a rule, evaluated again from the values traced before it, gives the value traced for it."""
    opt, p, g, state = prepared(ref, case, None)
    lines, _ = taken(ref.trace(opt, p, g, state))
    module = importlib.import_module(f"refopt.rules.{case.stem}")
    scope: dict[str, Any] = vars(module) | {"state": dict(state[0]), "t": state[0]["t"] + 1} | opt.hyper
    done = set()
    for line in lines:
        if line.where and line.where not in done:
            done.add(line.where)
            exec(line.equation, scope)
        if isinstance(line.value, np.ndarray | np.generic):
            scope[line.name] = line.value if not line.where else scope[line.name]
            same_bits(scope[line.name], line.value, line.equation)


def test_a_tensor_that_is_not_stepped_is_not_traced(ref: ModuleType) -> None:
    opt, p = ref.Optimizer("lion", nonfinite="skip"), [np.ones(2, f32)] * 2
    lines, (_, state) = taken(ref.trace(opt, p, [None, f32([np.nan, 1])], opt.init(p)))
    assert lines == [] and [s["t"] for s in state] == [0, 0]


def test_a_trace_of_bad_input_raises_as_step_does(ref: ModuleType) -> None:
    opt = ref.Optimizer("lion")
    with pytest.raises(ref.ShapeError, match=r"grads\[0\] has shape"):
        next(iter(ref.trace(opt, np.ones(2, f32), np.ones(3, f32), opt.init(np.ones(2, f32)))))


def main(argv: list[str]) -> int:
    return importlib.import_module("refopt.tracing").main(argv)


P, GRADS = f32([1, -2, 0.5, 0]), f32([[0.1, -0.2, 0.3, 0], [-0.05, 0.4, 0.3, 1e-8]])


@pytest.mark.parametrize("codec", [None, *STEMS])
@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw", "lion"])
def test_the_command_prints_json_that_ends_in_the_steps_numbers(
    ref: ModuleType, capsys: Any, rule: str, codec: str | None
) -> None:
    assert main([rule, "--steps", "2", "--json", "--lr", "0.01", *(["--codec", codec] if codec else [])]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["t"] for row in rows} == {1, 2} and all(
        row.keys() == {"t", "name", "equation", "value", "where"} for row in rows
    )
    record = codec and ref.codecs.CODECS[codec]
    record = record(block=2) if record and record.block else record
    opt = ref.Optimizer(rule, record, lr=0.01, **({"momentum": 0.9} if rule == "sgd" else {}))
    p, _ = follow(opt, P, GRADS)
    assert f32([row["value"] for row in rows if row["name"] == "p"][-1]).tolist() == p.tolist()


@pytest.mark.parametrize("form", [[], ["--json"], ["--against", "lion"]], ids=str)
@pytest.mark.parametrize("rule", sorted({c.stem for c in EVERY}))
def test_the_command_traces_every_rule(ref: ModuleType, capsys: Any, rule: str, form: list[str]) -> None:
    assert main([rule, "--steps", "2", *form]) == 0
    out = capsys.readouterr().out
    source = Path(importlib.import_module(f"refopt.rules.{rule}").__file__ or "").read_text("utf-8")
    assert "p = p " in source or "p = " in source
    assert '"t": 2' in out if form == ["--json"] else "step t=2" in out


@pytest.mark.parametrize("codec", sorted({c.stem for c in CODECS}))
def test_the_command_shows_every_codec(capsys: Any, codec: str) -> None:
    assert main(["adamw", "--codec", codec]) == 0
    out = capsys.readouterr().out
    assert codec == "f32" or f"{codec}.encode(m).codes" in out


def test_blocks_are_shown_apart(capsys: Any) -> None:
    assert main(["adamw", "--codec", "dynamic8"]) == 0
    assert "[219, 0 | 255, 127]" in capsys.readouterr().out
    assert main(["adamw", "--codec", "dynamic8", "--block", "1"]) == 0
    assert "[255 | 0 | 255 | 127]" in capsys.readouterr().out


def test_two_rules_stand_side_by_side(capsys: Any) -> None:
    assert main(["adamw", "--against", "lion"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "grads[0] * gscale" in line]
    assert rows and all(row.count("grads[0] * gscale") == 2 for row in rows)
    assert main(["adamw", "--against", "lion", "--json"]) == 0
    assert {json.loads(line)["rule"] for line in capsys.readouterr().out.splitlines()} == {"adamw", "lion"}


def test_what_the_weights_codec_keeps_is_shown(capsys: Any) -> None:
    assert main(["adamw", "--weights", "bf16_rem16", "--codec", "dynamic8", "--reads", "stored"]) == 0
    out = capsys.readouterr().out
    assert "state['p'].rem" in out and "bf16_rem16.encode(p).rem" in out and "dynamic8.encode(v).codes" in out


def test_the_command_prints_every_equation(capsys: Any) -> None:
    assert main(["lion"]) == 0
    out = capsys.readouterr().out
    assert "Chen et al." in out and "step t=1" in out and "u = sgn(c)" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lyon"], "no rule 'lyon' (did you mean 'lion'?)"),
        (["lion", "--codec", "dynamic"], "no codec 'dynamic' (did you mean 'dynamic8'?)"),
        (["lion", "--steps", "0"], "--steps must be >= 1, got 0"),
        (["lion", "--lr", "-1"], "lr must be finite and >= 0, got -1.0"),
        (["lion", "--lr", "nan"], "lr must be finite"),
        (["lion", "--against", "lyon"], "no rule 'lyon'"),
        (["lion", "--codec", "bf16", "--block", "2"], "bf16 has no blocks, got --block 2"),
        (["lion", "--codec", "dynamic8", "--block", "0"], "block must be a whole number >= 1, got 0"),
        (["lion", "--weights", "int8_linear"], "weights take an element codec"),
        (["lion", "--reads", "twice"], "reads must be 'fresh' or 'stored', got 'twice'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_gives_one_sentence_and_exit_code_2(capsys: Any, argv: list[str], words: str) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "argv", [[], ["lion", "--steps", "two"], ["lion", "--lr", "fast"], ["lion", "--what"]], ids=str
)
def test_an_unreadable_command_line_exits_with_2(capsys: Any, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: refopt trace" in capsys.readouterr().err
