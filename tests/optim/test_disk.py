"""`place="disk"`: the bits of the resident step, and states in files."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.codecs import WEIGHTS
from refopt_cuda.optim.filing import OnDisk
from refopt_cuda.places import files, lanes
from tests.conftest import DAY, TURNS
from tests.kernels.covering import CODECS, words_of
from tests.optim.on_disk import disk, leave, listed, pair, records_of
from tests.optim.pairs import CASES, Case, give, weights
from tests.optim.placed import ADAMW, ADAMW8, SMALL, alike, params_of, step
from tests.optim.shuffled import ShuffledLanes
from tests.optim.test_checkpoints import through_a_file, twins
from tests.optim.test_every_codec import MORE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_decay is coupled"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]

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
