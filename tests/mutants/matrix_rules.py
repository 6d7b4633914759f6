"""Wrong rules of whole tensors and matrices."""

from __future__ import annotations

from tests.mutants.load import Mutant

ADAFACTOR, SM3 = "rules/adafactor.py", "rules/sm3.py"
WHOLE = "rules.test_every_whole_rule:test_"
OF_ADAFACTOR, OF_SM3 = "rules.test_adafactor:test_", "rules.test_sm3:test_"

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
    Mutant(
        "sm3-sums-over-the-cover",
        SM3,
        "x.max(axis=rest, initial=0)",
        "x.sum(axis=rest)",
        OF_SM3 + "it_is_its_algorithm_element_by_element",
    ),
    Mutant(
        "sm3-reads-the-greatest",
        SM3,
        "reduce(np.minimum",
        "reduce(np.maximum",
        OF_SM3 + "it_is_its_algorithm_element_by_element",
    ),
    Mutant(
        "sm3-reads-rows-alone",
        SM3,
        'reduce(np.minimum, np.meshgrid(*parts, indexing="ij", sparse=True))',
        'np.meshgrid(*parts, indexing="ij")[0]',
        OF_SM3 + "permuting_axes_permutes_the_result",
    ),
    Mutant(
        "sm3-II-keeps-the-sum-of-the-greatest",
        SM3,
        "        mu = greatest(nu)\n",
        '        mu = state["mu"] + greatest(g * g)\n',
        OF_SM3 + "it_is_adagrad_whose_sum_goes_through_a_cover_codec",
    ),
    Mutant(
        "sm3-I-steps-by-the-old-cover",
        SM3,
        "        nu = least(mu, p.shape)\n",
        '        nu = least(state["mu"], p.shape)\n',
        OF_SM3 + "no_update_is_longer_than_one",
    ),
    Mutant(
        "sm3-maximum-that-drops-nan",
        SM3,
        "x.max(axis=rest, initial=0)",
        "np.fmax.reduce(x, axis=rest, initial=0)",
        OF_SM3 + "a_bad_element_reaches_those_under_its_accumulators_alone",
    ),
    Mutant(
        "sm3-heavy-ball-momentum",
        SM3,
        "f32(1.0 - momentum) * u",
        "u",
        OF_SM3 + "momentum_is_a_mean_of_updates",
    ),
    Mutant(
        "sm3-without-a-guard-at-zero",
        SM3,
        "    u = np.where(nu == 0, f32(0), g * r)\n",
        "    u = g * r\n",
        OF_SM3 + "a_weight_without_any_gradient_stays",
    ),
    Mutant(
        "sm3-eps-outside-the-root",
        SM3,
        "np.where(nu == 0, f32(1), nu + f32(eps)))",
        "np.where(nu == 0, f32(1), nu)) + f32(eps)",
        OF_SM3 + "eps_stands_under_the_root",
    ),
]
