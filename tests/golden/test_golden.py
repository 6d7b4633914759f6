"""Golden vectors: the oracle against words that were not computed by it.

`published.json` came with the definition of the rules; `exact.json` is made by exact.py, in fractions, with no NumPy.
"""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import RULES, RuleCase, label
from tests.golden import exact, make
from tests.strategies import arrays, f32, runs

FILES = {name: json.loads((make.HERE / f"{name}.json").read_text("utf-8")) for name in ("published", "exact")}
RUNS = [
    pytest.param(f["start"], r, id=f"{n}-{r['rule']}-{i}") for n, f in FILES.items() for i, r in enumerate(f["runs"])
]
BLOCKS = FILES["published"]["blocks"]


def hex_words(x: Any) -> str:
    """Words of a float32 array, -0 as +0 (the exact path has one zero)."""
    x = np.asarray(x, f32).reshape(-1)
    return " ".join(f"{w:08x}" for w in np.where(x == 0, f32(0), x).view(np.uint32).tolist())


def as_words(stored: Any) -> Any:
    """A stored state as the JSON files write it."""
    if not hasattr(stored, "arrays"):
        return hex_words(stored)
    out: dict[str, Any] = {"codes": stored.codes.tolist()}
    return out | ({"scales": hex_words(stored.scales)} if "scales" in stored.arrays else {})


@pytest.mark.parametrize(("start", "run"), RUNS)
def test_the_oracle_reproduces_every_golden_run(ref: ModuleType, start: Any, run: Any) -> None:
    opt = ref.Optimizer(run["rule"], run["codecs"], **run["hyper"])
    p, state = f32(start["p"]), opt.init([f32(start["p"])])
    for t, g in enumerate(start["grads"], 1):
        (p,), state = opt.step([p], [f32(g)], state)
        for role, want in run["steps"].get(str(t), {}).items():
            got = hex_words(p) if role == "p" else as_words(state[0][role])
            assert got == want, f"{run['rule']} {run['codecs']} t={t} {role}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b['codec']}-{'signed' if b['signed'] else 'unsigned'}")
def test_the_oracle_reproduces_every_golden_block(ref: ModuleType, block: Any) -> None:
    box = ref.codecs.CODECS[block["codec"]].encode(f32(block["x"]), signed=block["signed"])
    assert box.codes.tolist() == block["codes"]
    assert hex_words(box.scales) == block.get("scales", hex_words(box.scales))
    assert hex_words(box.decode()) == block.get("decoded", hex_words(box.decode()))


@pytest.mark.parametrize(("start", "run"), RUNS)
def test_fractions_reproduce_every_golden_run(start: Any, run: Any) -> None:
    rows = exact.run(run["rule"], run["hyper"], start["p"], start["grads"], run["codecs"])
    for t, want in run["steps"].items():
        got = {k: " ".join(v) if isinstance(v, list) else v for k, v in rows[int(t) - 1].items()}
        assert {k: got[k] for k in want} == want, f"t={t}"


def test_the_file_of_exact_vectors_is_what_make_writes() -> None:
    assert (make.HERE / "exact.json").read_text("utf-8") == make.text()


@pytest.mark.parametrize("case", RULES, ids=label)
@given(run=runs(steps=2, shapes=[(5,)], kinds=["plain", "zeros"]))
def test_every_rule_is_its_equations_in_fractions(ref: ModuleType, case: RuleCase, run: Any) -> None:
    p, grads = run
    rows = exact.run(case.stem, case.hyper, p.tolist(), [g.tolist() for g in grads], {})
    opt = case.optimizer(ref)
    state = opt.init([p])
    for row, g in zip(rows, grads, strict=True):
        (p,), state = opt.step([p], [g], state)
        assert hex_words(p) == " ".join(row["p"]), f"p at t={state[0]['t']}"
        for role in case.states:
            assert hex_words(state[0][role]) == " ".join(row[role]), f"{role} at t={state[0]['t']}"


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("stem", ["int8_linear", "dynamic8"])
@given(x=arrays([(1,), (6,)]), power=st.integers(-20, 20))
def test_every_block_codec_is_its_definition_in_fractions(
    ref: ModuleType, stem: str, signed: bool, x: Any, power: int
) -> None:
    x = (x if signed else np.abs(x)) * f32(2.0**power)
    codes, scale, decoded = exact.CODECS[stem]([exact.Single(v) for v in x.tolist()], signed)
    box = ref.codecs.CODECS[stem].encode(x, signed=signed)
    assert (box.codes.tolist(), hex_words(box.scales)) == (codes, exact.word(scale))
    assert hex_words(box.decode()) == " ".join(map(exact.word, decoded))


def test_the_exact_path_rounds_as_float32_does() -> None:
    """Against the processor: products, sums, quotients and roots of hard pairs, subnormals among them."""
    rng = np.random.default_rng(5)
    a = (rng.standard_normal(300) * 10 ** rng.uniform(-24, 12, 300)).astype(f32)
    b = (rng.standard_normal(300) * 10 ** rng.uniform(-18, 12, 300)).astype(f32)
    for x, y in zip(a, b, strict=True):
        u, v = exact.Single(float(x)), exact.Single(float(y))
        assert float((u + v).x) == x + y
        assert float((u * v).x) == x * y
        assert float((u / v).x) == x / y
        assert float(exact.Single(abs(float(x))).root().x) == np.sqrt(np.abs(x))
