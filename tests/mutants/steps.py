"""Wrong steps, places, scalars and traces."""

from __future__ import annotations

from tests.mutants.load import Mutant

STEP, TRACE, SCALARS, PAGED, SPEC = "step.py", "trace.py", "scalars.py", "places/paged.py", "spec.py"
CELLS, LINES, ASSIGN, TREES = "cells.py", "lines.py", "assign.py", "trees.py"
PAGING = "places.test_paged:test_paging_changes_no_bit"
STEPS = "step.test_step:test_"

MUTANTS = [
    Mutant(
        "page-written-back-stale",
        STEP,
        "c.store(new[n].reshape(-1))",
        "c.store((new if c.a == 0 else old)[n].reshape(-1))",
        PAGING,
    ),
    Mutant(
        "page-of-weights-skipped",
        CELLS,
        "self.out[self.here] = visible(",
        "self.out[self.here] = self.out[self.here] if self.a else visible(",
        PAGING,
    ),
    Mutant(
        "page-takes-the-first-pages-gradient",
        STEP,
        "g.reshape(-1)[a - first : b - first] * self.gscale",
        "g.reshape(-1)[: b - a] * self.gscale",
        PAGING,
    ),
    Mutant(
        "last-page-forgotten",
        PAGED,
        "range(0, blocks, size)",
        "range(0, max(blocks - size, 1), size)",
        "places.test_paged:test_pages_cover_every_block_once_in_order",
    ),
    Mutant(
        "pages-overlap",
        PAGED,
        "yield first, min(first + size, blocks)",
        "yield first, min(first + size + 1, blocks)",
        "places.test_paged:test_pages_cover_every_block_once_in_order",
    ),
    Mutant(
        "pages-ignore-the-layout",
        STEP,
        "blocks.bounds(shape, self.block, self.layout)",
        "blocks.bounds(shape, self.block)",
        "places.test_paged:test_paging_changes_no_bit_in_either_layout",
    ),
    Mutant(
        "t-starts-at-two",
        STEP,
        't = s["t"] + 1',
        't = s["t"] + 2',
        "golden.test_golden:test_the_oracle_reproduces_every_golden_run",
    ),
    Mutant(
        "second-tensor-uses-the-firsts-t",
        STEP,
        "self._apply(k, p, g, s, hyper, make)",
        'self._apply(k, p, g, s | {"t": state[0]["t"]}, hyper, make)',
        STEPS + "each_tensor_counts_its_own_steps",
    ),
    Mutant(
        "t-advances-without-a-gradient",
        STEP,
        "        if now is not None:\n            p, s = self._step_one(k, p, now, s, hyper, make, window)\n",
        "        if now is not None:\n            p, s = self._step_one(k, p, now, s, hyper, make, window)\n"
        "        else:\n"
        '            s = s | {"t": s["t"] + 1}\n',
        STEPS + "without_a_gradient_nothing_advances",
    ),
    Mutant(
        "a-skipped-tensor-advances",
        STEP,
        'holds NaN or Inf")\n        return None',
        'holds NaN or Inf")\n        return g * 0',
        STEPS + "skipping_a_bad_gradient_leaves_its_tensor_alone",
    ),
    Mutant(
        "encoded-twice",
        CELLS,
        "        self.page = self.codec.pack(x, self.cuts, self.codec, **given, **self._drawn())\n\n    def flush",
        "        x = self.codec.unpack(self.codec.pack(x, self.cuts, self.codec), self.cuts, self.codec)\n"
        "        self.page = self.codec.pack(x, self.cuts, self.codec, **given, **self._drawn())\n\n    def flush",
        STEPS + "a_coded_step_is_decode_rule_encode",
    ),
    Mutant(
        "weights-move-by-stored-states",
        STEP,
        'if self.reads == "stored":',
        'if self.rule.stem != "sgd":',
        STEPS + "the_first_coded_step_is_the_uncoded_one",
    ),
    Mutant(
        "unsigned-table-for-m",
        ASSIGN,
        "if s.nonnegative and out[s.name].unsigned",
        "if out[s.name].unsigned",
        STEPS + "a_nonnegative_state_takes_the_unsigned_table",
    ),
    Mutant(
        "a-sign-that-was-asked-for-is-dropped",
        ASSIGN,
        " and not _insists(s, out[s.name])",
        "",
        STEPS + "a_nonnegative_state_keeps_a_signed_table_that_was_asked_for",
    ),
    Mutant(
        "signed-table-for-v",
        ASSIGN,
        "out[s.name] = out[s.name](signed=False)",
        "out[s.name] = out[s.name](signed=True)",
        "golden.test_golden:test_the_oracle_reproduces_every_golden_run",
    ),
    Mutant(
        "weights-in-bf16-are-never-rounded",
        CELLS,
        "self.out[self.here] = visible(",
        "self.out[self.here] = x if True else visible(",
        STEPS + "weights_in_bf16_are_rounded_after_each_step",
    ),
    Mutant(
        "gscale-on-the-update",
        STEP,
        "a - first : b - first] * self.gscale",
        "a - first : b - first] * np.sign(self.gscale)",
        STEPS + "gscale_and_maximize_act_on_the_gradient_before_all_else",
    ),
    Mutant(
        "maximize-ignored",
        STEP,
        "f32(-gscale if maximize else gscale)",
        "f32(gscale)",
        STEPS + "gscale_and_maximize_act_on_the_gradient_before_all_else",
    ),
    Mutant(
        "state-changed-in-place",
        CELLS,
        "np.array(x[self.at[n]])",
        "x[self.at[n]]",
        STEPS + "a_step_mutates_none_of_its_inputs",
    ),
    Mutant(
        "weights-changed-in-place",
        CELLS,
        "self.out, self.further = self.p.copy()",
        "self.out, self.further = self.p",
        STEPS + "a_step_mutates_none_of_its_inputs",
    ),
    Mutant(
        "storage-order-used",
        STEP,
        "grad = g.reshape(-1)[",
        'grad = g.ravel("K")[',
        STEPS + "storage_order_does_not_matter",
    ),
    Mutant(
        "checked-while-stepping",
        STEP,
        "        gs = [self._check_one(k, p, g, s) for k, (p, g, s) in enumerate(zip(ps, gs, state, strict=True))]\n",
        "        for k, (p, g, s) in enumerate(zip(ps, gs, state, strict=True)):\n"
        "            self._check_one(k, p, g, s)\n"
        '            s["t"] += 1\n',
        "step.test_errors:test_a_step_that_raises_leaves_everything_unchanged",
    ),
    Mutant(
        "gradients-may-broadcast",
        STEP,
        "if a.shape != p.shape:",
        "if a.size > p.size:",
        "step.test_errors:test_a_step_that_raises_leaves_everything_unchanged",
    ),
    Mutant(
        "gradients-paired-by-position",
        TREES,
        "keys = list(like if isinstance(like, Mapping) else tree)",
        "keys = list(tree)",
        STEPS + "trees_come_back_as_they_went_in",
    ),
    Mutant(
        "block-size-unchecked",
        CELLS,
        '("stem", "block", "layout", "signed", "mode")',
        '("stem", "layout", "signed", "mode")',
        "step.test_errors:test_a_step_that_raises_leaves_everything_unchanged",
    ),
    Mutant(
        "min-size-includes-its-bound",
        STEP,
        "size < self.min_size",
        "size <= self.min_size",
        STEPS + "tensors_below_min_size_stay_uncoded",
    ),
    Mutant(
        "beta-may-be-one",
        SPEC,
        "value >= self.high",
        "value > self.high",
        "step.test_errors:test_what_cannot_be_built_is_refused_by_name",
    ),
    Mutant(
        "nan-may-be-a-learning-rate",
        SPEC,
        "not math.isfinite(value) or ",
        "",
        "step.test_errors:test_what_cannot_be_built_is_refused_by_name",
    ),
    Mutant(
        "scales-not-counted",
        SPEC,
        '"block": blocks, "tensor"',
        '"block": blocks - 1, "tensor"',
        STEPS + "the_bytes_that_a_record_promises_are_the_bytes_kept",
    ),
    Mutant(
        "power-one-short",
        SCALARS,
        "    r = 1.0\n",
        "    r, t = 1.0, max(t - 1, 0)\n",
        "step.test_scalars:test_a_power_is_right_to_its_last_bits",
    ),
    Mutant(
        "power-in-float32",
        SCALARS,
        "            r *= base\n",
        "            r = float(f32(r * base))\n",
        "step.test_scalars:test_the_float32_scalars_are_those_of_exact_powers",
    ),
    Mutant(
        "power-by-repeated-products",
        SCALARS,
        "    while t:\n",
        "    return float(np.prod(np.full(t, base)))\n    while t:\n",
        "step.test_scalars:test_powers_have_the_bits_of_binary_powering",
    ),
    Mutant(
        "nan-has-a-sign",
        SCALARS,
        "return (x > 0).astype(f32) - (x < 0).astype(f32)",
        "return np.sign(x)",
        "step.test_scalars:test_the_sign_of_nothing_is_nothing",
    ),
    Mutant(
        "trace-shows-the-line-before",
        TRACE,
        "equation = text[number - 1].strip()",
        "equation = text[number - 2].strip()",
        "step.test_trace:test_each_line_of_a_rule_carries_its_source",
    ),
    Mutant(
        "trace-forgets-gscale",
        TRACE,
        "lines(opt.rule, p, g * opt.gscale, old",
        "lines(opt.rule, p, g, old",
        "step.test_trace:test_the_last_traced_values_are_the_steps_bits",
    ),
    Mutant(
        "trace-one-step-ahead",
        TRACE,
        'old, s["t"] + 1, opt.hyper',
        'old, s["t"] + 2, opt.hyper',
        "step.test_trace:test_the_last_traced_values_are_the_steps_bits",
    ),
    Mutant(
        "trace-swaps-names",
        LINES,
        "label = ast.Tuple([ast.Constant(n) for n in names]",
        "label = ast.Tuple([ast.Constant(n) for n in names[::-1]]",
        "step.test_trace:test_each_traced_value_is_what_its_line_computes",
    ),
]
