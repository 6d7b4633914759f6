"""Wrong rules of whole tensors and matrices."""

from __future__ import annotations

from tests.mutants.load import Mutant

ADAFACTOR = "rules/adafactor.py"
WHOLE = "rules.test_every_whole_rule:test_"
OF_ADAFACTOR = "rules.test_adafactor:test_"

MUTANTS = [
    Mutant(
        "adafactor-moment-without-its-mean",
        ADAFACTOR,
        "np.sqrt(R / mu.reshape(*p.shape[:-2], 1))",
        "np.sqrt(R)",
        OF_ADAFACTOR + "the_first_update_of_a_rank_1_gradient_is_its_sign",
    ),
    Mutant(
        "adafactor-one-mean-for-the-whole-stack",
        ADAFACTOR,
        "mu.reshape(*p.shape[:-2], 1)",
        "mu.mean(dtype=f32)",
        OF_ADAFACTOR + "matrices_of_a_stack_have_factors_of_their_own",
    ),
    Mutant(
        "adafactor-decay-one-step-ahead",
        ADAFACTOR,
        "1.0 - float(t) ** decay_rate",
        "1.0 - (t + 1.0) ** decay_rate",
        OF_ADAFACTOR + "the_factors_are_the_row_and_column_means_of_the_whole_moment",
    ),
    Mutant(
        "adafactor-alpha-after-the-decay",
        ADAFACTOR,
        "    p = p * decay\n    p = p - U\n",
        "    p = p * decay\n    p = p - U * f32(max(rms(p), eps2) / rms(p / decay))\n",
        OF_ADAFACTOR + "alpha_is_measured_before_the_decay_and_decays_the_weights",
    ),
    Mutant(
        "adafactor-decay-by-rho",
        ADAFACTOR,
        'shrink = float(alpha) if variant == "transformers"',
        'shrink = rho if variant == "transformers"',
        OF_ADAFACTOR + "alpha_is_measured_before_the_decay_and_decays_the_weights",
    ),
    Mutant(
        "adafactor-clips-every-update-to-full-size",
        ADAFACTOR,
        "np.maximum(f32(1), f32(float(rms(U)) / clip))",
        "f32(float(rms(U)) / clip)",
        OF_ADAFACTOR + "an_update_below_clip_is_left_alone",
    ),
    Mutant(
        "adafactor-clips-after-alpha",
        ADAFACTOR,
        "    U = U * (f32(1) / np.maximum(f32(1), f32(float(rms(U)) / clip)))\n    U = alpha * U\n",
        "    U = alpha * U\n    U = U * (f32(1) / np.maximum(f32(1), f32(float(rms(U)) / clip)))\n",
        OF_ADAFACTOR + "it_is_its_equations_in_float64",
    ),
    Mutant(
        "adafactor-eps1-under-the-root-alone",
        ADAFACTOR,
        "    q = g * g + add\n",
        "    q = g * g\n",
        OF_ADAFACTOR + "tiny_gradients_tell_the_dialects_apart",
    ),
    Mutant(
        "adafactor-torch-without-its-floor",
        ADAFACTOR,
        "f32(1.0 / low if low else np.inf)",
        "f32(np.inf)",
        OF_ADAFACTOR + "tiny_gradients_tell_the_dialects_apart",
    ),
    Mutant(
        "adafactor-momentum-without-learning-rate",
        ADAFACTOR,
        "        U, new = m, new",
        "        U, m = m, m * (f32(1) / alpha)\n        new = new",
        OF_ADAFACTOR + "momentum_holds_updates_of_the_learning_rates_they_were_made_with",
    ),
    Mutant(
        "adafactor-size-that-drops-nan",
        ADAFACTOR,
        "np.maximum(eps2, float(rms(p)))",
        "max(eps2, float(rms(p)))",
        OF_ADAFACTOR + "a_weight_that_is_not_a_number_shows",
    ),
    Mutant(
        "adafactor-warmup-for-ever",
        ADAFACTOR,
        "    return min(cap, 1.0 / sqrt(t))\n",
        "    return cap if warmup_init else min(cap, 1.0 / sqrt(t))\n",
        OF_ADAFACTOR + "relative_steps_shrink_with_the_root_of_t_after_warming_up",
    ),
    Mutant(
        "adafactor-reads-the-old-factors",
        ADAFACTOR,
        "        cf = f32(1) / np.sqrt(C)\n",
        '        cf = f32(1) / np.sqrt(state["C"] if t > 1 else C)\n',
        OF_ADAFACTOR + "the_second_moment_is_adams_through_a_rank_1_codec",
    ),
]
