"""Wrong codecs, continued: formats of weights, small floats, four bits."""

from __future__ import annotations

from tests.mutants.load import Mutant

SR = "codecs/bf16_sr.py"
WEIGHTS = "codecs.test_weights:test_"

MUTANTS = [
    Mutant(
        "sr-rounds-toward-zero",
        SR,
        "bits + random",
        "bits + random * np.uint16(0)",
        "codecs.test_bf16_sr:test_the_mean_over_all_chances_is_the_number_itself",
    ),
    Mutant(
        "sr-biased-by-one-chance",
        SR,
        "bits + random",
        "bits + random + np.uint32(1)",
        "codecs.test_bf16_sr:test_the_mean_over_all_chances_is_the_number_itself",
    ),
    Mutant(
        "sr-fifteen-bits",
        SR,
        "bits + random",
        "bits + (random >> 1)",
        "codecs.test_bf16_sr:test_the_mean_over_all_chances_is_the_number_itself",
    ),
    Mutant(
        "sr-nan-rounds-to-zero",
        SR,
        "np.where(np.isnan(x), quiet, bits + random)",
        "np.where(np.isnan(x) & (quiet > 0xFFFFFFFF), quiet, bits + random)",
        "codecs.test_bf16_sr:test_no_nan_becomes_a_number_and_no_number_a_nan",
    ),
    Mutant(
        "sr-bits-by-page",
        "cells.py",
        "rng.r16(self.key, self.a, self.b - self.a)",
        "rng.r16(self.key, 0, self.b - self.a)",
        WEIGHTS + "paging_changes_no_bit",
    ),
    Mutant(
        "sr-one-stream-for-all-tensors",
        "step.py",
        "rng.key(self.seed, t, k)",
        "rng.key(self.seed, t, 0)",
        "codecs.test_bf16_sr:test_each_tensor_step_and_seed_draws_bits_of_its_own",
    ),
]
