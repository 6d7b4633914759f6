"""Wrong low-rank layers: what is easily left out of a backward pass, or trained though it is frozen."""

from __future__ import annotations

from tests.mutants.load import Mutant

FILE, LAWS = "qlora.py", "qlora.test_qlora:test_"
GRADIENTS, BEGINS = LAWS + "gradients_are_finite_differences", LAWS + "a_layer_begins_as_its_base"
FROZEN = LAWS + "frozen_weights_are_decoded_rounded_and_never_written"

MUTANTS = [
    Mutant(
        "qlora-both-factors-start-at-random",
        FILE,
        "return A, np.zeros((out, rank)",
        "return A, np.ones((out, rank)",
        BEGINS,
    ),
    Mutant("qlora-range-of-the-rank", FILE, "(2 * u - 1) / math.sqrt(into)", "(2 * u - 1) / math.sqrt(rank)", BEGINS),
    Mutant("qlora-gradient-of-b-without-scale", FILE, "dB = s * (", "dB = (", GRADIENTS),
    Mutant(
        "qlora-gradient-of-a-of-all-tokens",
        FILE,
        "dA = _rows(dh).T @ _rows(x_A)",
        "dA = _rows(dh).T @ _rows(x)",
        GRADIENTS,
    ),
    Mutant("qlora-dropped-tokens-get-a-gradient", FILE, "dx_A if mask is None else dx_A * mask", "dx_A", GRADIENTS),
    Mutant("qlora-no-gradient-through-the-base", FILE, "dx = dy @ W_hat + (", "dx = (", GRADIENTS),
    Mutant(
        "qlora-never-rounded-to-bfloat16",
        FILE,
        'CODECS["bf16"].encode(W.decode()).decode() if',
        "W.decode() if",
        FROZEN,
    ),
    Mutant(
        "qlora-merged-without-scale",
        FILE,
        "weights(W) + np.float32(s) * (B @ A)",
        "weights(W) + B @ A",
        LAWS + "a_merged_layer_is_the_layer",
    ),
    Mutant(
        "qlora-stabilized-is-plain",
        FILE,
        "math.sqrt(rank) if stabilized",
        "rank if stabilized",
        LAWS + "the_scale_of_a_correction",
    ),
    Mutant("qlora-dropout-without-rescaling", FILE, "0, 1 / (1 - p))", "0, 1)", LAWS + "dropout_keeps_the_mean"),
]
