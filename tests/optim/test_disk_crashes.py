"""What a process that is killed and a machine that goes off leave of states in files, and what goes on from there."""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.optim.filing import OnDisk
from refopt_cuda.places import files, vault
from tests.optim.faulty import Dying, PowerLoss, Storage
from tests.optim.on_disk import disk, leave, listed
from tests.optim.pairs import give, snapshot, weights
from tests.optim.placed import ADAMW8, alike, params_of, step

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_decay is coupled"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]

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
