"""Wrong byte counts: what planners and papers forget."""

from __future__ import annotations

from tests.mutants.load import Mutant

MEMORY, MOMENTS, MODELS = "memory/parts.py", "memory/timeline.py", "models.py"
LAWS = "memory.test_memory:test_"
EVERY, STEP = LAWS + "every_rule_with_every_codec_is_predicted", LAWS + "a_whole_step_takes_the_known_bytes_a_weight"
QLORA, PUBLISHED = LAWS + "qlora_fits_where_its_paper_says", LAWS + "a_model_has_the_weights_that_were_published"
ACTIVATIONS = LAWS + "activations_of_seven_billion"
TRACED = "memory.test_moments:test_the_largest_moment_is_the_one_that_was_traced"

MUTANTS = [
    Mutant(
        "tables-stepped-as-matrices",
        "memory/kinds.py",
        "opt.matrices if inside else opt.tables",
        "opt.matrices",
        "memory.test_scratch:test_each_kind_of_tensor_has_the_states_of_its_optimizer",
    ),
    Mutant(
        "small-tensors-counted-as-coded",
        MEMORY,
        "stretch_bytes(opt.codec_of(st.name, size), st.dtype",
        "stretch_bytes(opt.codecs[st.name], st.dtype",
        LAWS + "predicted_bytes_are_the_bytes_of_the_states",
    ),
    Mutant(
        "factors-counted-as-whole-states",
        MEMORY,
        "form = st.shape_for(shape, opt.hyper)",
        "form = st.shape_for(shape, opt.hyper) and shape",
        EVERY,
    ),
    Mutant(
        "remainders-of-weights-forgotten",
        MEMORY,
        "for part in weights.parts[1:])",
        "for part in weights.parts[2:])",
        LAWS + "what_a_format_of_weights_keeps_is_predicted",
    ),
    Mutant(
        "pending-gradient-forgotten",
        MEMORY,
        'out["pending"] = 4 * size',
        "pass",
        LAWS + "a_pending_gradient_is_predicted",
    ),
    Mutant(
        "release-holds-the-sum",
        MEMORY,
        "gradients = each * largest if release",
        "gradients = each * size if release",
        LAWS + "a_whole_step_takes_the_known_bytes_a_weight",
    ),
    Mutant("no-master-in-amp", MEMORY, "master=share(4 * size,", "master=share(2 * size,", STEP),
    Mutant(
        "zero-shares-gradients-at-stage-1",
        MEMORY,
        "ranks if stage >= least else 1",
        "ranks if stage >= least - (least == 2) else 1",
        LAWS + "zero_comes_to_the_sums_of_its_paper",
    ),
    Mutant(
        "shares-rounded-down",
        MEMORY,
        "return -(-total * stretch // size)",
        "return total // ranks",
        LAWS + "no_rank_holds_more_than_its_share_and_a_tensor",
    ),
    Mutant("embeddings-in-four-bits", MEMORY, "return counted + 2 * (", "return counted + (", QLORA),
    Mutant(
        "adapters-on-one-side",
        MEMORY,
        "for shape in ((rank, into), (out, rank))]",
        "for shape in ((rank, into),)]",
        QLORA,
    ),
    Mutant("logits-once", MEMORY, "model.vocab * (2 + 4 + 4)", "model.vocab * 2", ACTIVATIONS),
    Mutant(
        "no-live-block-under-checkpoints",
        MEMORY,
        "tokens * model.hidden + block if checkpoint",
        "tokens * model.hidden if checkpoint",
        ACTIVATIONS,
    ),
    Mutant("no-gradient-of-the-loss", MOMENTS, "LOGITS = 12", "LOGITS = 10", TRACED),
    Mutant("norms-in-sixteen-bits", MOMENTS, "norm = 4 * h + 4 +", "norm = each * h + 4 +", TRACED),
    Mutant("a-tied-table-summed-in-place", MOMENTS, "again = 2 * each", "again = each", TRACED),
    Mutant("grouped-keys-forgotten", MODELS, "(kv_heads or heads) * head", "heads * head", PUBLISHED),
    Mutant("tied-heads-counted-twice", MODELS, "[] if tied else", "[] if not layers else", PUBLISHED),
    Mutant("last-norm-forgotten", MODELS, ', ("norm", (hidden,))]', "]", PUBLISHED),
]
