"""The coded step: fresh states move the weights, each tensor counts its own steps, no input changes."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import parts, same_bits, same_state
from tests.cases import RULES, STATEFUL, STEMS, RuleCase, label
from tests.strategies import assignments, f32, follow, records, runs

every_rule = pytest.mark.parametrize("case", RULES, ids=label)
coded_rules = pytest.mark.parametrize("case", STATEFUL, ids=label)


@pytest.mark.parametrize("case", [c for c in STATEFUL if "init_acc" not in c.hyper], ids=label)
@given(run=runs(steps=1), data=st.data())
def test_the_first_coded_step_is_the_uncoded_one(ref: ModuleType, case: RuleCase, run: Any, data: Any) -> None:
    p, grads = run
    coded, _ = follow(case.optimizer(ref, records(ref, data.draw(assignments(case.states)))), p, grads)
    plain, _ = follow(case.optimizer(ref), p, grads)
    same_bits(coded, plain, "p")


@coded_rules
@given(run=runs(), data=st.data())
def test_a_coded_step_is_decode_rule_encode(ref: ModuleType, case: RuleCase, run: Any, data: Any) -> None:
    """Written out here: weights move by the fresh states, and these are encoded once, each with its own codec."""
    p, grads = run
    codecs = records(ref, data.draw(assignments(case.states)))
    unsigned = {s.name for s in ref.rules.RULES[case.stem].states if s.nonnegative}
    codecs = {s: c(signed=False) if s in unsigned and c.scope == "block" else c for s, c in codecs.items()}
    opt = case.optimizer(ref, codecs)
    q, state = [p], opt.init([p])
    for t, g in enumerate(grads, 1):
        old = {s: state[0][s].decode() if codecs[s].stem != "f32" else state[0][s] for s in case.states}
        q, state = opt.step(q, [g], state)
        with np.errstate(all="ignore"):
            p, new = case.update(ref, p, g, old, t)
        same_bits(q[0], np.asarray(p), f"p at t={t}")
        for s in case.states:
            box = codecs[s].encode(np.asarray(new[s]))
            for name, a in parts(state[0][s]).items():
                same_bits(a, box.arrays[name], f"{s}.{name} at t={t}")


@every_rule
@given(run=runs(), data=st.data())
def test_a_step_mutates_none_of_its_inputs(ref: ModuleType, case: RuleCase, run: Any, data: Any) -> None:
    p, grads = run
    opt = case.optimizer(ref, records(ref, data.draw(assignments(case.states))) or None)
    p, state = follow(opt, [p], [[grads[0]]])
    before = copy.deepcopy((p, grads, state))
    opt.step(p, [grads[1]], state)
    same_bits(p[0], before[0][0], "p")
    same_bits(grads[1], before[1][1], "g")
    same_state(state[0], before[2][0])


@pytest.mark.parametrize("stem", STEMS)
@given(seed=st.integers(0, 2**32 - 1))
def test_each_tensor_counts_its_own_steps(ref: ModuleType, stem: str, seed: int) -> None:
    """Three tensors of one optimizer, some without gradients at times: each as if it were alone."""
    rng = np.random.default_rng(seed)
    ps = [rng.standard_normal(n).astype(f32) for n in (5, 1, 40)]
    grads = [[rng.standard_normal(p.size).astype(f32) if rng.random() < 0.6 else None for p in ps] for _ in range(5)]
    opt = ref.Optimizer("adam", stem, lr=0.02)
    together, state = follow(opt, ps, grads)
    for k, p in enumerate(ps):
        alone, own = follow(opt, [p], [[g[k]] for g in grads if g[k] is not None])
        same_bits(together[k], alone[0], f"p[{k}]")
        same_state(state[k], own[0], f"state[{k}]")


@every_rule
def test_without_a_gradient_nothing_advances(ref: ModuleType, case: RuleCase) -> None:
    p, g = np.arange(3, dtype=f32), np.ones(3, f32)
    opt = case.optimizer(ref)
    ps, state = follow(opt, [p, p], [[g, g], [None, g]])
    assert [s["t"] for s in state] == [1, 2]
    once, kept = follow(opt, [p], [[g]])
    same_bits(ps[0], once[0], "p")
    same_state(state[0], kept[0])


@every_rule
def test_skipping_a_bad_gradient_leaves_its_tensor_alone(ref: ModuleType, case: RuleCase) -> None:
    p, g = np.arange(3, dtype=f32), np.ones(3, f32)
    opt = case.optimizer(ref, nonfinite="skip")
    bad = f32([1.0, np.inf, 1.0])
    ps, state = follow(opt, [p, p], [[g, g], [bad, g]])
    once, kept = follow(opt, [p, p], [[g, g], [None, g]])
    for k in range(2):
        same_bits(ps[k], once[k], f"p[{k}]")
        same_state(state[k], kept[k], f"state[{k}]")


@every_rule
@given(run=runs(low=-6))
def test_gscale_and_maximize_act_on_the_gradient_before_all_else(ref: ModuleType, case: RuleCase, run: Any) -> None:
    p, grads = run
    got, _ = follow(case.optimizer(ref, gscale=0.3, maximize=True), p, grads)
    want, _ = follow(case.optimizer(ref), p, [-(g * f32(0.3)) for g in grads])
    same_bits(got, want, "p")


@given(run=runs(shapes=[(4, 20), (2, 3, 17)]))
def test_storage_order_does_not_matter(ref: ModuleType, run: Any) -> None:
    p, grads = run
    opt = ref.Optimizer("adamw", "dynamic8", "paged")
    plain, state = follow(opt, [p], [[g] for g in grads])
    column, other = follow(opt, [np.asfortranarray(p)], [[np.asfortranarray(g)] for g in grads])
    strided, _ = follow(opt, [np.repeat(p, 2, -1)[..., ::2]], [[np.repeat(g, 2, -1)[..., ::2]] for g in grads])
    same_bits(strided[0], plain[0], "p")
    same_bits(np.ascontiguousarray(column[0]), plain[0], "p")
    same_state(other[0], state[0])


@given(run=runs(shapes=[(3, 40), (129,), (2,)]))
def test_weights_in_bf16_are_rounded_after_each_step(ref: ModuleType, run: Any) -> None:
    p, grads = run
    p = (p.view(np.uint32) & 0xFFFF0000).view(f32)
    rounded, plain = ref.Optimizer("adamw", {"p": "bf16"}), ref.Optimizer("adamw")
    q, state, kept = [p], rounded.init([p]), plain.init([p])
    for g in grads:
        want, kept = plain.step(q, [g], kept)
        q, state = rounded.step(q, [g], state)
        same_bits(q[0], ref.codecs.bf16.encode(want[0]).decode(), "p")
        same_state(state[0], kept[0])


@coded_rules
@pytest.mark.parametrize("stem", STEMS)
def test_a_state_that_was_saved_continues_with_the_same_bits(ref: ModuleType, case: RuleCase, stem: str) -> None:
    rng = np.random.default_rng(6)
    p, *grads = rng.standard_normal((7, 3, 40)).astype(f32)
    opt = case.optimizer(ref, stem)
    q, state = follow(opt, [p], [[g] for g in grads[:3]])
    loaded = pickle.loads(pickle.dumps(state))
    one, end = follow(opt, q, [[g] for g in grads[3:]], state)
    other, same = follow(opt, q, [[g] for g in grads[3:]], loaded)
    same_bits(other[0], one[0], "p")
    same_state(same[0], end[0])


@coded_rules
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 40), (2, 300), (2, 3, 17)], ids=str)
def test_the_bytes_that_a_record_promises_are_the_bytes_kept(
    ref: ModuleType, case: RuleCase, stem: str, shape: tuple[int, ...]
) -> None:
    opt = case.optimizer(ref, stem)
    _, state = follow(opt, [np.ones(shape, f32)], [[np.ones(shape, f32)]])
    for s in case.states:
        assert sum(a.nbytes for a in parts(state[0][s]).values()) == opt.codecs[s].nbytes(shape)


def test_a_nonnegative_state_takes_the_unsigned_table(ref: ModuleType) -> None:
    opt = ref.Optimizer("adam", "dynamic8")
    assert (opt.codecs["m"].signed, opt.codecs["v"].signed) == (True, False)


@pytest.mark.parametrize("stem", ["dynamic8", "int8_linear"])
def test_a_nonnegative_state_keeps_a_signed_table_that_was_asked_for(ref: ModuleType, stem: str) -> None:
    """For experiments, and with a warning; naming the record or its block asks for no sign."""
    codec, p, g = ref.codecs.CODECS[stem], f32([1, -2, 3]), f32([0.5, -0.25, 1])
    for asked in (codec(signed=True), codec(signed=True)(block=64)):
        with pytest.warns(UserWarning, match=rf"v is never negative; {stem}\(signed=True\)") as caught:
            opt = ref.Optimizer("adamw", {"v": asked})
        assert caught[0].filename == __file__
        _, state = follow(opt, p, [g])
        _, exact = follow(ref.Optimizer("adamw"), p, [g])
        same_bits(state[0]["v"].codes, codec.encode(exact[0]["v"]).codes, "codes")
        assert opt.step(p, g, state)[1][0]["v"].codec.signed
    with warnings.catch_warnings(action="error"):
        assert not any(ref.Optimizer("adamw", {"v": c}).codecs["v"].signed for c in (stem, codec, codec(block=64)))


def test_tensors_below_min_size_stay_uncoded(ref: ModuleType) -> None:
    state = ref.Optimizer("lion", "dynamic8", min_size=10).init([np.ones(9, f32), np.ones(10, f32)])
    assert [type(s["m"]).__name__ for s in state] == ["ndarray", "Box"]


def test_torch_words_are_understood(ref: ModuleType) -> None:
    one = ref.Optimizer("adamw", betas=(0.8, 0.9), weight_decay=0.3).hyper
    assert one == ref.Optimizer("adamw", beta1=0.8, beta2=0.9, wd=0.3).hyper


def test_trees_come_back_as_they_went_in(ref: ModuleType) -> None:
    """An array, a list, a tuple, a dict (its gradients by key, in any order), a 0-d number."""
    opt, a, b = ref.Optimizer("sgd", lr=1.0), f32([1.0]), f32([2.0, 3.0])
    state = opt.init([a, b])
    assert [x.tolist() for x in opt.step([a, b], [a, b], state)[0]] == [[0.0], [0.0, 0.0]]
    assert isinstance(opt.step((a, b), (a, b), state)[0], tuple)
    got, _ = opt.step({"a": a, "b": b}, {"b": b, "a": a}, state)
    assert {k: v.tolist() for k, v in got.items()} == {"a": [0.0], "b": [0.0, 0.0]}
    assert opt.step(a, a, opt.init(a))[0].tolist() == [0.0]
    assert opt.step(f32(3.0), f32(1.0), opt.init(f32(3.0)))[0] == 2.0
    assert opt.step(a, None, opt.init(a))[0].tolist() == [1.0]


@given(run=runs(1), stem=st.sampled_from(["dynamic8", "int8_linear", "bf16"]))
def test_stored_reads_see_what_the_codec_keeps(ref: ModuleType, run: Any, stem: str) -> None:
    """AdamW's first step by hand, from moments that have been through their codecs."""
    p, (g,) = run
    hyper = {"lr": 0.01, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "wd": 0.1}
    opt = ref.Optimizer("adamw", stem, reads="stored", **hyper)
    moved, (state,) = opt.step(p, g, opt.init(p))
    with np.errstate(all="ignore"):
        _, fresh = ref.rules.adamw.update(p, g, ref.rules.adamw.init(p), t=1, **hyper)
        m, v = (opt.codecs[n].encode(fresh[n]).decode() for n in ("m", "v"))
        r = f32(1) / (np.sqrt(v) * f32(1 / math.sqrt(1 - 0.97)) + f32(1e-7))
        same_bits(moved, p * f32(1 - 0.01 * 0.1) - f32(0.01 / (1 - 0.8)) * (m * r), "p")
    for n in ("m", "v"):
        same_bits(state[n].codes, opt.codecs[n].encode(fresh[n]).codes, n)
