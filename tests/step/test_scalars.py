"""Host scalars: powers by squaring in float64, the same bits on every machine, rounded to float32 once."""

from __future__ import annotations

from fractions import Fraction
from math import sqrt
from types import ModuleType

import numpy as np
import pytest

from tests.golden import exact
from tests.strategies import f32

BETAS = [0.5, 0.8, 0.9, 0.97, 0.99, 0.999, 0.9999]


@pytest.mark.parametrize("beta", BETAS)
def test_a_power_is_right_to_its_last_bits(ref: ModuleType, beta: float) -> None:
    """Each squaring doubles the relative error and adds half an ulp: at most about t half-ulps in all."""
    for t in (0, 1, 2, 3, 7, 64, 1000, 4097):
        true = Fraction(beta) ** t
        if true > Fraction(1, 2**900):
            assert abs(Fraction(ref.scalars.ipow(beta, t)) - true) <= true * max(t, 1) / 2**53


def test_powers_have_the_bits_of_binary_powering(ref: ModuleType) -> None:
    """beta^t by exact products, each rounded to 53 bits, in the order of t's bits from the lowest."""
    for beta in BETAS:
        for t in (1, 2, 3, 5, 6, 13, 100, 12345):
            r, b = Fraction(1), Fraction(beta)
            for bit in reversed(bin(t)[2:]):
                r = exact.nearest(r * b, 53, -1022) if bit == "1" else r
                b = exact.nearest(b * b, 53, -1022)
            assert Fraction(ref.scalars.ipow(beta, t)) == r, (beta, t)


@pytest.mark.parametrize("beta", BETAS)
def test_the_float32_scalars_are_those_of_exact_powers(ref: ModuleType, beta: float) -> None:
    """An off-by-one t, or a power rounded too early, changes these words."""
    for t in [*range(1, 40), 100, 1000, 10000]:
        bc = 1 - Fraction(beta) ** t
        have = 1.0 - ref.scalars.ipow(beta, t)
        assert f32(1e-3 / have) == f32(float(Fraction(1e-3) / bc)), f"step at t={t}"
        assert f32(1.0 / sqrt(have)) == f32(1.0 / sqrt(float(bc))), f"ir2 at t={t}"


def test_one_minus_beta_is_taken_in_float64(ref: ModuleType) -> None:
    """A gradient of 1 from zero states leaves fl32(1 - beta) in m; 1 - beta in float32 is another number."""
    for beta in (0.999, 0.9999, 0.97):
        for stem, role, name in (("adam", "v", "beta2"), ("adamw", "m", "beta1"), ("lion", "m", "beta2")):
            rule, one = ref.rules.RULES[stem], np.ones(1, f32)
            _, state = rule.update(one, one, rule.init(one), t=1, wd=0.0, **{name: beta})
            assert state[role][0] == f32(1.0 - beta) != f32(1) - f32(beta)


def test_the_sign_of_nothing_is_nothing(ref: ModuleType) -> None:
    x = f32([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45])
    got = ref.scalars.sgn(x)
    assert got.dtype == f32 and got.tolist() == [0, 0, 0, 1, -1, 1, -1] and not np.signbit(got[:3]).any()


def test_this_process_keeps_subnormals() -> None:
    """Some shared libraries switch a process to flush-to-zero; every bit-exact law would then mean something else."""
    assert f32(1e-40) * f32(1) != 0 and f32(1e-30) * f32(1e-10) != 0
