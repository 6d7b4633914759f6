"""The host twin computes the oracle's bits, whatever the rule, codecs, formats, shape and number of threads."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.twins.combinations import EACH, pairs, sampled
from tests.twins.common import HYPERS, Case, check, inputs, log_uniform

pytest.importorskip("numba")
from refopt_cuda.kernels import step_host
from refopt_cuda.random import step_word
from refopt_cuda.rules import RULES

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
PLAIN_SGD = {"lr": 0.03, "wd": 0.07}
CASES = [
    Case("sgd", (), "float32", "float16", hyper=PLAIN_SGD),
    Case("sgd", ("bf16",), "float16", "bfloat16"),
    Case("adam", ("q4", "q4"), "bf16_kahan"),
    Case("adamw", ("f32", "f32")),
    Case("adamw", ("dynamic8", "dynamic8")),
    Case("adamw", ("compand8", "int8_linear"), "bfloat16", "bfloat16"),
    Case("lion", ("fp8",), "bf16_sr"),
    Case("rmsprop", ("compand8.bf16",), "bf16_ecc", "float16"),
]
F32, CODED, DRAWN = CASES[3], CASES[4], CASES[6]
BLOCKS = (1, 15, 16, 100, 256, 2048)


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=inputs(), block=st.sampled_from(BLOCKS), t0=st.sampled_from([0, 1, 700]))
def test_every_shape_block_and_step_equals_the_oracle_bit_for_bit(case, drawn, block, t0):
    check(case._replace(block=block), step_host.step, *drawn, t0)


@pytest.mark.parametrize("case", pairs() if NIGHTLY else [*EACH, *sampled(8)], ids=str)
def test_every_rule_codec_and_format_equals_the_oracle_bit_for_bit(case):
    """Fifteen hundred elements of all magnitudes."""
    rng = np.random.default_rng(11)
    check(case, step_host.step, log_uniform(rng, (5, 300)), [log_uniform(rng, (5, 300)) for _ in range(3)])


@pytest.mark.parametrize("case", [CASES[1], CASES[2], DRAWN], ids=str)
def test_threads_change_no_bit(case, monkeypatch):
    rng = np.random.default_rng(5)
    p, *gradients = (rng.standard_normal((37, 1030)).astype(np.float32) for _ in range(4))
    monkeypatch.setattr(step_host, "PARALLEL_FROM", 0)
    check(case._replace(block=256), step_host.step, p, gradients)


def test_large_tensors_take_the_parallel_path_by_default():
    rng = np.random.default_rng(6)
    p, g = (rng.standard_normal(step_host.PARALLEL_FROM + 77).astype(np.float32) for _ in range(2))
    check(CODED._replace(block=256), step_host.step, p, [g])


@settings(deadline=None)
@given(drawn=inputs(), blocks=st.sampled_from([(64, 256), (256, 32), (1, 16), (16, 4096), (15, 45)]))
def test_each_state_may_have_its_own_block_size(drawn, blocks):
    p, gradients = drawn
    for case in (CODED, CASES[2]):
        check(case._replace(block=blocks), step_host.step, p, gradients)


@pytest.mark.parametrize("case", [CASES[2], CODED, DRAWN], ids=str)
@pytest.mark.parametrize("change", [{"wd": 0.0}, {"gscale": 0.37, "maximize": True}], ids=str)
def test_gradient_scale_comes_first_and_its_sign_is_ascent(case, change):
    rng = np.random.default_rng(8)
    p, *gradients = (rng.standard_normal(300).astype(np.float32) for _ in range(4))
    check(case._replace(hyper=HYPERS[case.stem] | change), step_host.step, p, gradients)


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
        ({"codecs": ("dynamic9",)}, ValueError, "step: unknown codec 'dynamic9'"),
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
        ({"states": [{"codes": np.zeros((4, 64), np.uint8)}]}, ValueError, "needs .*scales"),
        ({"codecs": ("bf16_sr",)}, ValueError, "no state is kept in bf16_sr"),
        ({"codecs": ("q4",)}, ValueError, r"codes.*uint8\[128\]"),
        ({"codecs": ("compand8",)}, TypeError, "codes.*must be int8"),
        ({"weight": "dynamic8"}, ValueError, "no format of weights is named dynamic8"),
        ({"weight": "bf16_sr"}, TypeError, "p of bf16_sr must be bfloat16 words"),
        ({"p": np.zeros((4, 64), np.uint16), "weight": "bf16_sr"}, ValueError, "random must be"),
        ({"p": np.zeros((4, 64), np.uint16), "weight": "bf16_rem16"}, ValueError, "needs rest"),
        ({"p": np.zeros((4, 64), np.uint16), "weight": "bf16_ecc", "rest": np.zeros(256, np.int16)}, TypeError, "int8"),
        ({"rest": np.zeros((4, 64), np.int16)}, ValueError, "nothing lies beside"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change, error, says):
    lion_call()
    with pytest.raises(error, match=says):
        lion_call(**change)


def test_a_word_of_the_step_and_a_number_decide_the_random_bits():
    """Words are drawn by an element's place: two tensors of a step differ, and so do two steps of a tensor."""
    rng = np.random.default_rng(12)
    g = rng.standard_normal(64).astype(np.float32)
    seen = set()
    for t, number in ((1, 0), (1, 1), (2, 0), (2, 1)):
        p = np.full(64, 0x3F80, np.uint16)
        s = RULES["sgd"].scalars(1, lr=1e-3)
        step_host.step("sgd", (), p, g, [], (64,), 64, s, weight="bf16_sr", random=(step_word(0, t), number))
        seen.add(p.tobytes())
    assert len(seen) == 4


@pytest.mark.parametrize("cuts", [(64, 128), (33, 66, 165), (1, 2, 3, 255)])
def test_pieces_of_a_tensor_draw_the_bits_of_the_whole(cuts):
    rng, n = np.random.default_rng(13), 300
    g = rng.standard_normal(n).astype(np.float32)
    whole = np.full(n, 0x3F80, np.uint16)
    pieces, s = whole.copy(), RULES["sgd"].scalars(1, lr=1e-3)
    more = {"weight": "bf16_sr", "random": (step_word(0, 1), 2)}
    step_host.step("sgd", (), whole, g, [], (n,), 64, s, **more)
    for lo, hi in zip((0, *cuts), (*cuts, n), strict=True):
        step_host.step("sgd", (), pieces[lo:hi], g[lo:hi], [], (hi - lo,), 64, s, first=lo, **more)
    assert np.array_equal(pieces, whole)
    assert len(set(whole.tolist())) > 1


@pytest.mark.parametrize("first", [-1, 1.5, None])
def test_a_piece_begins_at_an_element(first):
    with pytest.raises(ValueError, match="first must be the number of an element"):
        lion_call(first=first)


def test_block_sizes_that_do_not_nest_are_refused():
    states = [{"codes": np.zeros(640, np.uint8), "scales": np.zeros(n, np.float32)} for n in (10, 7)]
    p = np.zeros(640, np.float32)
    s = RULES["adamw"].scalars(1, lr=0.1)
    with pytest.raises(ValueError, match="each divide the largest"):
        step_host.step("adamw", ("dynamic8", "dynamic8"), p, p.copy(), states, (640,), (64, 100), s)
