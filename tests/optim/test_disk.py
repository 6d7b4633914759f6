"""`place="disk"`: the bits of the resident step, states in files, and what a crash or a bad disk leaves of them."""

from __future__ import annotations

import copy
import errno
import fcntl
import gc
import os
import pickle
import random
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.codecs import WEIGHTS
from refopt_cuda.optim.filing import OnDisk
from refopt_cuda.places import files, lanes, vault
from tests.conftest import DAY, TURNS
from tests.kernels.covering import CODECS, words_of
from tests.optim.faulty import Dying, PowerLoss, Storage
from tests.optim.pairs import CASES, Case, give, snapshot, unchanged, weights
from tests.optim.placed import ADAMW, ADAMW8, SMALL, alike, pages_of, params_of, step
from tests.optim.shuffled import ShuffledLanes
from tests.optim.test_checkpoints import through_a_file, twins
from tests.optim.test_every_codec import MORE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_decay is coupled"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""A disk that waits for nothing."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that does not exist yet."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as parent:
        yield Path(parent) / "states"


def disk(case: Case, params: Any, folder: Path, size: int = 4000, **options: Any) -> Any:
    return case.make(params, **options, place="disk", path=folder, page_bytes=size)


def pair(
    case: Case, shapes: Any, dtype: torch.dtype, device: str, folder: Path, size: int = 4000, **options: Any
) -> Any:
    """The same optimizer twice: states beside the weights, and in files."""
    one, two = weights(shapes, dtype, device), weights(shapes, dtype, device)
    return case.make(one, **options), disk(case, two, folder, size, **options)


def listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def records_of(opt: Any) -> set[Any]:
    return {opt._home.records[page] for page in pages_of(opt)}


def leave(opt: Any) -> None:
    """End as a process ends: files stay, the lock goes."""
    opt._home.finish()
    opt._home.vault.close(keep=True)


# ------------------------------------------------------------------------------------------------------- the same bits


def on_each_device(cases: Any, turn: int) -> Any:
    """All cases on a GPU and on the CPU, where each is a kernel to compile: where CI runs, one case of one of these
    tests a day."""
    here = cases if TURNS == 1 else [cases[DAY // 3 % len(cases)]] if DAY % 3 == turn else []
    gpu = [pytest.param("cuda", case, marks=pytest.mark.gpu) for case in cases]
    return pytest.mark.parametrize(("device", "case"), [("cpu", case) for case in here] + gpu, ids=str)


@on_each_device(CASES + MORE, 0)
def test_files_change_no_bit(case: Case, device: str, folder: Path) -> None:
    alike(*pair(case, SMALL, torch.float32, device, folder, 7 * 520, min_8bit_size=1000), steps=2)


@pytest.mark.parametrize("size", [1, 1 << 30], ids=["one block", "more than there is"])
def test_files_change_no_bit_for_any_page(size: int, device: str, folder: Path) -> None:
    alike(*pair(ADAMW8, [(64, 80), (33, 300), (40,), (0,)], torch.float32, device, folder, size))


@on_each_device(CODECS, 1)
def test_files_change_no_bit_of_any_codec(case: str, device: str, folder: Path) -> None:
    alike(*pair(ADAMW, SMALL, torch.bfloat16, device, folder, 3000, codecs=case, min_8bit_size=1000), steps=2)


@on_each_device(words_of(WEIGHTS), 2)
def test_files_change_no_bit_of_any_format_of_weights(case: str, device: str, folder: Path) -> None:
    options = {"codecs": {"p": case, "v": "q4:64"}, "min_8bit_size": 1000, "seed": 5}
    alike(*pair(ADAMW, SMALL, torch.bfloat16, device, folder, 3000, **options), steps=2)


@pytest.mark.parametrize("size", [1, 3000])
def test_any_order_that_the_events_allow_gives_the_same_bits(
    size: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: pages pass through a ring, whose places are NaN as soon as they are stored."""
    monkeypatch.setattr(OnDisk, "rehearsal", True)
    for seed in range(3):
        monkeypatch.setattr(lanes, "lanes_of", lambda kind, device, seed=seed: ShuffledLanes(seed))
        alike(*pair(ADAMW8, [(64, 80), (33, 300), (40,)], torch.float32, "cpu", folder, size))


def test_a_page_that_is_written_before_it_is_back_shows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would say of a desk that does not wait for the ring."""

    class Hasty(ShuffledLanes):
        def meet(self, event: Any) -> None: ...

    monkeypatch.setattr(OnDisk, "rehearsal", True)
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Hasty(1))
    with pytest.raises(AssertionError, match="tensor"):
        alike(*pair(ADAMW8, [(64, 80), (33, 300)], torch.float32, "cpu", folder, 1), 4)


def test_groups_settings_and_missing_gradients(folder: Path) -> None:
    """Two groups in one directory; parameters that start late, pause, or move; a state that begins in mid-run."""

    def make(place: dict[str, Any]) -> Any:
        a, b, c, d = weights([(64, 80), (90, 64), (33,), (70, 64)], torch.float32, "cpu")
        groups = [{"params": [a, d]}, {"params": [b, c], "lr": 0.3, "momentum": 0.0}]
        return rc.optim.SGD(groups, lr=0.1, momentum=0.9, **place)

    opts = make({}), make({"place": "disk", "path": folder, "page_bytes": 2000})
    for t, live in enumerate([(0, 2), (1,), (0, 1, 2, 3), (), (3,), (0, 1, 2, 3)]):
        for opt in opts:
            params = params_of(opt)
            give(params, t)
            for k in set(range(4)) - set(live):
                params[k].grad = None
            if t == 2:
                opt.param_groups[1]["momentum"] = 0.8
            if t == 5:
                params[0].data = params[0].data.clone()
            opt.step()
    alike(*opts, 2, start=9)


def test_parameters_in_another_order_are_stepped_through_a_copy(device: str, folder: Path) -> None:
    opts = pair(ADAMW8, [(96, 64), (40, 300)], torch.float32, device, folder)
    for opt in opts:
        p, q = params_of(opt)
        p.data, q.data = p.detach().clone().t().contiguous().t(), torch.cat([q.detach()] * 2, 1)[:, :300]
    alike(*opts)


# ------------------------------------------------------------------------------------------------- where the states are


def test_states_are_in_files_and_no_memory_holds_them(folder: Path) -> None:
    opt = disk(ADAMW, weights([(640, 800), (40,)], torch.float32, "cpu"), folder, 10_000)
    step(opt, 0)
    opt._home.finish()
    assert {x.device.type for s in opt._state.values() for x in s.values() if torch.is_tensor(x)} == {"meta"}
    (deck,) = opt._home.decks.values()
    states = 8 * (640 * 800 + 40)
    assert (
        deck.slabs.size < states / 20 and 2 * states <= sum(p.stat().st_size for p in folder.iterdir()) < 2.5 * states
    )


def test_a_step_reads_every_byte_once_and_writes_it_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"read": 0, "write": 0}

    class Counting(files.Plain):
        def read(self, out: np.ndarray, at: int) -> None:
            moved["read"] += out.nbytes
            super().read(out, at)

        def write(self, data: np.ndarray, at: int) -> None:
            moved["write"] += data.nbytes * self.path.name.startswith("pages-0.bin")
            super().write(data, at)

    monkeypatch.setattr(files, "opened", lambda path, direct=True, gpu=False: Counting(path, direct))
    opt = disk(ADAMW8, weights([(640, 800), (400, 640)], torch.float32, "cpu"), folder, 1 << 15)
    pages = 0
    for t in range(3):
        step(opt, t)
        opt._home.finish()
        pages = sum(record.room for record in records_of(opt))
        assert moved == {"read": t * pages, "write": (t + 1) * pages}
    assert pages < 1.15 * 2 * 1.0157 * (640 * 800 + 400 * 640), "padding"


def test_looking_at_states_shows_copies_and_changing_them_counts(folder: Path) -> None:
    one, two = pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu", folder)
    alike(one, two)
    records = records_of(two)
    for opt in (one, two):
        opt.state[params_of(opt)[0]]["m.scales"].mul_(2)
        opt.state[params_of(opt)[1]]["exp_avg"] = torch.ones(40)
    alike(one, two, 2, start=5)
    assert records.isdisjoint(records_of(two))
    records = records_of(two)
    alike(one, two, 2, start=8)
    assert records == records_of(two), "what was only looked at is written once more"


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_that_of_the_resident_optimizer_and_loading_keeps_the_place(device: str, folder: Path) -> None:
    one, two = pair(ADAMW8, SMALL, torch.float32, device, folder)
    alike(one, two)
    saved = through_a_file(two.state_dict())
    again = disk(ADAMW8, twins(params_of(two), device), folder.parent / "again", 777)
    again.load_state_dict(through_a_file(one.state_dict(), map_location="cpu"))
    one.load_state_dict(saved)
    alike(one, two, 2, start=7)
    for t in (7, 8):
        step(again, t)
    for p, q in zip(params_of(one), params_of(again), strict=True):
        assert torch.equal(p, q)
    two.load_state_dict(saved)  # into files that are there
    two.load_state_dict(two.state_dict())
    other = ADAMW8.make(twins(params_of(two), device))
    other.load_state_dict(saved)
    alike(other, two, 2, start=9)
    assert {x.device.type for x in again._home.metas[params_of(again)[0]].values()} == {"meta"}
    assert len(listed(folder)) == 4, "one data file with its table, and two stamps"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_wants_the_same_directory(way: Callable[[Any], Any], folder: Path) -> None:
    one, opt = pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu", folder)
    alike(one, opt)
    other = way(opt)
    with pytest.raises(BlockingIOError, match=r"another optimizer keeps its states there"):
        step(other, 5)
    del opt
    gc.collect()
    alike(one, other, 2, start=5)


def test_a_directory_is_left_as_it_was_found(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    opt = disk(ADAMW8, weights([(64, 80)], torch.float32, "cpu"), folder)
    step(opt, 0)
    del opt
    gc.collect()
    assert listed(folder) == ["notes.txt"]


def test_files_go_with_the_optimizer_unless_weights_are_kept_or_nothing_was_stepped(folder: Path) -> None:
    opt = disk(ADAMW8, weights([(64, 80)], torch.float32, "cpu"), folder, keep_weights=True)
    step(opt, 0)
    del opt
    gc.collect()
    opt = disk(ADAMW8, weights([(64, 80)], torch.float32, "cpu"), folder)
    assert opt.resume() == 1
    del opt
    gc.collect()
    (folder / "pages-0.json").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"pages-0\.json"):
        disk(ADAMW8, weights([(64, 80)], torch.float32, "cpu"), folder).resume()
    gc.collect()
    (folder / "elsewhere").rename(folder / "pages-0.json")
    opt = disk(ADAMW8, weights([(64, 80)], torch.float32, "cpu"), folder)
    assert opt.resume() == 1
    step(opt, 1)
    opt._home.finish()
    del opt
    gc.collect()
    assert listed(folder) == []


def test_fifty_optimizers_leave_no_file_no_thread_and_no_descriptor(folder: Path) -> None:
    def once() -> None:
        opt = disk(ADAMW8, weights([(64, 80), (40,)], torch.float32, "cpu"), folder)
        step(opt, 0)
        assert opt.state_dict()["state"][0]["m.codes"].any()

    once()
    gc.collect()
    threads, descriptors, mapped = threading.active_count(), len(os.listdir("/proc/self/fd")), held()
    for _ in range(50):
        once()
    gc.collect()
    assert not folder.exists() and threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors and held() - mapped < 8 << 20


def held() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -------------------------------------------------------------------------------------------------------------- crashes

SHAPES = [(64, 80), (33, 300), (40,)]
STEPS = 4


class Reference:
    """A run that nothing disturbs, and what it was after every step."""

    def __init__(self) -> None:
        self.opt = ADAMW8.make(weights(SHAPES, torch.float32, "cpu"))
        self.at = [self.now()]
        for t in range(STEPS + 1):
            step(self.opt, t)
            self.at.append(self.now())

    def now(self) -> Any:
        return copy.deepcopy(snapshot(self.opt))

    def agrees(self, opt: Any, t: int, what: str) -> None:
        for (p, state), (q, want) in zip(snapshot(opt), self.at[t], strict=True):
            assert torch.equal(p, q), f"{what}: weights after step {t}"
            assert state.keys() == want.keys()
            assert all(torch.equal(x, want[k]) if torch.is_tensor(x) else x == want[k] for k, x in state.items()), what

    def run(self, folder: Path, keep: bool, size: int = 700) -> Any:
        """The same on a disk."""
        opt = disk(ADAMW8, weights(SHAPES, torch.float32, "cpu"), folder, size, keep_weights=keep)
        for t in range(STEPS):
            step(opt, t)
        opt._home.finish()
        return opt

    def resumed(self, folder: Path, what: str, keep: bool) -> int:
        """Go on with what is there: the states of the last complete step, with its weights, and one step more.
        Returns which step it was."""
        opt = disk(ADAMW8, weights(SHAPES, torch.float32, "cpu"), folder, 900, keep_weights=keep)
        try:
            t = opt.resume()
        except FileNotFoundError:
            t = 0
        for p, (q, _) in zip(params_of(opt), self.at[t], strict=True):
            assert not keep or torch.equal(p, q), f"{what}: kept weights"
            p.data.copy_(q)
        self.agrees(opt, t, what)
        step(opt, t)
        self.agrees(opt, t + 1, what)
        opt._home.vault.close(keep=False)
        assert not listed(folder)
        return t


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def written(reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch, keep: bool) -> tuple[int, int]:
    """How many bytes, and in how many writes, a run gives to its files."""
    storage = Storage(0, 10**9)
    total = [0]

    def opened(path: Path, direct: bool = True, gpu: bool = False) -> Any:
        file = storage.opened(path)
        write = file.write
        file.write = lambda data, at: (total.__setitem__(0, total[0] + data.nbytes), write(data, at))[1]
        return file

    with monkeypatch.context() as patch:
        patch.setattr(files, "opened", opened)
        reference.run(folder, keep)._home.vault.close(keep=False)
    return total[0], 10**9 - storage.left


def test_a_process_that_is_killed_within_a_write_leaves_the_last_complete_step(
    reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, Any], None]
) -> None:
    total, _ = written(reference, folder, monkeypatch, True)
    monkeypatch.setattr(files, "opened", lambda path, direct=True, gpu=False: Dying(path, direct))
    draw, inside, found = random.Random(7), 0, list[int]()
    for trial in range(50):
        Dying.left = draw.randrange(total)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                reference.run(folder, True)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or os.WEXITSTATUS(status) == 0, f"trial {trial}: the run failed"
        inside += killed
        Dying.left = 10**12
        found.append(reference.resumed(folder, f"trial {trial}", True))
    steps = ", ".join(f"{found.count(t)} of step {t}" for t in sorted(set(found)))
    record_property("printed", f"{inside} of 50 processes were killed within a write; they left the states {steps}")
    assert inside >= 30 and len(set(found)) > 2


def power_losses(reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch, careless: str = "") -> list[int]:
    writes = [written(reference, folder, monkeypatch, keep)[1] for keep in (False, True)]
    draw, found = random.Random(11), list[int]()
    for trial in range(30):
        keep = trial % 2 == 0
        storage = Storage(trial, draw.randrange(writes[keep]), careless)
        with monkeypatch.context() as patch:
            patch.setattr(files, "opened", storage.opened)
            opt = disk(ADAMW8, weights(SHAPES, torch.float32, "cpu"), folder, 700, keep_weights=keep)
            with pytest.raises(PowerLoss):
                for t in range(STEPS):
                    step(opt, t)
                opt._home.finish()
            if opt._home.vault is not None:
                opt._home.vault.close(keep=True)
            storage.lose()
        del opt
        found.append(reference.resumed(folder, f"trial {trial}", keep))
    return found


def test_a_machine_that_goes_off_leaves_the_last_complete_step(
    reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, Any], None]
) -> None:
    """Of what was written and not synced, any sector may be there or not."""
    found = power_losses(reference, folder, monkeypatch)
    steps = ", ".join(f"{found.count(t)} of step {t}" for t in sorted(set(found)))
    record_property("printed", f"30 machines went off and left the states {steps}")
    assert len(set(found)) > 2


@pytest.mark.parametrize("careless", ["pages", "stamp"])
def test_a_sync_that_is_left_out_shows(
    careless: str, reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would say if pages, or stamps, were not synced."""
    with pytest.raises((OSError, AssertionError, ValueError)):
        power_losses(reference, folder, monkeypatch, careless)


def test_weights_that_are_kept_come_back(device: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another order, by parameters that share pages and take turns, and through a ring."""
    monkeypatch.setattr(OnDisk, "rehearsal", True)
    shapes = [(96, 64), (33, 300), (40,), (), (0,), (7,)]
    one = ADAMW8.make(weights(shapes, torch.float32, device))
    two = disk(ADAMW8, weights(shapes, torch.float32, device), folder, 3000, keep_weights=True)
    for opt in (one, two):
        params_of(opt)[0].data = params_of(opt)[0].detach().clone().t().contiguous().t()
    alike(one, two)
    for opt in (one, two):
        give(params_of(opt), 7)
        for k in (0, 2, 5):
            params_of(opt)[k].grad = None
        opt.step()
    leave(two)
    again = disk(ADAMW8, weights(shapes, torch.float32, device, 9), folder, 1 << 20)
    assert again.resume() == 4
    for p, q in zip(params_of(one), params_of(again), strict=True):
        assert torch.equal(p, q)
    alike(one, again, 2, start=8)


def test_pages_that_were_made_anew_are_resumed_beside_those_that_wait(folder: Path) -> None:
    """Of a parameter without a gradient the words stay in the file of before, beside older words of the others."""
    shapes = [(64, 80), (33, 300), (40,)]
    one = ADAMW8.make(weights(shapes, torch.float32, "cpu"))
    two = disk(ADAMW8, weights(shapes, torch.float32, "cpu"), folder, 3000, keep_weights=True)
    alike(one, two)
    params_of(two)[0].data = params_of(two)[0].data.clone()  # pages of all three are made anew
    for opt in (one, two):
        give(params_of(opt), 7)
        params_of(opt)[1].grad = None
        opt.step()
    leave(two)
    assert [name for name in listed(folder) if name.endswith("bin")] == ["pages-0.bin", "pages-1.bin"]
    again = disk(ADAMW8, weights(shapes, torch.float32, "cpu", 9), folder, 2500)
    assert again.resume() == 4
    for p, q in zip(params_of(one), params_of(again), strict=True):
        assert torch.equal(p, q)
    alike(one, again, 2, start=8)
    again._home.finish()
    again._home.vault.wait()
    assert len([name for name in listed(folder) if name.endswith("bin")]) == 1


def test_resuming_wants_the_same_optimizer(folder: Path) -> None:
    opt = disk(ADAMW8, weights([(64, 80), (40,)], torch.float32, "cpu"), folder)
    step(opt, 0)
    leave(opt)
    make: dict[str, Callable[[], Any]] = {
        r"holds the states of step 1 of an earlier run: resume\(\)": lambda: step(
            disk(ADAMW8, weights([(64, 80), (40,)], torch.float32, "cpu"), folder), 0
        ),
        "holds states of 'adamw', this optimizer's rule is 'lion'": rc.optim.Lion8bit(
            weights([(64, 80), (40,)], torch.float32, "cpu"), place="disk", path=folder
        ).resume,
        "parameter 0 has states": disk(
            ADAMW8, weights([(64, 80), (40,)], torch.float32, "cpu"), folder, codecs="q4"
        ).resume,
        "parameter 1 has states": disk(ADAMW8, weights([(64, 80), (41,)], torch.float32, "cpu"), folder).resume,
        "holds states of parameter 1, this optimizer has 1": disk(
            ADAMW8, weights([(64, 80)], torch.float32, "cpu"), folder
        ).resume,
    }
    before = listed(folder)
    for says, call in make.items():
        with pytest.raises((FileExistsError, refopt.StateError), match=says):
            call()
    assert listed(folder) == before
    assert disk(ADAMW8, weights([(64, 80), (40,)], torch.float32, "cpu"), folder).resume() == 1


def test_a_parameter_that_was_loaded_and_never_stepped_is_missed(folder: Path) -> None:
    first = ADAMW8.make(weights([(64, 80), (40,)], torch.float32, "cpu"))
    step(first, 0)
    opt = disk(ADAMW8, weights([(64, 80), (40,)], torch.float32, "cpu"), folder)
    opt.load_state_dict(first.state_dict())
    give(params_of(opt), 1)
    params_of(opt)[1].grad = None
    opt.step()
    leave(opt)
    with pytest.raises(refopt.StateError, match=r"states of parameters \[1\] were loaded and never stepped"):
        disk(ADAMW8, weights([(64, 80), (40,)], torch.float32, "cpu"), folder).resume()


# ------------------------------------------------------------------------------------------------------------ bad disks


def spoiled(folder: Path) -> tuple[Any, Any]:
    """An optimizer that has taken two steps, and what it holds."""
    opt = disk(ADAMW8, weights([(64, 80), (33, 300)], torch.float32, "cpu"), folder, 1 << 20)
    step(opt, 0)
    step(opt, 1)
    before = copy.deepcopy(snapshot(opt))
    give(params_of(opt), 2)
    return opt, before


def test_a_flipped_byte_is_named_and_nothing_is_stepped(folder: Path) -> None:
    opt, before = spoiled(folder)
    (record,) = records_of(opt)
    at = record.at + record.latest.which * record.room + 77
    data = (folder / "pages-0.bin").read_bytes()
    (folder / "pages-0.bin").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    with pytest.raises(OSError, match=r"page 0 of the states of parameters 0 to 1, are not what was written.*pages-0"):
        opt.step()
    (folder / "pages-0.bin").write_bytes(data)
    unchanged(opt, before)
    opt.step()


def test_a_bad_page_in_mid_step_stops_the_run(folder: Path) -> None:
    """Weights of the pages before it are a step ahead then: nobody may go on as if nothing were."""
    one, opt = pair(ADAMW8, [(64, 80), (33, 300)], torch.float32, "cpu", folder, 1)
    alike(one, opt)
    saved = copy.deepcopy(opt.state_dict())
    record = opt._home.records[pages_of(opt)[40]]
    with (folder / "pages-0.bin").open("r+b") as file:
        file.seek(record.at + record.latest.which * record.room)
        file.write(bytes(8))
    held = [p.detach().clone() for p in params_of(opt)]
    with pytest.raises(OSError, match="parameter 0, are not what was written") as caught:
        step(opt, 5)
    assert "40 pages had been stepped" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match=r"AdamW8bit\.step: the step before ended early .*Load a checkpoint"):
        step(opt, 6)
    for p, q in zip(params_of(opt), held, strict=True):
        p.data.copy_(q)
    opt.load_state_dict(saved)
    alike(one, opt, 2, start=5)
    assert opt._home.vault.generation == 5


def test_a_file_that_lost_its_end_is_named_and_nothing_is_stepped(folder: Path) -> None:
    opt, before = spoiled(folder)
    data = (folder / "pages-0.bin").read_bytes()
    os.truncate(folder / "pages-0.bin", len(data) - 1)
    with pytest.raises(OSError, match=r"AdamW8bit\.step: short read: \d+ bytes .* \d+ are left.*pages-0"):
        opt.step()
    (folder / "pages-0.bin").write_bytes(data)
    unchanged(opt, before)
    opt.step()


def test_a_short_read_is_named(folder: Path) -> None:
    folder.mkdir()
    file = files.Plain(folder / "x")
    file.write(files.buffer(8192), 0)
    with pytest.raises(OSError, match=r"short read: 8192 bytes were asked for at 4096, 4096 came"):
        file.read(files.buffer(8192), 4096)
    file.close()


def test_a_full_disk_is_named_and_nothing_is_stepped(folder: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs a limit on the size of files")
    params = weights([(64, 80), (33, 300)], torch.float32, "cpu")
    opt, before = disk(ADAMW8, params, folder), [p.detach().clone() for p in params]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
    try:
        with pytest.raises(OSError, match=r"AdamW8bit\.step: path=.* two versions of them take [\d,]+ bytes, .* free"):
            step(opt, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and not opt.state
    assert listed(folder) == ["stamp.0", "stamp.1"]
    step(opt, 0)


def test_a_directory_that_cannot_be_written_is_named(folder: Path) -> None:
    folder.mkdir()
    os.chmod(folder.parent, 0o755)
    os.chmod(folder, 0o555)
    params = weights([(64, 80)], torch.float32, "cpu")
    opt, root = disk(ADAMW8, params, folder), os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=r"AdamW8bit\.step: path='.*states' cannot hold .*Permission denied"):
            step(opt, 0)
    finally:
        if root:
            os.seteuid(0)
        os.chmod(folder, 0o755)
    step(opt, 0)


def test_two_processes_do_not_share_a_directory(folder: Path) -> None:
    opt = disk(ADAMW8, weights([(64, 80)], torch.float32, "cpu"), folder)
    step(opt, 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            step(disk(ADAMW8, weights([(64, 80)], torch.float32, "cpu"), folder), 0)
        except BlockingIOError as error:
            status = 7 if "maybe of another process" in str(error) else 2
            del opt  # a fork's copy owns no file
            gc.collect()
        finally:
            os._exit(status)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 7
    step(opt, 1)
    assert opt.state[params_of(opt)[0]]["m.codes"].any()


def test_a_write_that_fails_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, opt = pair(ADAMW8, [(64, 80), (33, 300)], torch.float32, "cpu", folder, 1)
    alike(one, opt)

    def broken(self: Any, data: np.ndarray, at: int) -> None:
        raise OSError(errno.EIO, "places.disk: Input/output error", str(self.path))

    with monkeypatch.context() as patch:
        patch.setattr(files.Plain, "write", broken)
        with pytest.raises(OSError, match=r"Input/output error.*pages-0"):
            step(opt, 3)
            step(opt, 4)
    with pytest.raises(RuntimeError, match=r"Load a checkpoint, or resume\(\)"):
        step(opt, 5)
    with pytest.raises(RuntimeError, match="Load a checkpoint"):
        opt.state_dict()
    assert opt.resume() == 3


def test_where_direct_reads_are_refused_one_warning_says_what_it_costs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **words: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return real(path, flags, *rest, **words)

    monkeypatch.setattr(files, "TOLD", set())
    monkeypatch.setattr(os, "open", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alike(*pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu", folder))
        alike(*pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu", folder.parent / "other"))
    (warning,) = [w for w in caught if "direct reads" in str(w.message)]
    assert "takes no direct reads and writes (Invalid argument): states go through the page cache" in str(
        warning.message
    )


def test_a_file_system_that_refuses_a_direct_read_is_read_through_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take the flag, and refuse when it comes to it."""
    real, refused = os.preadv, list[int]()

    def refuse(fd: int, views: Any, at: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, views, at)

    monkeypatch.setattr(files, "TOLD", set())
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.warns(UserWarning, match="takes no direct reads"):
        alike(*pair(ADAMW8, [(64, 80), (33, 300)], torch.float32, "cpu", folder, 1))
    assert refused


@pytest.mark.gpu
def test_kvikio_and_the_system_read_each_others_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kvikio", reason="kvikio is not installed")
    params = weights([(640, 800), (330, 300)], torch.bfloat16, "cuda")
    one, two = pair(ADAMW8, [(640, 800), (330, 300)], torch.bfloat16, "cuda", folder, 1 << 16)
    alike(one, two)
    assert {type(data.file) for data in two._home.vault.data} == {files.Kvikio}
    leave(two)
    monkeypatch.setattr(files, "KVIKIO", False)
    again = disk(ADAMW8, params, folder, 1 << 16)
    assert again.resume() == 3
    for p, q in zip(params_of(one), params, strict=True):
        q.data.copy_(p)
    alike(one, again, 2, start=5)
    assert {type(data.file) for data in again._home.vault.data} == {files.Plain}


@pytest.mark.gpu
def test_the_device_holds_the_ring_and_the_host_its_buffers(folder: Path) -> None:
    """16M weights: f32 states would be 128 MiB."""
    params = [torch.nn.Parameter(torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16))]
    params[0].grad = torch.ones_like(params[0])
    opt = disk(ADAMW, params, folder, 1 << 21, keep_weights=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        opt.step()
    torch.cuda.synchronize()
    (deck,) = opt._home.decks.values()
    assert torch.cuda.memory_allocated() - before <= 3 * deck.ring.size + 4096 < 1 << 24
    assert deck.slabs.size < 1 << 25
    leave(opt)
    other = disk(ADAMW, [torch.nn.Parameter(torch.zeros_like(params[0]))], folder, 1 << 21)
    assert other.resume() == 3 and torch.equal(params_of(other)[0], params[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"place": "disk"}, r"AdamW8bit: place='disk' needs path, a directory .*, got None"),
        ({"place": "disk", "path": 5}, r"AdamW8bit: place='disk' needs path, a directory .*, got 5"),
        ({"place": "paged", "path": "x"}, r"AdamW8bit: path is of place='disk', and place is 'paged'"),
        (
            {"place": "disk", "path": "x", "resident_bytes": 3},
            r"AdamW8bit: resident_bytes is of place='paged', 'host' or 'auto', and place is 'disk'",
        ),
        ({"place": "paged", "keep_weights": True}, r"AdamW8bit: keep_weights is of place='disk', and place is 'paged'"),
        ({"place": "disk", "path": "x", "during_backward": True}, r"AdamW8bit: during_backward is of place='paged'"),
        ({"place": "disk", "path": "x", "capturable": True}, r"AdamW8bit: capturable is of place='resident'"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rc.optim.AdamW8bit(weights([(4,)], torch.float32, "cpu"), **options)


def test_only_a_disk_is_resumed() -> None:
    opt = rc.optim.PagedAdamW8bit(weights([(4,)], torch.float32, "cpu"))
    with pytest.raises(ValueError, match=r"PagedAdamW8bit\.resume: only place='disk'.*'paged'"):
        opt.resume()


def test_a_torn_stamp_is_no_stamp(folder: Path) -> None:
    opt = disk(ADAMW8, weights([(64, 80)], torch.float32, "cpu"), folder)
    for t in range(3):
        step(opt, t)
    leave(opt)
    assert vault.newest(folder)["generation"] == 3  # type: ignore[index]
    whole = (folder / "stamp.1").read_bytes()
    for torn in (whole[:-1], whole[:10], b"", whole[:40] + b"9" + whole[41:]):
        (folder / "stamp.1").write_bytes(torn)
        assert vault.newest(folder)["generation"] == 2  # type: ignore[index]
