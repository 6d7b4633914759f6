"""Schedule-Free AdamW as a rule of elements: its scalars, its functor, its Numba form and its kernels, each against the
oracle word for word. The rule is not in the fast path's table yet, so these tests put it there for themselves."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refopt import rules as oracle
from refopt_cuda import rules
from refopt_cuda.kernels import build
from refopt_cuda.rules import Form, form_of, hypers, row, schedule_free
from refopt_cuda.rules.schedule_free import Past, following
from tests.bits import same_bits
from tests.kernels.functors import SOURCE, Functors, compiled
from tests.kernels.test_functors import arrays

f32: Any = np.float32
Array = np.ndarray
HYPER = {"lr": 0.013, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "wd": 0.06}
WEIGHTS = [{}, {"warmup": 5}, {"r": 1.5}, {"r": 0.5, "lr_power": 1.5, "warmup": 3}, {"lr_power": 0.0, "warmup": 7}]
EDGES = [{"lr": 0.0}, {"lr": 0.0, "lr_power": -1.0}, {"lr_power": -3.0, "warmup": 9}, {"r": -2.0}, {"r": 300.0}]
PASTS = st.builds(Past, st.sampled_from([0.0, 1e-9, 0.37, 4e3]), st.sampled_from([0.0, 1e-4, 0.013, 2.0]))


@pytest.fixture(scope="module", autouse=True)
def known():
    """The rule in the table of those that have kernels; no other."""
    kept = dict(rules.RULES)
    rules.RULES.clear()
    rules.RULES["schedule_free"] = schedule_free
    yield
    rules.RULES.clear()
    rules.RULES.update(kept)


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="module")
def functors(known, gxx, tmp_path_factory) -> Functors:
    return Functors(compiled(gxx, SOURCE, tmp_path_factory.mktemp("schedule_free")))


def state_of(past: Past, z: Array, v: Array) -> dict[str, Array]:
    """The oracle's state: ours, and the past beside it."""
    return {"z": z, "v": v, "weight_sum": np.array(past.weight_sum), "lr_max": np.array(past.lr_max)}


def past_of(state: dict[str, Array]) -> Past:
    return Past(float(state["weight_sum"]), float(state["lr_max"]))


def probed(past: Past, t: int, hyper: dict[str, Any]) -> tuple[dict[str, np.float32], Past]:
    """The oracle's scalars, read off its steps where all but one of them meet 0, 1 or nothing; and what it leaves."""
    one, none, still = f32([1.0]), f32([0.0]), {**hyper, "wd": 0.0}
    shared, _ = oracle.schedule_free.update(none, none, state_of(past, one, none), t=t, **still)
    unit = {**still, "beta2": 0.0, "eps": 0.0}
    along, moved = oracle.schedule_free.update(none, one, state_of(past, none, none), t=t, **unit)
    _, kept = oracle.schedule_free.update(none, one, state_of(past, none, one), t=t, **still)
    _, fresh = oracle.schedule_free.update(none, one, state_of(past, none, none), t=t, **still)
    found = {"c": shared, "along": along, "lr": -moved["z"], "omb2": fresh["v"]}
    same_bits(kept["v"], f32(hyper["beta2"]) + fresh["v"], "v")
    return {name: x[0] for name, x in found.items()}, past_of(moved)


def same_scalars(got: Array, want: dict[str, np.float32], what: str) -> None:
    named = dict(zip(schedule_free.SCALARS, got, strict=True))
    for name, x in want.items():
        same_bits(np.array([named[name]]) + f32(0), np.array([x]) + f32(0), f"{what}: {name}")  # -0 is 0


def hexed(past: Past) -> list[str]:
    return [x.hex() for x in past]


@pytest.mark.parametrize("options", WEIGHTS + EDGES, ids=str)
def test_scalars_and_past_are_the_oracles_at_each_of_many_steps(options):
    hyper, past, theirs = HYPER | options, Past(), Past()
    for t in range(1, 700):
        want, theirs = probed(theirs, t, hyper)
        got, past = following(past, t, **hyper)
        same_scalars(got, want, f"{options} t={t}")
        assert hexed(past) == hexed(theirs), f"{options} t={t}"
        same_bits(schedule_free.scalars(t, **hyper), got, f"{options} t={t}: without a past")


@given(
    past=PASTS, t=st.integers(1, 10**6), lr=st.sampled_from([0.0, 1e-4, 0.013, 0.5]), options=st.sampled_from(WEIGHTS)
)
def test_a_rate_that_changes_is_weighed_by_the_past(past, t, lr, options):
    hyper = HYPER | options | {"lr": lr}
    want, theirs = probed(past, t, hyper)
    got, mine = following(past, t, **hyper)
    same_scalars(got, want, f"{past} {hyper} t={t}")
    assert hexed(mine) == hexed(theirs)


def test_a_past_that_was_not_constant_is_not_made_up_from_t():
    """After a drop of lr the weights still go by the highest rate: two numbers that t does not know."""
    _, past = following(Past(), 1, lr=0.2)
    dropped, _ = following(past, 2, lr=0.1)
    c = schedule_free.SCALARS.index("c")
    assert dropped[c] == 0.5
    assert following(Past(0.01, 0.1), 2, lr=0.2)[0][c] == f32(0.8)
    same_bits(schedule_free.scalars(2, lr=0.1)[c : c + 1], f32([0.5]), "c")


def test_a_late_step_is_asked_for_in_any_order():
    steps = [5000, 1, 4999, 5001, 2, 5000]
    schedule_free._sums.cache_clear()
    asked = [schedule_free.scalars(t, lr=0.3, warmup=40, r=0.7) for t in steps]
    past = Past()
    walked = {}
    for t in range(1, 5002):
        walked[t], past = following(past, t, lr=0.3, warmup=40, r=0.7)
    for t, got in zip(steps, asked, strict=True):
        same_bits(got, walked[t], f"t={t}")


def test_a_sum_of_equal_weights_is_not_t_times_the_weight():
    """Why the sum is added up term by term."""
    past = schedule_free._replayed(1000, 0.1, 0.0, 2.0, 0)
    assert past.weight_sum != 1000 * 0.1**2.0
    assert past.weight_sum == pytest.approx(1000 * 0.1**2.0)


def test_the_form_knows_every_hyper_parameter_and_state_of_the_oracles_record():
    record = oracle.RULES["schedule_free"]
    assert hypers("schedule_free") == {h.name for h in record.hypers}
    assert schedule_free.STATES == tuple((s.name, s.nonnegative) for s in record.states if s.dtype == f32)
    assert Past._fields == tuple(s.name for s in record.states if s.dtype != f32)
    fields = (
        (build.ROOT / "rules/schedule_free.cuh").read_text(encoding="utf-8").partition("struct Scalars { float ")[2]
    )
    assert tuple(fields.partition(";")[0].split(", ")) == schedule_free.SCALARS
    assert len(schedule_free.SCALARS) <= 16


def check(step: Any, drawn: list[Array], past: Past, t: int, gscale: float, hyper: dict[str, Any]) -> None:
    """One step of `step(p, g, [z, v], scalars)` from arrays of any words, beside the oracle's."""
    p, g, z, v, _ = drawn
    v = np.abs(v)
    scalars, _ = following(past, t, **hyper, gscale=abs(gscale), maximize=gscale < 0)
    want, after = oracle.schedule_free.update(p, g * f32(gscale), state_of(past, z, v), t=t, **hyper)
    got, mine = step(p, g, [z, v], scalars)
    for name, x, y in (("p", got, want), ("z", mine[0], after["z"]), ("v", mine[1], after["v"])):
        same_bits(x, y, f"{hyper} {past} t={t}: {name}")


TIMES, SCALES = st.sampled_from([1, 2, 3, 700, 10**6]), st.sampled_from([1.0, 0.37, -1.0])
CHOSEN = [*WEIGHTS, {"eps": 0.0}, {"eps": 1e-40}, {"beta1": 0.0, "wd": 0.0}, {"lr": 0.0}]


@pytest.mark.gxx
@pytest.mark.parametrize("options", CHOSEN, ids=str)
@given(drawn=arrays(503), past=PASTS, t=TIMES, gscale=SCALES)
def test_the_functor_gives_the_oracles_words_over_all_of_float32(functors, options, drawn, past, t, gscale):
    form = Form("schedule_free")
    check(lambda p, g, x, s: functors.step(form, p, g, x, s), drawn, past, t, gscale, HYPER | options)


@given(drawn=arrays(503), past=PASTS, t=TIMES, gscale=SCALES, options=st.sampled_from(CHOSEN))
def test_the_numba_form_gives_the_oracles_words_over_all_of_float32(drawn, past, t, gscale, options):
    pytest.importorskip("numba")
    check(looped, drawn, past, t, gscale, HYPER | options)


@cache
def compiled_loop() -> Any:
    """The scalar form over arrays, in place."""
    import numba

    from refopt_cuda.kernels.arith import host

    one = Form("schedule_free").make(host())

    @numba.njit
    def loop(p, g, z, v, s):
        for i in range(p.size):
            p[i], (z[i], v[i]) = one(p[i], g[i], (z[i], v[i]), s)

    return loop


def looped(p: Array, g: Array, x: list[Array], s: Array) -> tuple[Array, list[Array]]:
    p, z, v = p.copy(), x[0].copy(), x[1].copy()
    compiled_loop()(p, g, z, v, tuple(s))
    return p, [z, v]


CODED = [("f32", "float32", "float32"), ("dynamic8", "bfloat16", "bfloat16"), ("dynamic8", "bf16_rem16", "bfloat16")]


@pytest.mark.parametrize(("codec", "weight", "grad"), CODED)
def test_three_steps_on_cpu_threads_are_the_oracles(codec, weight, grad):
    pytest.importorskip("numba")
    from refopt_cuda.kernels import step_host
    from tests.twins.common import Case, log_uniform
    from tests.twins.common import check as compare

    rng = np.random.default_rng(3)
    case = Case("schedule_free", ("f32", codec), weight, grad, hyper=HYPER | WEIGHTS[3])
    for shape in [(4097,), (3, 300), (40, 64)]:
        p = np.asarray(rng.standard_normal(shape), f32)
        compare(case, step_host.step, p, [log_uniform(rng, shape) for _ in range(3)])


@pytest.mark.parametrize("architecture", [75, 80, 90, 100])
@pytest.mark.parametrize(("codec", "weight", "grad"), CODED)
def test_its_kernels_compile_to_the_arithmetic_that_was_asked_for(codec, weight, grad, architecture):
    from tests.kernels.test_nvrtc import ARCHITECTURES, compiled, foreign, kernel_of, spilled

    if architecture not in ARCHITECTURES:
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    made = compiled(kernel_of(Form("schedule_free"), ("f32", codec), weight, grad), architecture)
    assert not foreign(made.ptx, False)
    assert spilled(made.log) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("codec", "weight", "grad"), CODED)
def test_the_kernel_equals_the_oracle_bit_for_bit(codec, weight, grad):
    from tests.kernels.gpu_step import Pair
    from tests.kernels.test_cuda import SHAPES, numbers

    rng = np.random.default_rng(0)
    both = Pair("schedule_free", ("f32", codec), weight, grad, HYPER | WEIGHTS[3])
    assert both.launch.form == form_of("schedule_free", both.opt.hyper)
    both.start([np.asarray(rng.standard_normal(s), f32) for s in SHAPES])
    for k in range(3):  # the second step has two rows of scalars
        both.step([None if k == 0 and j % 3 == 1 else numbers(rng, s) for j, s in enumerate(SHAPES)])


def test_a_row_by_name_is_that_of_constant_hyper_parameters():
    same_bits(row("schedule_free", 9, HYPER | {"warmup": 4}), schedule_free.scalars(9, **HYPER, warmup=4), "row")
