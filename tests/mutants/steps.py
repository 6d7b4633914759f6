"""Wrong steps, places, scalars and traces."""

from __future__ import annotations

from tests.mutants.load import Mutant

STEP, TRACE, SCALARS, PAGED, SPEC = "step.py", "trace.py", "scalars.py", "places/paged.py", "spec.py"
PAGING = "places.test_paged:test_paging_changes_no_bit"
STEPS = "step.test_step:test_"

MUTANTS = [
    Mutant(
        "page-written-back-stale",
        STEP,
        "cells[n].store(a, b, new[n])",
        "cells[n].store(a, b, new[n] if first == 0 else old[n])",
        PAGING,
    ),
    Mutant(
        "page-of-weights-skipped",
        STEP,
        "flat_p[a:b] = self._round(new_p)",
        "flat_p[a:b] = self._round(new_p) if first == 0 else flat_p[a:b]",
        PAGING,
    ),
    Mutant(
        "page-takes-the-first-pages-gradient",
        STEP,
        "flat_g[a:b] * self.gscale",
        "flat_g[: b - a] * self.gscale",
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
        PAGING,
    ),
    Mutant(
        "pages-ignore-the-layout",
        STEP,
        "blocks.bounds(p.shape, self.block, self.layout)",
        "blocks.bounds(p.shape, self.block)",
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
        "self._step_one(p, g, s) if go else (p, s)",
        'self._step_one(p, g, s | {"t": state[0]["t"]}) if go else (p, s)',
        STEPS + "each_tensor_counts_its_own_steps",
    ),
    Mutant(
        "t-advances-without-a-gradient",
        STEP,
        "if go else (p, s)",
        'if go else (p, s | {"t": s["t"] + 1})',
        STEPS + "without_a_gradient_nothing_advances",
    ),
    Mutant(
        "a-skipped-tensor-advances",
        STEP,
        'holds NaN or Inf")\n        return False',
        'holds NaN or Inf")\n        g[...] = 0\n        return True',
        STEPS + "skipping_a_bad_gradient_leaves_its_tensor_alone",
    ),
    Mutant(
        "encoded-twice",
        STEP,
        "self.codec.pack(x, bounds, self.codec).items()",
        "self.codec.pack(self.codec.unpack(self.codec.pack(x, bounds, self.codec), bounds, self.codec), "
        "bounds, self.codec).items()",
        STEPS + "a_coded_step_is_decode_rule_encode",
    ),
    Mutant(
        "weights-move-by-stored-states",
        STEP,
        "                new_p, new = self.rule.update(flat_p[a:b], grad, old, t=t, **self.hyper)\n",
        "                _, new = self.rule.update(flat_p[a:b], grad, old, t=t, **self.hyper)\n"
        "                for n in names:\n"
        "                    cells[n].store(a, b, new[n])\n"
        "                again = {n: cells[n].load(a, b) for n in names}\n"
        "                new_p, _ = self.rule.update(flat_p[a:b], f32(0) * grad, again, t=t, **self.hyper)\n",
        STEPS + "the_first_coded_step_is_the_uncoded_one",
    ),
    Mutant(
        "unsigned-table-for-m",
        STEP,
        'if s.nonnegative and out[s.name].scope == "block"',
        'if out[s.name].scope == "block"',
        STEPS + "a_nonnegative_state_takes_the_unsigned_table",
    ),
    Mutant(
        "a-sign-that-was-asked-for-is-dropped",
        STEP,
        " and not _insists(s, out[s.name])",
        "",
        STEPS + "a_nonnegative_state_keeps_a_signed_table_that_was_asked_for",
    ),
    Mutant(
        "signed-table-for-v",
        STEP,
        "out[s.name] = out[s.name](signed=False)",
        "out[s.name] = out[s.name](signed=True)",
        "golden.test_golden:test_the_oracle_reproduces_every_golden_run",
    ),
    Mutant(
        "weights-in-bf16-are-never-rounded",
        STEP,
        "flat_p[a:b] = self._round(new_p)",
        "flat_p[a:b] = new_p",
        STEPS + "weights_in_bf16_are_rounded_after_each_step",
    ),
    Mutant(
        "gscale-on-the-update",
        STEP,
        "grad = flat_g[a:b] * self.gscale",
        "grad = flat_g[a:b] * np.sign(self.gscale)",
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
        STEP,
        "a.reshape(-1).copy() for n, a in arrays.items()",
        "a.reshape(-1) for n, a in arrays.items()",
        STEPS + "a_step_mutates_none_of_its_inputs",
    ),
    Mutant(
        "weights-changed-in-place",
        STEP,
        "p.reshape(-1).copy(), g.reshape(-1)",
        "p.reshape(-1), g.reshape(-1)",
        STEPS + "a_step_mutates_none_of_its_inputs",
    ),
    Mutant(
        "storage-order-used",
        STEP,
        "g.reshape(-1)\n        with",
        'g.ravel("K")\n        with',
        STEPS + "storage_order_does_not_matter",
    ),
    Mutant(
        "checked-while-stepping",
        STEP,
        "        live = [self._check_one(k, p, g, s) for k, (p, g, s) in enumerate(zip(ps, gs, state, strict=True))]\n",
        "        live = []\n"
        "        for k, (p, g, s) in enumerate(zip(ps, gs, state, strict=True)):\n"
        "            live.append(self._check_one(k, p, g, s))\n"
        '            s["t"] += 1\n',
        "step.test_errors:test_a_step_that_raises_leaves_everything_unchanged",
    ),
    Mutant(
        "gradients-may-broadcast",
        STEP,
        "if g.shape != p.shape:",
        "if g.size > p.size:",
        "step.test_errors:test_a_step_that_raises_leaves_everything_unchanged",
    ),
    Mutant(
        "gradients-paired-by-position",
        STEP,
        "keys = list(like if isinstance(like, Mapping) else tree)",
        "keys = list(tree)",
        STEPS + "trees_come_back_as_they_went_in",
    ),
    Mutant(
        "block-size-unchecked",
        STEP,
        '("stem", "block", "layout", "signed")',
        '("stem", "layout", "signed")',
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
        "return codes + (4 * (len(self.bounds(shape)) - 1)",
        "return codes + (4 * (len(self.bounds(shape)) - 2)",
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
        TRACE,
        "ast.Constant(n) for n in names]",
        "ast.Constant(n) for n in names[::-1]]",
        "step.test_trace:test_each_traced_value_is_what_its_line_computes",
    ),
]
