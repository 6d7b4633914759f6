"""Wrong places, partitions, delays and byte counts."""

from __future__ import annotations

from tests.mutants.load import Mutant

CELLS, STEP, SPEC = "cells.py", "step.py", "spec.py"
DISK, HOST, PAGED = "places/disk.py", "places/host.py", "places/paged.py"
PARTITION, SHARING = "partition.py", "step.test_partition:test_"
ON_DISK, ON_HOST, PAGING = "places.test_disk:test_", "places.test_host:test_", "places.test_paged:test_"

MUTANTS = [
    Mutant(
        "page-of-a-state-never-written",
        CELLS,
        "            self.new[n][self.at[n]] = x\n",
        "            self.new[n][self.at[n]] = x if self.a or self.b == self.size else self.arrays[n][self.at[n]]\n",
        PAGING + "paging_changes_no_bit",
    ),
    Mutant(
        "scales-of-a-page-from-the-first",
        CELLS,
        '"block": slice(i, j)}',
        '"block": slice(0, j - i)}',
        PAGING + "paging_changes_no_bit",
    ),
    Mutant(
        "scales-of-a-page-not-counted",
        CELLS,
        "for n, s in at.items())",
        'for n, s in at.items() if n != "scales")',
        PAGING + "the_moves_are_those_of_the_schedule",
    ),
    Mutant(
        "one-buffer-of-two",
        PAGED,
        "ring = buffers * max",
        "ring = max",
        PAGING + "the_device_holds_weights_gradients_and_the_ring",
    ),
    Mutant(
        "the-schedule-forgets-the-way-back",
        SPEC,
        'for k in ("in", "out") if k in self.links',
        'for k in ("in",) if k in self.links',
        PAGING + "the_moves_are_those_of_the_schedule",
    ),
    Mutant(
        "host-moves-float32-weights",
        STEP,
        'np.dtype(self.codecs["p"].parts[0].dtype).itemsize',
        "4",
        ON_HOST + "no_state_crosses_the_link",
    ),
    Mutant(
        "host-moves-states",
        HOST,
        'links={"g"',
        'links={"in": "host>device", "g"',
        ON_HOST + "no_state_crosses_the_link",
    ),
    Mutant(
        "host-keeps-no-copy-of-the-weights",
        HOST,
        "sum(load.p + load.g + load.states for",
        "sum(load.g + load.states for",
        ON_HOST + "the_device_holds_weights_and_one_gradient_the_host_the_rest",
    ),
    Mutant(
        "short-read-padded-with-zeros",
        DISK,
        "        if len(data) < size:\n",
        '        data = data.ljust(size, b"\\0")\n        if len(data) < size:\n',
        ON_DISK + "a_short_read_raises_before_anything_changes",
    ),
    Mutant(
        "written-over-the-old-state",
        CELLS,
        "        self.new = make(",
        '        self.new = self.arrays if name != "p" and hasattr(have, "file") else make(',
        ON_DISK + "the_old_state_still_reads_as_it_was",
    ),
    Mutant(
        "half-written-files-stay",
        DISK,
        "            file.drop()\n",
        "            file.publish()\n",
        ON_DISK + "a_full_disk_raises_before_anything_changes",
    ),
    Mutant(
        "old-files-stay",
        DISK,
        "lambda where: where[0].unlink(missing_ok=True)",
        "lambda where: None",
        ON_DISK + "old_and_new_states_are_on_the_disk_in_a_step_and_then_the_new",
    ),
    Mutant(
        "strips-overlap-by-a-stretch",
        DISK,
        "self.file.write(self.offset + first * self.dtype.itemsize, data)",
        "self.file.write(self.offset + first, data)",
        ON_DISK + "streaming_from_disk_changes_no_bit",
    ),
    Mutant(
        "data-padded-into-the-next-array",
        DISK,
        "end += -(-size * np.dtype(dtype).itemsize // ALIGN) * ALIGN",
        "end += size * np.dtype(dtype).itemsize // ALIGN * ALIGN",
        ON_DISK + "streaming_from_disk_changes_no_bit",
    ),
    Mutant(
        "disk-reads-it-all",
        CELLS,
        "self.arrays = {n: a.reshape(-1) for n, a in arrays.items()}",
        "self.arrays = {n: np.array(a).reshape(-1) for n, a in arrays.items()}",
        ON_DISK + "memory_never_holds_the_states",
    ),
    Mutant(
        "a-block-across-two-ranks",
        PARTITION,
        "owners = np.minimum((offset + starts) // self.stretch, self.ranks - 1)",
        "owners = np.minimum((offset + starts + self.opt.block // 2) // self.stretch, self.ranks - 1)",
        SHARING + "every_block_has_one_owner_and_none_is_split",
    ),
    Mutant(
        "stretches-count-from-the-tensor",
        PARTITION,
        "(offset + starts) // self.stretch",
        "starts // self.stretch",
        SHARING + "every_block_has_one_owner_and_none_is_split",
    ),
    Mutant(
        "a-share-draws-the-bits-of-the-start",
        CELLS,
        "rng.r16(self.key, self.a, self.b - self.a)",
        "rng.r16(self.key, self.a - self.start, self.b - self.a)",
        SHARING + "formats_of_weights_draw_and_carry_the_same_bits_in_every_share",
    ),
    Mutant(
        "every-rank-keeps-all-gradients",
        PARTITION,
        "for least in (3, 2)",
        "for least in (3, 3)",
        SHARING + "stages_hold_and_exchange_what_the_paper_says",
    ),
    Mutant(
        "pending-gradients-stay-with-one-rank",
        PARTITION,
        'if isinstance(state.get("pending"), Share):',
        'if isinstance(state.get("pending"), Share) and share["window"][1]:',
        SHARING + "a_pending_gradient_is_shared_out_too",
    ),
    Mutant(
        "each-rank-skips-by-itself",
        PARTITION,
        "for k, g in enumerate(whole)]\n        ps",
        "for k, g in enumerate(whole)]\n        usable = [g if u is None else u for g, u in zip(whole, usable)]"
        "\n        ps",
        SHARING + "a_gradient_with_inf_is_skipped_by_every_rank",
    ),
    Mutant(
        "shares-of-other-steps-mix",
        PARTITION,
        "if len(found) > 1:",
        "if len(found) > self.ranks:",
        SHARING + "shards_of_another_partition_are_refused_before_anything_changes",
    ),
]
