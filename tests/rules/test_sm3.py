"""SM3: a cover of accumulators that never says less than Adagrad's sum, and no more than it must."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, unsigned_zero
from tests.rules import whole
from tests.strategies import f32, follow, runs

SHAPES = [(5, 3), (3, 40), (2, 3, 17), (1, 7), (31,), ()]
variants = pytest.mark.parametrize("variant", ["I", "II"])


def updates(ref: ModuleType, grads: Any, **hyper: Any) -> tuple[Any, Any]:
    """u of every step without momentum, and the accumulators after it."""
    rule, zero, us, mus = ref.rules.sm3, np.zeros_like(grads[0]), [], []
    state = rule.init(zero, momentum=0)
    for t, g in enumerate(grads, 1):
        p, state = rule.update(zero, g, state, t=t, lr=1.0, momentum=0.0, **hyper)
        us.append(-p)
        mus.append(state["mu"])
    return us, mus


def adagrad(grads: Any) -> tuple[Any, Any]:
    """u and the sum of squares of every step, bit for bit as Adagrad computes them without eps."""
    s, us, sums = np.zeros_like(grads[0]), [], []
    for g in grads:
        s = s + g * g
        with np.errstate(all="ignore"):
            us.append(np.where(s == 0, f32(0), g * (f32(1) / np.sqrt(s))))
        sums.append(s)
    return us, sums


def covers(mu: Any, shape: Any) -> Any:
    """What the accumulators say of each element, one element at a time."""
    if len(shape) < 2:
        return mu
    starts = np.cumsum([0, *shape])
    out = np.zeros(shape, f32)
    for at in np.ndindex(shape):
        out[at] = min(mu[starts[a] + i] for a, i in enumerate(at))
    return out


def covered(x: Any) -> Any:
    """The greatest element under each index of each axis, one element at a time."""
    if x.ndim < 2:
        return x
    out = np.zeros(sum(x.shape), f32)
    starts = np.cumsum([0, *x.shape])
    for at in np.ndindex(x.shape):
        for a, i in enumerate(at):
            out[starts[a] + i] = max(out[starts[a] + i], x[at])
    return out


@variants
@given(run=runs(steps=3, shapes=SHAPES))
def test_it_is_its_algorithm_element_by_element(ref: ModuleType, variant: str, run: Any) -> None:
    p, grads = run
    _, mus = updates(ref, grads, variant=variant)
    mu = covered(np.zeros_like(p))
    for g, got in zip(grads, mus, strict=True):
        mu = covered(covers(mu, p.shape) + g * g) if variant == "II" else mu + covered(g * g)
        same_bits(got, mu, "mu")


def test_the_golden_run(ref: ModuleType) -> None:
    p, state = follow(ref.Optimizer("sm3", lr=0.1, momentum=0.9), [whole.P], [[g] for g in whole.G])
    assert whole.hex_words(p[0]) == "3f78ae80 bffe7a0f 3eef6992 3e75bd1d bc5df68b bf7b1b03"
    assert whole.hex_words(state[0]["mu"]) == "40806666 3fa00000 40806666 3fa00000 3f3d70a4"


@variants
@given(run=runs(shapes=[(31,), (), (12, 1)]))
def test_where_every_weight_has_its_own_accumulator_it_is_adagrad(ref: ModuleType, variant: str, run: Any) -> None:
    """With one column, too: a row's accumulator is never above the column's."""
    for got, want in zip(updates(ref, run[1], variant=variant)[0], adagrad(run[1])[0], strict=True):
        same_bits(unsigned_zero(got), unsigned_zero(want), "u")


@given(run=runs(steps=5, shapes=[s for s in SHAPES if len(s) > 1]))
def test_it_is_adagrad_whose_sum_goes_through_a_cover_codec(ref: ModuleType, run: Any) -> None:
    """Bit for bit: it steps by the fresh sum, its codec keeps the cover. An eps of 1e-38 makes 0 of 0 / 0."""
    p, grads = run
    plain = ref.Optimizer("sm3", lr=0.1, momentum=0.0)
    full = ref.Optimizer("adagrad", {"s": cover(ref)}, lr=0.1, eps=1e-38)
    one, state = [p], plain.init([p])
    other, coded = [p], full.init([p])
    for g in grads:
        one, state = plain.step(one, [g], state)
        other, coded = full.step(other, [g], coded)
        same_bits(unsigned_zero(other[0]), unsigned_zero(one[0]), "p")
        same_bits(coded[0]["s"].codes, state[0]["mu"], "mu")


def cover(ref: ModuleType) -> Any:
    """A codec that keeps the greatest element under each index of each axis, and reads the least of them."""

    def pack(x: Any, bounds: Any, codec: Any, shape: Any) -> Any:
        return {"codes": covered(x.reshape(shape))}

    def unpack(arrays: Any, bounds: Any, codec: Any, shape: Any) -> Any:
        return covers(arrays["codes"], shape).reshape(-1)

    part = ref.spec.Part("codes", f32, "axis")
    return ref.spec.Codec("cover", "cover", "", "tensor", (part,), pack, unpack, needs=("shape",))


@given(run=runs(steps=5, shapes=SHAPES))
def test_a_step_is_no_longer_than_adagrads_and_II_no_shorter_than_I(ref: ModuleType, run: Any) -> None:
    """s <= nu_II <= nu_I, and so the updates: rounding is monotone, no tolerance is needed."""
    one, mus_1 = updates(ref, run[1], variant="I")
    two, mus_2 = updates(ref, run[1], variant="II")
    full, sums = adagrad(run[1])
    for u1, u2, u, mu1, mu2, s in zip(one, two, full, mus_1, mus_2, sums, strict=True):
        assert (np.abs(u2) <= np.abs(u)).all() and (np.abs(u1) <= np.abs(u2)).all()
        assert (mu2 <= mu1).all() and (covers(mu2, s.shape) >= s).all()


@variants
@given(run=runs(steps=5, shapes=SHAPES))
def test_accumulators_never_shrink(ref: ModuleType, variant: str, run: Any) -> None:
    _, mus = updates(ref, run[1], variant=variant)
    for before, after in zip(mus, mus[1:]):
        assert (after >= before).all()


@variants
@given(run=runs(steps=5, shapes=SHAPES))
def test_no_update_is_longer_than_one(ref: ModuleType, variant: str, run: Any) -> None:
    for u in updates(ref, run[1], variant=variant)[0]:
        assert (np.abs(u) <= 1 + 2.0**-22).all()


@variants
@given(run=runs(shapes=[(5, 3), (2, 3, 17)]), data=st.data())
def test_permuting_axes_permutes_the_result(ref: ModuleType, variant: str, run: Any, data: Any) -> None:
    order = data.draw(st.permutations(range(run[0].ndim)))
    one, _ = updates(ref, run[1], variant=variant)
    other, _ = updates(ref, [g.transpose(order) for g in run[1]], variant=variant)
    same_bits(other[-1], np.ascontiguousarray(one[-1].transpose(order)), "u")


@variants
@given(run=runs(shapes=SHAPES, low=-6), k=st.integers(-6, 6))
def test_the_gradients_unit_does_not_matter(ref: ModuleType, variant: str, run: Any, k: int) -> None:
    p, grads = run
    opt = ref.Optimizer("sm3", variant=variant)
    one, _ = follow(opt, p, grads)
    other, _ = follow(opt, p, [g * f32(2.0**k) for g in grads])
    same_bits(other, one, "p")


@variants
def test_a_weight_without_any_gradient_stays(ref: ModuleType, variant: str) -> None:
    """An eps of optax's size must not make 0 / 0 of it, nor of a g whose square is lost."""
    p, g = f32([[1, -0.0], [2, 0]]), f32([[0, 0], [0, -1e-30]])
    (moved,), state = follow(ref.Optimizer("sm3", variant=variant, momentum=0.0), [p], [[g], [g]])
    same_bits(moved, p, "p")
    assert not state[0]["mu"].any()


def test_momentum_is_a_mean_of_updates(ref: ModuleType) -> None:
    """Equal gradients: u = 1, 1/sqrt(2); m = .25 u_1, then .75 m + .25 u_2."""
    g = np.ones((2, 2), f32)
    (p,), state = follow(ref.Optimizer("sm3", lr=1.0, momentum=0.75), [0 * g], [[g], [g]])
    m2 = 0.75 * 0.25 + 0.25 * 0.5**0.5
    np.testing.assert_allclose(state[0]["m"], m2, rtol=1e-6)
    np.testing.assert_allclose(p, -(0.25 + m2), rtol=1e-6)


def test_eps_stands_under_the_root(ref: ModuleType) -> None:
    u, _ = updates(ref, [f32([[1e-4]])], eps=3e-8)
    np.testing.assert_allclose(u[0], [[0.5]], rtol=1e-6)


@variants
def test_a_bad_element_reaches_those_under_its_accumulators_alone(ref: ModuleType, variant: str) -> None:
    """NaN wins every maximum and minimum: its row and column step by NaN from the next step on, or in I at once."""
    g, bad = np.ones((3, 4), f32), np.ones((3, 4), f32)
    bad[1, 2] = np.nan
    with np.errstate(all="ignore"):
        us, mus = updates(ref, [bad, g], variant=variant)
    assert np.flatnonzero(np.isnan(mus[0])).tolist() == [1, 3 + 2]
    hit = np.zeros((3, 4), bool)
    hit[1, :] = hit[:, 2] = True
    assert (np.isnan(us[1]) == hit).all()


def test_a_matrix_keeps_its_edges_alone(ref: ModuleType) -> None:
    state = ref.rules.sm3.init(np.zeros((4, 5, 6), f32), momentum=0)
    assert sum(x.nbytes for x in state.values()) == 4 * (4 + 5 + 6)


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"momentum": 1.0}, "momentum must be .*, got 1.0"),
        ({"momentum": -0.1}, "momentum must be .*, got -0.1"),
        ({"lr": -1.0}, "lr must be .*, got -1.0"),
        ({"eps": -1.0}, "eps must be .*, got -1.0"),
        ({"variant": "III"}, "variant must be one of 'II', 'I', got 'III'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(ref: ModuleType, hyper: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"Optimizer\('sm3'\): {words}"):
        ref.Optimizer("sm3", **hyper)
