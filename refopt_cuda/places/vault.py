"""A directory of states: data files, a table beside each, and two stamps; one process at a time works in it.

    pages-0.bin    records, two versions each      pages-0.json   what lies where in them
    stamp.0, .1    the versions of one step each, and the step counts

A data file holds the pages that were made together, and goes when the last stamp does without it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import weakref
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refopt_cuda.places import files
from refopt_cuda.places.files import ALIGN, File
from refopt_cuda.places.records import Filed, Record, Source, Version
from refopt_cuda.places.slabs import up

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HEAD = struct.Struct("<8sIQ")
MAGIC = b"refopt-1"
THREADS = 8
"""That read and write."""


@dataclass(eq=False)
class Data:
    """A data file and its records; `about` is what its table says."""

    name: str
    file: File
    records: list[Record]
    about: dict[str, Any]


@dataclass(eq=False)
class Held:
    """What has to be given back: it outlives the vault by a moment."""

    folder: Path
    lock: int
    made: bool
    pool: ThreadPoolExecutor
    clerk: ThreadPoolExecutor
    files: list[File] = field(default_factory=list)
    keep: bool = True
    process: int = field(default_factory=os.getpid)

    def release(self) -> None:
        """Wait for what is under way, remove the files unless they are to be kept, unlock."""
        if os.getpid() != self.process:  # a fork: the files are its parent's
            return
        self.clerk.shutdown()
        self.pool.shutdown()
        for file in self.files:
            file.close()
        if not self.keep:
            with suppress(FileNotFoundError):
                _clear(self.folder)
                if self.made and not any(self.folder.iterdir()):
                    self.folder.rmdir()
        os.close(self.lock)


class Vault:
    """A directory that is open for one optimizer. Files stay if the process ends.

    folder   made where there is none
    adopt    go on with what is there, which stays until a step is complete; FileNotFoundError where none ever was
    stamp    what to go on with: one of `stamps`; the newest unless told otherwise
    replace  what is there may go; else FileExistsError
    stays    files stay when the optimizer goes; else they go with it
    OSError with `call`, the directory and the reason where it cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        call: str,
        *,
        adopt: bool = False,
        stamp: dict[str, Any] | None = None,
        replace: bool = False,
        stays: bool = False,
        gpu: bool = False,
    ) -> None:
        self.folder, self.gpu, self.generation, self._stays = folder, gpu, 0, stays
        made = not folder.exists()
        with named(call, folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(folder)
        try:
            found = stamp or newest(folder)
            _refuse(folder, found, call, adopt, replace)
            with named(call, folder):
                if stamp in (None, newest(folder)):
                    _clear(folder, found if adopt else None)
                if not adopt:
                    (folder / "stamp.0").touch()  # now, and not in the first step, if nothing can be written here
        except BaseException:
            os.close(lock)
            raise
        pools = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(1)
        self._held = Held(folder, lock, made, *pools)
        self._end = weakref.finalize(self, self._held.release)
        self._end.atexit = False
        self.pool, self._clerk = pools
        self._stamps = [self._open(folder / f"stamp.{k}", direct=False) for k in range(2)]
        self.data: list[Data] = []
        self._commit: Future[Any] | None = None
        self.note: dict[str, Any] = {}
        if adopt and found:
            self._adopt(found)
        self._held.keep = stays or adopt

    def _open(self, path: Path, direct: bool = True) -> File:
        self._held.files.append(files.opened(path, direct, self.gpu))
        return self._held.files[-1]

    def close(self, keep: bool) -> None:
        """Give the directory back, with or without what is in it."""
        self._held.keep = keep
        self._end()

    # ------------------------------------------------------------------------------------------------------------ pages

    def add(self, pages: Sequence[tuple[int, str]], about: dict[str, Any], call: str) -> list[Record]:
        """Room for pages of these sizes, each with what errors are to call it. OSError where there is none."""
        number = 1 + max((int(d.name.split("-")[1]) for d in self.data), default=-1)
        name, records, at = f"pages-{number}", list[Record](), 0
        room = sum(2 * up(size, ALIGN) for size, _ in pages)
        with named(call, self.folder, f"two versions of them take {room:,} bytes"):
            file = self._open(self.folder / f"{name}.bin")
            for size, what in pages:
                records.append(Record(file, at, size, what))
                at = records[-1].end
            try:
                file.reserve(at)
                table = {**about, "records": [[r.at, r.size, r.what] for r in records]}
                _write(self.folder / f"{name}.json", json.dumps(table).encode())
                files.sync_folder(self.folder)
            except BaseException:
                self._drop(Data(name, file, [], {}))
                raise
        self.data.append(Data(name, file, records, about))
        return records

    def check(self, call: str) -> None:
        """OSError where a file has lost its end: before anything is stepped."""
        for data in self.data:
            whole = max((r.end for r in data.records), default=0)
            if data.file.size() < whole:
                says = f"{call}: short read: {whole} bytes of states were kept here, {data.file.size()} are left"
                raise OSError(errno.EIO, says, str(data.file.path))

    def _drop(self, data: Data) -> None:
        self._held.files.remove(data.file)
        data.file.close()
        for end in (".bin", ".json"):
            (self.folder / f"{data.name}{end}").unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------------------------------- stamps

    def commit(self, records: Sequence[Record], sources: Sequence[Source], note: dict[str, Any]) -> None:
        """Stamp these records, and those that these sources read, as a complete step once they are written."""
        self.wait()
        generation = self.generation + 1
        stamp = self._stamps[generation % 2]
        note = {"generation": generation, **note}
        self._commit = self._clerk.submit(_commit, stamp, [*self.data], [*records], [*sources], note)

    def wait(self) -> None:
        """Until the last commit is durable; data files that it does without go. OSError, once, where it is not."""
        commit, self._commit = self._commit, None
        if commit is None:
            return
        unused = commit.result()
        self.generation += 1
        self._held.keep = self._stays
        for data in unused:
            self.data.remove(data)
            self._drop(data)

    def verify(self) -> None:
        """OSError where a page that its stamp names is not what was written."""
        for record in (r for data in self.data for r in data.records if r.latest):
            record.load(files.buffer(record.room))

    def go_back(self) -> None:
        """Forget the newer stamp, which is not gone on with, and its pages."""
        other = self._stamps[(self.generation + 1) % 2]
        other.write(np.zeros(HEAD.size, np.uint8), 0)
        other.sync()
        _clear(self.folder, self.note)

    def _adopt(self, found: dict[str, Any]) -> None:
        """The records of a stamp."""
        self.generation, self.note = found["generation"], found
        for name, versions in found["pages"]:
            about = json.loads((self.folder / f"{name}.json").read_bytes())
            file = self._open(self.folder / f"{name}.bin")
            records = [Record(file, *row) for row in about["records"]]
            for record, version in zip(records, versions, strict=True):
                record.kept = record.latest = Version(*version) if version else None
            self.data.append(Data(name, file, records, about))


class named:
    """OSErrors within it say which call and which directory."""

    def __init__(self, call: str, folder: Path, need: str = "") -> None:
        self.call, self.folder, self.need = call, folder, need

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, OSError):
            return
        says = f"{self.call}: path={str(self.folder)!r} cannot hold the states: {error.strerror or error}"
        if self.need and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            says += f"; {self.need}, {shutil.disk_usage(self.folder).free:,} are free. Nothing was stepped"
        raise OSError(error.errno, says) from error


def _locked(folder: Path) -> int:
    """The directory with a lock that ends with this process. BlockingIOError."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "this system has no flock, which keeps others out")
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise BlockingIOError(
            error.errno, "another optimizer keeps its states there, maybe of another process"
        ) from None
    return lock


def _refuse(folder: Path, found: dict[str, Any] | None, call: str, adopt: bool, replace: bool) -> None:
    if adopt and found is None:
        raise FileNotFoundError(errno.ENOENT, f"{call}: path={str(folder)!r} holds no complete step")
    if found is not None and not adopt and not replace:
        steps = max(found["steps"].values(), default=0)
        raise FileExistsError(
            errno.EEXIST,
            f"{call}: path={str(folder)!r} holds the states of step {steps} of an earlier run: resume() goes on with "
            "them, load_state_dict() replaces them; to begin anew, empty the directory or name another",
        )


def newest(folder: Path) -> dict[str, Any] | None:
    """What the newest whole stamp of a directory says; None where there is none."""
    return next(iter(stamps(folder)), None)


def stamps(folder: Path) -> list[dict[str, Any]]:
    """The whole stamps of a directory, the newest first. Pages of an older one may have been written over since."""
    found = [stamp for k in range(2) if (stamp := _read(folder / f"stamp.{k}"))]
    return sorted(found, key=lambda stamp: -stamp["generation"])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(whole) < HEAD.size:
        return None
    magic, crc, size = HEAD.unpack_from(whole)
    text = whole[HEAD.size : HEAD.size + size]
    return json.loads(text) if magic == MAGIC and len(text) == size and zlib.crc32(text) == crc else None


def _commit(
    stamp: File, every: list[Data], records: list[Record], sources: list[Source], note: dict[str, Any]
) -> list[Data]:
    """Write a stamp when what it names is durable; returns the data files that it does not name."""
    for record in records:
        if record.writing is not None:
            record.writing.result()
    files_of = {id(r.file) for r in _reached(records, sources)}
    used = [data for data in every if id(data.file) in files_of]
    for data in used:
        data.file.sync()
    text = json.dumps({**note, "pages": [[d.name, [r.latest for r in d.records]] for d in used]}).encode()
    stamp.write(np.frombuffer(HEAD.pack(MAGIC, zlib.crc32(text), len(text)) + text, np.uint8), 0)
    stamp.sync()
    for record in (r for data in used for r in data.records):
        record.kept, record.writing = record.latest, None
    return [data for data in every if data not in used]


def _write(path: Path, data: bytes) -> None:
    file = files.opened(path, direct=False)
    file.write(np.frombuffer(data, np.uint8), 0)
    file.sync()
    file.close()


def _clear(folder: Path, but: dict[str, Any] | None = None) -> None:
    """Remove what a vault keeps there, stamps first, and nothing else; not what a stamp names."""
    kept = {name for name, _ in but["pages"]} | {"stamp"} if but else set()
    names = [p for p in folder.iterdir() if re.fullmatch(r"stamp\.[01]|pages-\d+\.(bin|json)", p.name)]
    for path in sorted(names, key=lambda p: not p.name.startswith("stamp")):
        if path.stem not in kept:
            path.unlink()


def _reached(records: Iterable[Record], sources: Iterable[Source]) -> set[Record]:
    """These records, and all that bytes of unwritten ones or of these sources come from."""
    seen, todo = set[Record](), list(records)
    todo += [e.record for source in sources if isinstance(source, Filed) for e in source.extents]
    while todo:
        record = todo.pop()
        if record in seen:
            continue
        seen.add(record)
        more = [s for *_, s, _ in record.sources if isinstance(s, Filed)]
        todo += [e.record for source in more for e in source.extents]
    return seen
