"""The `.cuh` functors, put together as a kernel puts them and built by g++, compute the oracle's bits."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.twins import functors
from tests.twins.combinations import EACH, pairs, sampled
from tests.twins.common import Case, check, log_uniform

pytestmark = pytest.mark.gxx
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TAILS = [Case("adamw", ("q4", "compand8"), "bf16_sr", block=(15, 45)), Case("lion", ("dynamic8",), "bf16_ecc", block=7)]


@pytest.mark.parametrize("case", [*TAILS, *(pairs() if NIGHTLY else [*EACH, *sampled(24)])], ids=str)
def test_functors_of_every_rule_codec_and_format_equal_the_oracle_bit_for_bit(case):
    """Fifteen hundred elements of all magnitudes, and a step with NaN and infinity in its gradient."""
    rng = np.random.default_rng(11)
    p, *gradients = (log_uniform(rng, (5, 300)) for _ in range(4))
    gradients[1][0, 7], gradients[1][2, 299] = np.nan, -np.inf
    check(case, functors.step, p, gradients)
