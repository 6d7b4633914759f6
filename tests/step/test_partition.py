"""Partition: every rank steps its own blocks alone, and together they have the bits of one."""

from __future__ import annotations

import copy
import math
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import parts, same_bits, same_state
from tests.cases import EVERY, RULES, WEIGHTS, CodecCase, RuleCase, label
from tests.places.laws import PLACES, placed, some_codecs
from tests.strategies import SHAPES, f32, runs

every_rule = pytest.mark.parametrize("case", EVERY, ids=label)
RANKS = st.sampled_from([1, 2, 3, 5, 64])


def tensors(case: RuleCase, data: Any, steps: int = 2) -> tuple[list[Any], list[list[Any]]]:
    """A few tensors, and for each step their gradients, one of them missing."""
    drawn = [data.draw(runs(steps, case.shapes or SHAPES)) for _ in range(data.draw(st.integers(1, 3)))]
    grads = [list(step) for step in zip(*(g for _, g in drawn), strict=True)]
    grads[-1][data.draw(st.integers(0, len(drawn) - 1))] = None
    return [p for p, _ in drawn], grads


def same_states(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        same_state(a, b, f"state[{k}]")


def bytes_of(shard: list[dict[str, Any]]) -> int:
    kept = [share[n] for share in shard for n in share.keys() - {"tensor", "window", "t"}]
    return sum(a.nbytes for x in kept for a in x.arrays.values())


def model(ref: ModuleType, codec: str = "dynamic8", **options: Any) -> tuple[Any, list[Any], list[Any]]:
    rng = np.random.default_rng(7)
    params = [rng.standard_normal(shape).astype(f32) for shape in [(700,), (3, 300), (), (40, 2)]]
    opt = ref.Optimizer("adamw", codec, lr=0.01, **options)
    return opt, params, [rng.standard_normal(p.shape).astype(f32) for p in params]


@every_rule
@given(data=st.data(), stage=st.sampled_from([1, 2, 3]), ranks=RANKS)
def test_ranks_together_have_the_bits_of_one(
    ref: ModuleType, case: RuleCase, stage: int, ranks: int, data: Any
) -> None:
    params, grads = tensors(case, data)
    opt = case.optimizer(ref, some_codecs(ref, case, data), maximize=data.draw(st.booleans()))
    part = ref.Partition(opt, params, ranks, stage)
    state, many = opt.init(params), params
    shards = part.scatter(state)
    for g in grads:
        params, state = opt.step(params, g, state)
        many, shards = part.step(many, g, shards)
    for k, (a, b) in enumerate(zip(many, params, strict=True)):
        same_bits(a, b, f"params[{k}]")
    same_states(part.gather(shards), state)


@pytest.mark.parametrize("case", RULES, ids=label)
@pytest.mark.parametrize("place", PLACES)
@given(data=st.data(), ranks=RANKS, size=st.sampled_from([1, 3]))
def test_a_share_may_be_in_any_place(
    ref: ModuleType, case: RuleCase, place: str, size: int, ranks: int, data: Any
) -> None:
    params, (first, second) = tensors(case, data)
    codecs = some_codecs(ref, case, data)
    want = case.optimizer(ref, codecs)
    params_1, state_1 = want.step(params, first, want.init(params))
    params_2, state_2 = want.step(params_1, second, state_1)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opt = case.optimizer(ref, codecs, placed(ref, place, size, folder))
        part = ref.Partition(opt, params, ranks)
        got, shards = part.step(params, first, part.scatter(opt.init(params)))
        got, shards = part.step(got, second, shards)
        same_states(part.gather(shards), state_2)
    for k, (a, b) in enumerate(zip(got, params_2, strict=True)):
        same_bits(a, b, f"params[{k}]")


@pytest.mark.parametrize("weights", WEIGHTS, ids=label)
@given(data=st.data(), ranks=RANKS)
def test_formats_of_weights_draw_and_carry_the_same_bits_in_every_share(
    ref: ModuleType, weights: CodecCase, ranks: int, data: Any
) -> None:
    case = data.draw(st.sampled_from(RULES))
    params, grads = tensors(case, data)
    opt = case.optimizer(ref, some_codecs(ref, case, data) | {"p": weights.record(ref)}, seed=11)
    part = ref.Partition(opt, params, ranks)
    state, many = opt.init(params), params
    shards = part.scatter(state)
    for g in grads:
        params, state = opt.step(params, g, state)
        many, shards = part.step(many, g, shards)
    for k, (a, b) in enumerate(zip(many, params, strict=True)):
        same_bits(a, b, f"params[{k}]")
    same_states(part.gather(shards), state)


@every_rule
@given(data=st.data(), ranks=RANKS, others=RANKS)
def test_a_state_gathered_and_cut_for_other_ranks_is_the_same_bytes(
    ref: ModuleType, case: RuleCase, ranks: int, others: int, data: Any
) -> None:
    params, grads = tensors(case, data, 1)
    opt = case.optimizer(ref, some_codecs(ref, case, data))
    _, state = opt.step(params, grads[0], opt.init(params))
    one, other = ref.Partition(opt, params, ranks), ref.Partition(opt, params, others)
    same_states(other.gather(other.scatter(one.gather(one.scatter(state)))), state)


@every_rule
@given(data=st.data(), ranks=RANKS)
def test_every_block_has_one_owner_and_none_is_split(ref: ModuleType, case: RuleCase, ranks: int, data: Any) -> None:
    shapes = data.draw(st.lists(st.sampled_from(list(case.shapes or SHAPES)), min_size=1, max_size=5))
    opt = case.optimizer(ref, some_codecs(ref, case, data))
    part = ref.Partition(opt, [np.zeros(s, f32) for s in shapes], ranks)
    assert part.stretch % opt.block == 0 and part.stretch * ranks == part.size + part.padding
    assert part.padding < ranks * opt.block or part.size == 0
    offset = 0
    for k, shape in enumerate(shapes):
        cuts = [(r, a, b) for r, mine in enumerate(part.windows) for j, a, b in mine if j == k]
        assert [a for _, a, _ in cuts] == [0, *(b for _, _, b in cuts[:-1])] and cuts[-1][2] == math.prod(shape)
        bounds = opt.bounds(shape).tolist()
        for rank, a, b in cuts:
            assert a in bounds and b in bounds
            assert rank == min((offset + a) // part.stretch, ranks - 1), "a share begins in its owner's stretch"
        offset += math.prod(shape)


@every_rule
@given(data=st.data(), ranks=RANKS)
def test_the_ranks_hold_all_states_once_to_the_byte(ref: ModuleType, case: RuleCase, ranks: int, data: Any) -> None:
    params, grads = tensors(case, data, 1)
    opt = case.optimizer(ref, some_codecs(ref, case, data))
    part = ref.Partition(opt, params, ranks, 3)
    _, state = opt.step(params, grads[0], opt.init(params))
    shards = part.scatter(state)
    said = [part.held(rank) for rank in range(ranks)]
    assert [held["states"] for held in said] == [bytes_of(shard) for shard in shards]
    if case.stem in {c.stem for c in RULES}:
        total = sum(a.nbytes for s in state for n, x in s.items() if n != "t" for a in parts(x).values())
        assert sum(bytes_of(shard) for shard in shards) == total
    assert sum(held["p"] for held in said) == sum(p.size for p in params) * (2 if opt.codecs["p"].stem == "bf16" else 4)
    assert sum(held["g"] for held in said) == sum(p.nbytes for p in params)


def test_a_rank_alone_computes_its_own_share(ref: ModuleType) -> None:
    opt, params, grads = model(ref)
    part = ref.Partition(opt, params, 3, 3)
    shards = part.scatter(opt.init(params))
    want_p, want = part.step(params, grads, shards)
    ps, gs = part.split("params", params), part.split("grads", grads)
    alone = [part.step_rank(rank, ps[rank], gs[rank], shards[rank]) for rank in range(3)]
    for a, b in zip(part.join([p for p, _ in alone]), want_p, strict=True):
        same_bits(a, b, "p")
    same_states(part.gather([s for _, s in alone]), part.gather(want))


def test_stages_hold_and_exchange_what_the_paper_says(ref: ModuleType) -> None:
    """Rajbhandari et al., section 5 and 7: with 2-byte weights, 4-byte gradients and float32 Adam on N ranks."""
    n, ranks = 2**16, 8
    opt = ref.Optimizer("adam", {"p": "bf16"})
    whole = {stage: ref.Partition(opt, np.zeros(n, f32), ranks, stage) for stage in (1, 2, 3)}
    held = {stage: part.held(5) for stage, part in whole.items()}
    assert held[1] == {"p": 2 * n, "g": 4 * n, "states": 8 * n // ranks}
    assert held[2] == {"p": 2 * n, "g": 4 * n // ranks, "states": 8 * n // ranks}
    assert held[3] == {"p": 2 * n // ranks, "g": 4 * n // ranks, "states": 8 * n // ranks}
    moved = {stage: [(m.what, m.way, m.bytes) for m in part.traffic()] for stage, part in whole.items()}
    assert moved[1] == moved[2] == [("g", "reduce-scatter", 4 * n), ("p", "all-gather", 2 * n)]
    assert moved[3] == [("p", "all-gather", 2 * n)] * 2 + [("g", "reduce-scatter", 4 * n)]


def test_a_pending_gradient_is_shared_out_too(ref: ModuleType) -> None:
    opt, params, grads = model(ref, delay=1, warm=1)
    part = ref.Partition(opt, params, 3)
    state, many = opt.init(params), params
    shards = part.scatter(state)
    for k in range(4):
        g = [a * f32(k + 1) for a in grads]
        params, state = opt.step(params, g, state)
        many, shards = part.step(many, g, shards)
    assert all("pending" in s for s in state) and all("pending" in s for shard in shards for s in shard)
    same_states(part.gather(shards), state)
    params, state = opt.finish(params, state)
    many, shards = ref.Partition(opt, params, 3).finish(many, part.scatter(part.gather(shards)))
    for a, b in zip(many, params, strict=True):
        same_bits(a, b, "p")
    same_states(part.gather(shards), state)


def test_a_gradient_with_inf_is_skipped_by_every_rank(ref: ModuleType) -> None:
    opt, params, grads = model(ref, nonfinite="skip")
    grads[1][2, 299] = np.inf
    part = ref.Partition(opt, params, 4)
    got, shards = part.step(params, grads, part.scatter(opt.init(params)))
    same_bits(got[1], params[1], "p")
    assert {s["t"] for shard in shards for s in shard if s["tensor"] == 1} == {0}
    assert {s["t"] for shard in shards for s in shard if s["tensor"] != 1} == {1}


def test_hyper_parameters_may_change_for_one_step(ref: ModuleType) -> None:
    opt, params, grads = model(ref)
    part = ref.Partition(opt, params, 2)
    state = opt.init(params)
    want, _ = opt.step(params, grads, state, lr=0.5)
    got, _ = part.step(params, grads, part.scatter(state), lr=0.5)
    for a, b in zip(got, want, strict=True):
        same_bits(a, b, "p")


def test_a_dict_stays_a_dict(ref: ModuleType) -> None:
    opt, params, grads = model(ref)
    named, of = dict(zip("abcd", params, strict=True)), dict(zip("dcba", grads[::-1], strict=True))
    part = ref.Partition(opt, named, 2)
    got, _ = part.step(named, of, part.scatter(opt.init(named)))
    want, _ = opt.step(params, grads, opt.init(params))
    assert list(got) == list("abcd")
    for a, b in zip(got.values(), want, strict=True):
        same_bits(a, b, "p")


REFUSED = {
    "no ranks": (lambda ref, opt, p: ref.Partition(opt, p, 0), ValueError, r"Partition: ranks must be .*, got 0"),
    "half a rank": (lambda ref, opt, p: ref.Partition(opt, p, 1.5), ValueError, r"ranks must be .*, got 1.5"),
    "stage 4": (lambda ref, opt, p: ref.Partition(opt, p, 2, 4), ValueError, r"stage must be 1, 2 or 3, got 4"),
    "not an array": (lambda ref, opt, p: ref.Partition(opt, [1.0], 2), TypeError, r"Partition: params\[0\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shared_out_is_refused(ref: ModuleType, what: str) -> None:
    run, error, says = REFUSED[what]
    opt, params, _ = model(ref)
    with pytest.raises(error, match=says):
        run(ref, opt, params)


WRONG = {
    "another number of ranks": lambda part, shards: shards[:-1],
    "another rank's": lambda part, shards: [shards[1], shards[0], shards[2]],
    "a role missing": lambda part, shards: [[{n: x for n, x in s.items() if n != "v"} for s in r] for r in shards],
    "a share missing": lambda part, shards: [shards[0][1:], *shards[1:]],
    "of different steps": lambda part, shards: [[s | {"t": rank} for s in r] for rank, r in enumerate(shards)],
}


@pytest.mark.parametrize("what", WRONG)
def test_shards_of_another_partition_are_refused_before_anything_changes(ref: ModuleType, what: str) -> None:
    opt, params, grads = model(ref)
    part = ref.Partition(opt, params, 3)
    shards = part.scatter(opt.init(params))
    wrong, before = WRONG[what](part, shards), [p.copy() for p in params]
    kept = copy.deepcopy(wrong)
    for call, run in {"step": lambda: part.step(params, grads, wrong), "gather": lambda: part.gather(wrong)}.items():
        with pytest.raises(ref.StateError, match=rf"^{call}: .*(partition|rank|steps)"):
            run()
    for a, b in zip(params, before, strict=True):
        same_bits(a, b, "p")
    for a, b in zip([s for r in wrong for s in r], [s for r in kept for s in r], strict=True):
        same_state({n: x for n, x in a.items() if n not in ("tensor", "window")},
                   {n: x for n, x in b.items() if n not in ("tensor", "window")})  # fmt: skip


def test_shares_of_another_codec_or_block_are_refused(ref: ModuleType) -> None:
    opt, params, grads = model(ref)
    shards = ref.Partition(opt, params, 2).scatter(opt.init(params))
    for codec in ("int8_linear", ref.codecs.dynamic8(block=128), "f32"):
        other, _, _ = model(ref, codec)
        with pytest.raises(ref.StateError, match=r"step: .*'m'.* this optimizer has|made by another partition"):
            ref.Partition(other, params, 2).step(params, grads, shards)


def test_gradients_of_another_shape_or_type_are_refused(ref: ModuleType) -> None:
    opt, params, grads = model(ref)
    part = ref.Partition(opt, params, 2)
    shards = part.scatter(opt.init(params))
    with pytest.raises(ref.ShapeError, match=r"step: grads\[1\] has shape \(300, 3\), params\[1\] has \(3, 300\)"):
        part.step(params, [grads[0], grads[1].T, *grads[2:]], shards)
    with pytest.raises(TypeError, match=r"step: grads\[0\] must be float32, got float64"):
        part.step(params, [grads[0].astype(float), *grads[1:]], shards)
    with pytest.raises(ref.ShapeError, match=r"step: params\[3\] has shape \(2, 40\)"):
        part.step([*params[:3], params[3].T], grads, shards)
    with pytest.raises(ref.ShapeError, match=r"step: 3 grads"):
        part.step(params, grads[:3], shards)
