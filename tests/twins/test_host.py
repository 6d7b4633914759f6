"""The host twin computes the oracle's bits, whatever the rule, codecs, dtypes, shape and number of threads."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refopt
from refopt import codecs
from refopt.spec import Box
from tests.cases import RULES as ORACLE_CASES
from tests.twins.common import BF16, HYPERS, assert_same_bits, assert_states_agree, inputs, oracle, stored

pytest.importorskip("numba")
from refopt_cuda.kernels import step_host
from refopt_cuda.rules import RULES, form_of, row

CASES = [
    # rule, codec a state, dtype of p, dtype of g
    ("sgd", (), "f32", "f16"),
    ("sgd", ("f32",), "bf16", "f32"),
    ("sgd", ("bf16",), "f16", "bf16"),
    ("sgd", ("int8_linear",), "f32", "f32"),
    ("adam", ("f32", "bf16"), "f32", "bf16"),
    ("adam", ("dynamic8", "dynamic8"), "f16", "f16"),
    ("adamw", ("f32", "f32"), "f32", "f32"),
    ("adamw", ("dynamic8", "dynamic8"), "f32", "f32"),
    ("adamw", ("dynamic8", "dynamic8"), "bf16", "bf16"),
    ("adamw", ("dynamic8", "int8_linear"), "f32", "bf16"),
    ("adamw", ("int8_linear", "f32"), "bf16", "f16"),
    ("lion", ("f32",), "f16", "f32"),
    ("lion", ("dynamic8",), "bf16", "f32"),
]
DTYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": BF16}


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(DTYPES[dtype])


def as_words(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16) if x.dtype == BF16 else x


def check(case: tuple, p: np.ndarray, gradients: list, blocks: tuple[int, ...], t0: int = 0, **hyper: Any) -> None:
    """Three steps, each from the oracle's state, so that no difference can hide in another."""
    rule, names, p_dtype, g_dtype = case
    hyper = HYPERS[rule] | ({"momentum": 0.0, "dampening": 0.0} if rule == "sgd" and not names else {}) | hyper
    opt = oracle(rule, names, blocks, "bf16" if p_dtype == "bf16" else "f32", **hyper)
    p = rounded(p, p_dtype)
    state = opt.init(p.astype(np.float32))
    state[0]["t"] = t0
    for g in gradients:
        g = rounded(g, g_dtype)
        mine, states = p.copy(), stored(rule, names, state[0])
        wide, state = opt.step(p.astype(np.float32), g.astype(np.float32), state)
        gscale, maximize = hyper.get("gscale", 1.0), hyper.get("maximize", False)
        plain = {k: v for k, v in hyper.items() if k not in ("gscale", "maximize")}
        s = RULES[rule].scalars(state[0]["t"], gscale=gscale, maximize=maximize, **plain)
        step_host.step(rule, names, as_words(mine), as_words(g), states, p.shape, blocks, s)
        p = rounded(wide, p_dtype)
        assert_same_bits(mine, p, "p")
        assert_states_agree(rule, names, states, state[0])


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=inputs(), block=st.sampled_from([1, 16, 100, 256, 2048]), t0=st.sampled_from([0, 1, 700]))
def test_host_equals_the_oracle_bit_for_bit(case, drawn, block, t0):
    p, gradients = drawn
    check(case, p, gradients, (block,) * len(case[1]), t0)


@pytest.mark.parametrize("case", [CASES[2], CASES[8], CASES[12]], ids=str)
def test_threads_change_no_bit(case, monkeypatch):
    rng = np.random.default_rng(5)
    p, *gradients = (rng.standard_normal((37, 1030)).astype(np.float32) for _ in range(4))
    monkeypatch.setattr(step_host, "PARALLEL_FROM", 0)
    check(case, p, gradients, (256,) * len(case[1]))


def test_large_tensors_take_the_parallel_path_by_default():
    rng = np.random.default_rng(6)
    p, g = (rng.standard_normal(step_host.PARALLEL_FROM + 77).astype(np.float32) for _ in range(2))
    check(CASES[7], p, [g], (256, 256))


@settings(deadline=None)
@given(drawn=inputs(), blocks=st.sampled_from([(64, 256), (256, 32), (1, 16), (16, 4096)]))
def test_each_state_may_have_its_own_block_size(drawn, blocks):
    p, gradients = drawn
    check(CASES[7], p, gradients, blocks)


@pytest.mark.parametrize(
    "hyper", [{"nesterov": True, "dampening": 0.0}, {"wd": 0.0}, {"gscale": 0.4, "maximize": True}]
)
def test_sgd_options(hyper):
    rng = np.random.default_rng(7)
    p, *gradients = (rng.standard_normal(300).astype(np.float32) for _ in range(4))
    check(CASES[1], p, gradients, (256,), **hyper)


@pytest.mark.parametrize("case", [CASES[4], CASES[6], CASES[11]], ids=str)
def test_gradient_scale_comes_first_and_its_sign_is_ascent(case):
    rng = np.random.default_rng(8)
    p, *gradients = (rng.standard_normal(300).astype(np.float32) for _ in range(4))
    check(case, p, gradients, (256,) * len(case[1]), gscale=0.37, maximize=True)


def test_dead_parameters_reach_exact_zero_states():
    p, g = np.ones(256, np.float32), np.full(256, 1e-30, np.float32)
    states = [{"codes": np.full(256, 127, np.uint8), "scales": np.full(1, np.nan, np.float32)}]
    step_host.step("lion", ("dynamic8",), p, g, states, (256,), 256, RULES["lion"].scalars(1, lr=0.1, beta2=0.0))
    assert states[0]["scales"].view(np.uint32).tolist() != [0], "1e-30 is above 2^-100: a living block"
    g[:] = 1e-31
    states[0]["scales"][:] = 0
    step_host.step("lion", ("dynamic8",), p, g, states, (256,), 256, RULES["lion"].scalars(1, lr=0.1, beta2=0.0))
    assert states[0]["scales"].view(np.uint32).tolist() == [0] and (states[0]["codes"] == 127).all()


def test_the_layout_can_be_forced_flat():
    rng = np.random.default_rng(9)
    p, g = (rng.standard_normal((4, 100)).astype(np.float32) for _ in range(2))
    results = []
    for shape, layout in (((4, 100), "flat"), ((400,), None)):
        states = [{"codes": np.full(400, 127, np.uint8), "scales": np.zeros(7, np.float32)}]
        s, mine = RULES["lion"].scalars(1, lr=0.1), p.copy()
        step_host.step("lion", ("dynamic8",), mine, g, states, shape, 64, s, layout)
        results.append((mine.tobytes(), states[0]["codes"].tobytes(), states[0]["scales"].tobytes()))
    assert results[0] == results[1]


def test_an_unsigned_or_signed_table_can_be_chosen():
    rng = np.random.default_rng(10)
    p, g = (rng.standard_normal(64).astype(np.float32) for _ in range(2))
    codes = {}
    for name, zero in (("dynamic8.signed", 127), ("dynamic8", 0)):
        v = {"codes": np.full(64, zero, np.uint8), "scales": np.zeros(1, np.float32)}
        states = [{"codes": np.zeros(64, np.float32)}, v]
        step_host.step("adamw", ("f32", name), p.copy(), g, states, (64,), 64, RULES["adamw"].scalars(1, lr=0.1))
        codes[name] = states[1]["codes"]
    assert codes["dynamic8"].max() == codes["dynamic8.signed"].max() == 255
    assert codes["dynamic8.signed"].min() >= 127 > codes["dynamic8"].min()


def read_only(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


def test_a_gradient_may_be_read_only():
    g = read_only(np.ones(8, np.float32))
    p = np.zeros(8, np.float32)
    step_host.step("sgd", (), p, g, [], (8,), 256, RULES["sgd"].scalars(1, lr=0.5))
    assert (p == -0.5).all()


def lion_call(**change: Any) -> None:
    state = {"codes": np.full((4, 64), 127, np.uint8), "scales": np.zeros((4, 1), np.float32)}
    call: dict[str, Any] = {
        "rule": "lion", "codecs": ("dynamic8",), "p": np.zeros((4, 64), np.float32), "g": np.ones((4, 64), np.float32),
        "states": [state], "shape": (4, 64), "block": 64, "scalars": RULES["lion"].scalars(1, lr=0.1),
    }  # fmt: skip
    call |= change
    p, codes = call["p"].copy(), state["codes"].copy()
    try:
        step_host.step(**call)
    except (TypeError, ValueError):
        assert (call["p"] == p).all() and (state["codes"] == codes).all(), "a refused step wrote something"
        raise


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"rule": "loin"}, ValueError, "unknown rule 'loin'"),
        ({"codecs": ("dynamic9",)}, ValueError, "unknown codec 'dynamic9'"),
        ({"codecs": ("f32.signed",)}, ValueError, "unknown codec"),
        ({"codecs": ("dynamic8", "f32")}, ValueError, "lion does not keep 2 states"),
        ({"p": np.zeros((4, 64), np.float64)}, TypeError, "p must be float32, float16 or bfloat16"),
        ({"g": np.zeros((4, 63), np.float32)}, ValueError, "g has 252 elements"),
        ({"g": np.zeros((64, 4), np.float32).T}, ValueError, "g must be C-contiguous"),
        ({"block": 0}, ValueError, "block must be at least 1"),
        ({"block": 32}, ValueError, r"scales.*float32\[8\]"),
        ({"layout": "columns"}, ValueError, "layout must be"),
        ({"scalars": np.zeros(9, np.float32)}, ValueError, r"scalars must be float32\[8\] for lion"),
        ({"states": [{"codes": np.zeros((4, 64), np.float32)}]}, TypeError, "codes.*must be"),
        ({"p": read_only(np.zeros((4, 64), np.float32))}, ValueError, "p is updated in place"),
        ({"codecs": (), "states": []}, ValueError, "lion does not keep 0 states"),
        ({"states": []}, ValueError, "0 states for 1 codecs"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change, error, says):
    lion_call()
    with pytest.raises(error, match=says):
        lion_call(**change)


def test_block_sizes_that_do_not_nest_are_refused():
    states = [{"codes": np.zeros(640, np.uint8), "scales": np.zeros(n, np.float32)} for n in (10, 7)]
    p = np.zeros(640, np.float32)
    s = RULES["adamw"].scalars(1, lr=0.1)
    with pytest.raises(ValueError, match="each divide the largest"):
        step_host.step("adamw", ("dynamic8", "dynamic8"), p, p.copy(), states, (640,), (64, 100), s)


ORACLE = [case for case in ORACLE_CASES if case.stem in RULES]


@pytest.mark.parametrize("case", ORACLE, ids=lambda case: case.label)
@pytest.mark.parametrize("codec", ["f32", "bf16", "int8_linear", "dynamic8"])
def test_every_rule_and_dialect_equals_the_oracle_with_every_codec(case, codec):
    """Fifteen hundred elements of all magnitudes, from the oracle's state at each of three steps."""
    record = codecs.CODECS[codec]
    opt = case.optimizer(refopt, record(block=64) if record.scope == "block" else record)
    form, rng = form_of(case.stem, case.hyper), np.random.default_rng(11)
    names = tuple(name for name, _ in form.states)
    p = log_uniform(rng, (5, 300))
    state = opt.init([p])
    for _ in range(3):
        g, mine = log_uniform(rng, (5, 300)), p.copy()
        kept = [state[0][name] for name in names]
        states = [copy.deepcopy(x.arrays if isinstance(x, Box) else {"codes": x}) for x in kept]
        (p,), state = opt.step([p], [g], state)
        step_host.step(
            form, (codec,) * len(names), mine, g, states, p.shape, 64, row(case.stem, state[0]["t"], opt.hyper)
        )
        assert_same_bits(mine, p, f"{form.name}: p")
        for name, have in zip(names, states, strict=True):
            want = state[0][name]
            for key, array in (want.arrays if isinstance(want, Box) else {"codes": want}).items():
                view = BF16 if codec == "bf16" else array.dtype
                assert_same_bits(have[key].view(view), array.view(view), f"{form.name}: {name}.{key}")


def log_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Magnitudes from 1e-12 to 1e4, and zeros."""
    x = rng.choice([-1.0, 1.0], shape) * 10 ** rng.uniform(-12, 4, shape)
    return np.asarray(x * (rng.random(shape) > 0.05), np.float32)
