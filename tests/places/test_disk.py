"""Disk: no page size changes a bit, memory never holds the states, and what goes wrong with a file changes nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state
from tests.cases import EVERY, STEMS, RuleCase, label
from tests.places.laws import SIZES, keeps_its_schedule, same_run, some_codecs
from tests.strategies import SHAPES, f32, follow, runs

every_rule = pytest.mark.parametrize("case", EVERY, ids=label)


def files(folder: Any) -> list[Path]:
    gc.collect()
    return sorted(Path(folder).iterdir())


@every_rule
@given(size=st.sampled_from(SIZES), data=st.data())
def test_streaming_from_disk_changes_no_bit(ref: ModuleType, case: RuleCase, size: int, data: Any) -> None:
    run = data.draw(runs(shapes=case.shapes or SHAPES))
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        same_run(ref, case, ref.places.disk(path=folder, page_blocks=size), run, some_codecs(ref, case, data))


@every_rule
@pytest.mark.parametrize("stem", STEMS)
def test_the_moves_are_those_of_the_schedule(ref: ModuleType, case: RuleCase, stem: str) -> None:
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = ref.places.disk(path=folder, page_blocks=2)
        keeps_its_schedule(ref, case, place, list(case.shapes) or [(5, 3), (700,)], stem)


def test_memory_never_holds_the_states(ref: ModuleType) -> None:
    """What a step allocates is the new weights, a few pages and their temporaries, not 8 bytes a parameter."""
    p, g = [np.ones(400_000, f32)], [np.ones(400_000, f32)]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opt = ref.Optimizer("adamw", None, ref.places.disk(path=folder, page_blocks=16))
        state = opt.init(p)
        tracemalloc.start()
        opt.step(p, g, state)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert p[0].nbytes < held < 1.5 * p[0].nbytes
    assert opt.peak(p).host == 8 * 400_000 + 2 * 16 * 256 * 8


def test_old_and_new_states_are_on_the_disk_in_a_step_and_then_the_new(ref: ModuleType) -> None:
    """Two states of 3000 words; each array begins at a multiple of 4096 and takes whole multiples."""
    p = [np.ones(3000, f32)]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opt = ref.Optimizer("adamw", None, ref.places.disk(path=folder))
        state = opt.init(p)
        assert [f.stat().st_size for f in files(folder)] == [12288, 12288]
        _, after = opt.step(p, p, state)
        assert len(files(folder)) == 4 and all(f.suffix == ".bin" for f in files(folder))
        del state
        assert len(files(folder)) == 2
        del after
        assert files(folder) == []


def test_arrays_of_a_file_are_aligned_and_the_data_unpadded(ref: ModuleType) -> None:
    p = np.linspace(-1, 1, 5000, dtype=f32)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opt = ref.Optimizer("lion", "dynamic8", ref.places.disk(path=folder))
        _, (after,) = opt.step([p], [p], opt.init([p]))
        (file,) = files(folder)
        box = ref.Optimizer("lion", "dynamic8").step([p], [p], ref.Optimizer("lion", "dynamic8").init([p]))[1][0]["m"]
        data = file.read_bytes()
        assert data[:5000] == box.codes.tobytes()
        assert data[8192 : 8192 + box.scales.nbytes] == box.scales.tobytes()
        assert len(data) == 8192 + 4096
        same_bits(after["m"].decode(), box.decode(), "m")


def test_the_old_state_still_reads_as_it_was(ref: ModuleType) -> None:
    p, grads = np.ones(700, f32), [np.full(700, x, f32) for x in (1, -2)]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opt = ref.Optimizer("adamw", {"m": "dynamic8"}, ref.places.disk(path=folder))
        q, state = follow(opt, [p], [[grads[0]]])
        before = copy.deepcopy(state)
        opt.step(q, [grads[1]], state)
        same_state(state[0], before[0])
        del opt, state


@pytest.mark.parametrize("stem", STEMS)
def test_a_checkpoint_holds_the_data_and_continues_in_any_place(ref: ModuleType, stem: str) -> None:
    rng = np.random.default_rng(6)
    p, *grads = rng.standard_normal((5, 3, 40)).astype(f32)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opt = ref.Optimizer("adamw", stem, ref.places.disk(path=folder, page_blocks=1))
        q, state = follow(opt, [p], [[g] for g in grads[:2]])
        saved = pickle.dumps(state)
        end, last = follow(opt, q, [[g] for g in grads[2:]], state)
        state = None
        other, again = follow(opt, q, [[g] for g in grads[2:]], pickle.loads(saved))
        plain, memory = follow(ref.Optimizer("adamw", stem), q, [[g] for g in grads[2:]], pickle.loads(saved))
        for got, its in ((other, again), (plain, memory)):
            same_bits(got[0], end[0], "p")
            same_state(its[0], last[0])
        del last, again, its


def spoiled(ref: ModuleType, folder: str, spoil: Any) -> None:
    """A step of two tensors that meets a spoiled file raises OSError and leaves everything as it was."""
    rng = np.random.default_rng(2)
    p = [rng.standard_normal(n).astype(f32) for n in (600, 9000)]
    opt = ref.Optimizer("adamw", {"v": "dynamic8"}, ref.places.disk(path=folder, page_blocks=4))
    q, state = opt.step(p, p, opt.init(p))
    before, listed = copy.deepcopy((q, state)), files(folder)
    with spoil(state), pytest.raises(OSError) as caught:
        opt.step(q, p, state)
    assert files(folder) == listed and caught.tb is not None
    for k in range(2):
        same_bits(q[k], before[0][k], f"p[{k}]")
        if k == 0 or spoil is not truncated:
            same_state(state[k], before[1][k], f"state[{k}]")


class truncated:
    """The last file is one byte short of its data."""

    def __init__(self, state: Any) -> None:
        strip = state[1]["m"]
        with open(strip.file.path, "r+b") as file:
            file.truncate(strip.nbytes - 1)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: Any) -> None:
        pass


class full:
    """No file may grow beyond 16 KiB, so the second tensor's states find no room."""

    def __init__(self, state: Any) -> None:
        import resource

        self.resource: Any = resource

    def __enter__(self) -> None:
        self.old = self.resource.getrlimit(self.resource.RLIMIT_FSIZE)
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, (16384, self.old[1]))

    def __exit__(self, *exc: Any) -> None:
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, self.old)


def test_a_short_read_raises_before_anything_changes(ref: ModuleType) -> None:
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        spoiled(ref, folder, truncated)


def test_a_full_disk_raises_before_anything_changes(ref: ModuleType) -> None:
    pytest.importorskip("resource", reason="needs a limit on the size of files")
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        spoiled(ref, folder, full)


def test_a_short_read_says_where_and_how_much(ref: ModuleType) -> None:
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opt = ref.Optimizer("lion", None, ref.places.disk(path=folder))
        state = opt.init([np.ones(500, f32)])
        Path(files(folder)[0]).write_bytes(bytes(1999))
        with pytest.raises(OSError, match=r"short read: 2000 bytes were asked for at 0, 1999 came.*0\.m\..*bin"):
            opt.step([np.ones(500, f32)], [np.ones(500, f32)], state)
        del state


def test_a_failed_init_leaves_no_file(ref: ModuleType) -> None:
    with TemporaryDirectory() as folder:
        opt = ref.Optimizer("lion", None, ref.places.disk(path=folder))
        with pytest.raises(TypeError, match=r"params\[1\]"):
            opt.init([np.ones(500, f32), np.ones(3)])
        assert files(folder) == []
