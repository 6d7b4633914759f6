"""Wrong codecs, continued: formats of weights, small floats, four bits."""

from __future__ import annotations

from tests.mutants.load import Mutant

SR, KAHAN, REM = "codecs/bf16_sr.py", "codecs/bf16_kahan.py", "codecs/bf16_rem16.py"
ECC = "codecs/bf16_ecc.py"
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
    Mutant(
        "kahan-compensation-subtracted",
        KAHAN,
        "p = bf16(o + c)",
        "p = bf16(o - c)",
        "codecs.test_bf16_kahan:test_a_long_sum_keeps_what_bfloat16_drops",
    ),
    Mutant(
        "kahan-compensation-dropped",
        KAHAN,
        "        c = bf16(c + bf16(o - p))",
        "        c = bf16(c * np.float32(0))",
        "codecs.test_bf16_kahan:test_a_long_sum_keeps_what_bfloat16_drops",
    ),
    Mutant(
        "kahan-forgets-what-it-carried",
        KAHAN,
        "        c = bf16(c + u)",
        "        c = bf16(u)",
        "codecs.test_bf16_kahan:test_a_long_sum_keeps_what_bfloat16_drops",
    ),
    Mutant(
        "kahan-rounds-a-difference-less",
        KAHAN,
        "        c = bf16(c + bf16(o - p))",
        "        c = bf16((c + o) - p)",
        "codecs.test_bf16_kahan:test_each_line_is_that_of_ml_dtypes",
    ),
    Mutant(
        "kahan-first-error-lost",
        KAHAN,
        "word(x - bf16(x))",
        "word(x - x)",
        "codecs.test_bf16_kahan:test_the_first_rounding_error_is_kept",
    ),
    Mutant(
        "kahan-steps-the-compensated-weights",
        KAHAN,
        """    return value(arrays["codes"])""",
        """    return value(arrays["codes"]) + value(arrays["comp"])""",
        "codecs.test_bf16_kahan:test_the_rule_steps_the_weights_that_are_seen",
    ),
    Mutant(
        "kahan-old-page-of-another-stretch",
        "cells.py",
        "self.page = {n: np.array(x[self.at[n]]) for n, x in self.arrays.items()}",
        "self.page = {n: np.array(x[: s.stop - s.start]) for n, x in self.arrays.items() for s in [self.at[n]]}",
        WEIGHTS + "paging_changes_no_bit",
    ),
    Mutant(
        "rem16-never-rounded-up",
        REM,
        "(word + np.uint32(0x8000)) >> 16",
        "word >> 16",
        "codecs.test_bf16_rem16:test_every_word_but_nan_comes_back",
    ),
    Mutant(
        "rem16-ties-to-even",
        REM,
        "(word + np.uint32(0x8000)) >> 16",
        "(word + np.uint32(0x7FFF) + ((word >> 16) & 1)) >> 16",
        "codecs.test_bf16_rem16:test_every_word_but_nan_comes_back",
    ),
    Mutant(
        "rem16-borrow-forgotten",
        REM,
        ' - (arrays["rem"] < 0)',
        "",
        "codecs.test_bf16_rem16:test_a_run_is_the_float32_run_bit_for_bit",
    ),
    Mutant(
        "rem16-nan-shows-as-zero",
        REM,
        "np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))",
        "x.view(np.uint32)",
        "codecs.test_bf16_rem16:test_every_nan_is_one_and_shows_as_one",
    ),
    Mutant(
        "rem16-remainder-of-the-step-before",
        "cells.py",
        """        return {"p": self.stored()} if self.further else {}""",
        """        return {"p": self.have} if self.further else {}""",
        "codecs.test_bf16_rem16:test_a_run_is_the_float32_run_bit_for_bit",
    ),
    Mutant(
        "rem16-rule-steps-the-visible-half",
        "cells.py",
        "return super().load() if self.further else self.p[self.here]",
        "return self.p[self.here]",
        "codecs.test_bf16_rem16:test_a_run_is_the_float32_run_bit_for_bit",
    ),
    Mutant(
        "ecc-half-unit-of-a-subnormal-too-small",
        ECC,
        "np.maximum((words >> 7 & 0xFF).astype(np.int32), 1)",
        "(words >> 7 & 0xFF).astype(np.int32)",
        "codecs.test_bf16_ecc:test_the_error_is_half_a_step",
    ),
    Mutant(
        "ecc-truncates",
        ECC,
        "np.rint(e / half_unit(p)",
        "np.trunc(e / half_unit(p)",
        "codecs.test_bf16_ecc:test_the_error_is_half_a_step",
    ),
    Mutant(
        "ecc-128-levels",
        ECC,
        "LEVELS = {8: 127,",
        "LEVELS = {8: 128,",
        "codecs.test_bf16_ecc:test_the_ends_of_a_unit_take_the_end_codes",
    ),
    Mutant(
        "ecc-unit-of-the-word-before-rounding",
        ECC,
        "np.rint(e / half_unit(p)",
        "np.rint(e / half_unit((bits >> 16).astype(np.uint16))",
        "codecs.test_bf16_ecc:test_every_lower_half_is_the_definition_in_fractions",
    ),
    Mutant(
        "ecc-error-subtracted",
        ECC,
        '_value(arrays["codes"]) + part',
        '_value(arrays["codes"]) - part',
        "codecs.test_bf16_ecc:test_the_error_is_half_a_step",
    ),
    Mutant(
        "ecc-infinity-has-an-error",
        ECC,
        "finite = (p & 0x7F80) != 0x7F80",
        "finite = ~np.isnan(x)",
        "codecs.test_bf16_ecc:test_beyond_bfloat16_nothing_is_kept",
    ),
    Mutant(
        "ecc-eight-bits-whatever-was-asked",
        ECC,
        """    return replace(codec, parts=(codec.parts[0], Part("error", np.dtype(f"i{codec.mode['bits'] // 8}"))))""",
        '    return replace(codec, mode={"bits": 8})',
        "codecs.test_bf16_ecc:test_sixteen_bits_lose_a_unit_of_float32_at_most",
    ),
]
