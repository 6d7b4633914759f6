"""Wrong element-wise and norm-scaled rules: the field's own mistakes first."""

from __future__ import annotations

from tests.mutants.load import Mutant

RMSPROP, ADAGRAD, SIGNUM = "rules/rmsprop.py", "rules/adagrad.py", "rules/signum.py"
ON_RMSPROP, ON_ADAGRAD = "rules.test_rmsprop:test_", "rules.test_adagrad:test_"
ON_SIGNUM = "rules.test_signum:test_"

MUTANTS = [
    Mutant(
        "rmsprop-steps-by-the-raw-gradient",
        RMSPROP,
        "    u = g * r\n",
        "    u = (g - wd * p) * r\n",
        ON_RMSPROP + "decay_alone_moves_weights",
    ),
    Mutant(
        "rmsprop-variance-below-zero",
        RMSPROP,
        "np.maximum(v - a * a, f32(0))",
        "v - a * a",
        ON_RMSPROP + "a_variance_that_rounds_below_zero_is_zero",
    ),
    Mutant(
        "rmsprop-guard-swallows-nan",
        RMSPROP,
        "np.maximum(v - a * a, f32(0))",
        "np.fmax(v - a * a, f32(0))",
        ON_RMSPROP + "a_state_of_nan_stays_nan",
    ),
    Mutant(
        "rmsprop-mean-not-squared",
        RMSPROP,
        "v - a * a",
        "v - np.abs(a)",
        ON_RMSPROP + "the_divisor_is_the_variance_of_the_gradient",
    ),
    Mutant(
        "rmsprop-eps-inside",
        RMSPROP,
        'if eps_at == "inside" else np.sqrt(z) + eps',
        'if eps_at != "nowhere" else np.sqrt(z) + eps',
        ON_RMSPROP + "eps_stands_where_it_is_asked_to",
    ),
    Mutant(
        "rmsprop-is-corrected",
        RMSPROP,
        "    d = np.sqrt(z + eps)",
        "    z = z / f32(1 - float(alpha) ** t)\n    d = np.sqrt(z + eps)",
        ON_RMSPROP + "the_first_step_is_not_corrected",
    ),
    Mutant(
        "rmsprop-lr-inside-the-buffer",
        RMSPROP,
        'buf = mu * state["buf"] + u\n        u, new = buf, new | {"buf": buf}\n    p = p - lr * u',
        'buf = mu * state["buf"] + lr * u\n        u, new = buf / lr, new | {"buf": buf}\n    p = p - lr * u',
        ON_RMSPROP + "momentum_adds_normalised_gradients_and_lr_stays_outside",
    ),
    Mutant(
        "rmsprop-momentum-ignored",
        RMSPROP,
        "u, new = buf, new",
        "new = new",
        ON_RMSPROP + "momentum_adds_normalised_gradients_and_lr_stays_outside",
    ),
    Mutant(
        "rmsprop-alpha-in-float32",
        RMSPROP,
        "f32(1.0 - alpha)",
        "f32(1) - f32(alpha)",
        "golden.test_golden:test_every_rule_is_its_equations_in_fractions",
    ),
    Mutant(
        "adagrad-forgets",
        ADAGRAD,
        'state["s"] + g * g',
        'f32(0.99) * state["s"] + g * g',
        ON_ADAGRAD + "the_sum_never_shrinks",
    ),
    Mutant(
        "adagrad-rate-decays-at-once",
        ADAGRAD,
        "(t - 1) * lr_decay",
        "t * lr_decay",
        ON_ADAGRAD + "the_rate_decays_from_the_second_step_on",
    ),
    Mutant(
        "adagrad-first-value-ignored",
        ADAGRAD,
        "np.full(p.shape, init_acc, f32)",
        "np.zeros(p.shape, f32)",
        ON_ADAGRAD + "the_divisor_is_the_root_of_the_sum",
    ),
    Mutant(
        "adagrad-first-value-every-step",
        ADAGRAD,
        "    d = np.sqrt(s + eps)",
        "    s = s + f32(init_acc)\n    d = np.sqrt(s + eps)",
        ON_ADAGRAD + "the_divisor_is_the_root_of_the_sum",
    ),
    Mutant(
        "adagrad-steps-by-the-raw-gradient",
        ADAGRAD,
        "clr * (g * r)",
        "clr * ((g - wd * p) * r)",
        ON_ADAGRAD + "decay_alone_moves_weights_by_lr",
    ),
    Mutant(
        "adagrad-no-root",
        ADAGRAD,
        "else np.sqrt(s) + eps",
        "else s + eps",
        ON_ADAGRAD + "a_constant_gradient_steps_by_one_over_the_root_of_t",
    ),
    Mutant(
        "adagrad-sum-creeps-up",
        ADAGRAD,
        's = state["s"] + g * g',
        's = np.nextafter(state["s"], f32(np.inf)) + g * g',
        ON_ADAGRAD + "a_large_sum_no_longer_grows",
    ),
    Mutant(
        "signum-keeps-the-sign",
        SIGNUM,
        '{"m": m}\n    if decay',
        '{"m": sgn(m)}\n    if decay',
        ON_SIGNUM + "the_momentum_is_a_mean_and_not_a_sign",
    ),
    Mutant(
        "signum-sum-for-mean",
        SIGNUM,
        "omb * g",
        "g",
        ON_SIGNUM + "the_momentum_is_a_mean_and_not_a_sign",
    ),
    Mutant(
        "signum-steps-by-the-old-momentum",
        SIGNUM,
        "u, state = sgn(m), ",
        'u, state = sgn(state["m"]), ',
        ON_SIGNUM + "the_step_takes_the_new_momentum",
    ),
    Mutant(
        "signum-nan-has-a-sign",
        SIGNUM,
        "u, state = sgn(m), ",
        "u, state = np.sign(m), ",
        ON_SIGNUM + "a_nan_gradient_has_no_sign_and_moves_nothing",
    ),
    Mutant(
        "signum-decay-twice",
        SIGNUM,
        'if decay_order == "before":',
        'if decay_order != "after":',
        ON_SIGNUM + "the_orders_of_decay_differ_by_the_square_of_lr",
    ),
    Mutant(
        "signum-decay-of-the-step-alone",
        SIGNUM,
        'if decay_order == "after":\n        p = p * decay',
        'if decay_order == "after":\n        p = p - (1 - decay) * f32(4)',
        ON_SIGNUM + "the_orders_of_decay_differ_by_the_square_of_lr",
    ),
    Mutant(
        "signum-coupled-decay",
        SIGNUM,
        "    u = sgn(g)\n",
        "    g = g + wd * p\n    u = sgn(g)\n",
        ON_SIGNUM + "decay_never_reaches_the_momentum",
    ),
]
