"""Bad disks, full disks, and file systems that refuse: what is named, and what is not stepped."""

from __future__ import annotations

import copy
import errno
import fcntl
import gc
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refopt_cuda.places import files
from tests.optim.on_disk import disk, leave, listed, pair, records_of
from tests.optim.pairs import give, snapshot, unchanged, weights
from tests.optim.placed import ADAMW8, alike, pages_of, params_of, step

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_decay is coupled"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


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
