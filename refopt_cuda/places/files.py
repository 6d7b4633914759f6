"""Files of whole, aligned pages: read and written past the page cache, or through it where a file system refuses that.

Every read and write is complete or raises OSError, which names the file. Buffers are page-aligned; sizes and offsets
are multiples of `ALIGN`.
"""

from __future__ import annotations

import errno
import mmap
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ALIGN = 4096
"""Direct reads and writes begin and end at multiples of so many bytes."""
THREADS = 16
"""Of kvikio's pool, which is one for the process and has one thread unless told otherwise."""
KVIKIO = True
"""Whether kvikio is taken where it works."""
REFUSED = (errno.EINVAL, errno.ENOTSUP)
TOLD: set[int] = set()
"""File systems whose refusal of direct reads and writes was reported."""


class File(Protocol):
    """What pages and stamps are kept in."""

    path: Path

    def read(self, out: np.ndarray, at: int) -> None:
        """Fill `out` from byte `at` on."""

    def write(self, data: np.ndarray, at: int) -> None:
        """All of `data` from byte `at` on; it is durable after the next `sync`."""

    def reserve(self, size: int) -> None:
        """Find room for so many bytes; OSError where there is none."""

    def size(self) -> int: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Plain:
    """A file by the system's own calls."""

    def __init__(self, path: Path, direct: bool = True) -> None:
        self.path, self._asked = path, direct and hasattr(os, "O_DIRECT")
        self.direct = self._asked
        try:
            self.fd = self._open()
        except OSError as error:
            if not self.direct or error.errno not in REFUSED:
                raise
            self._refused(error)
            self.fd = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0), 0o666)

    def _refused(self, error: OSError) -> None:
        """From now on through the page cache."""
        self.direct, device = False, os.stat(self.path.parent).st_dev
        if device not in TOLD:
            TOLD.add(device)
            warnings.warn(
                f"place='disk': the file system of {self.path.parent} takes no direct reads and writes "
                f"({error.strerror}): states go through the page cache, which takes time and memory",
                stacklevel=3,
            )

    def read(self, out: np.ndarray, at: int) -> None:
        view, got = memoryview(out), 0
        while got < len(view):
            came = self._try(os.preadv, view[got:], at + got)
            got += came
            if not came or (got < len(view) and got % ALIGN):
                says = f"places.disk: short read: {len(view)} bytes were asked for at {at}, {got} came"
                raise OSError(errno.EIO, says, str(self.path))

    def write(self, data: np.ndarray, at: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            taken = self._try(os.pwritev, view[done:], at + done)
            done += taken
            if not taken:
                says = f"places.disk: short write: {len(view)} bytes were given at {at}, {done} were taken"
                raise OSError(errno.EIO, says, str(self.path))

    def _try(self, call: Callable[..., int], view: memoryview, at: int) -> int:
        try:
            return call(self.fd, [view], at)
        except OSError as error:
            if not self._asked or error.errno not in REFUSED:
                raise OSError(error.errno, f"places.disk: {error.strerror}", str(self.path)) from error
            self._refused(error)
            self._through_the_cache()
            return call(self.fd, [view], at)

    def _through_the_cache(self) -> None:
        import fcntl  # which Windows lacks, and direct reads

        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)

    def reserve(self, size: int) -> None:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.fd, 0, size)
        os.ftruncate(self.fd, size)

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def sync(self) -> None:
        getattr(os, "fdatasync", os.fsync)(self.fd)

    def close(self) -> None:
        os.close(self.fd)


class Kvikio(Plain):
    """The same through kvikio, which cuts a page for a pool of threads; what lies on the disk is the same."""

    def __init__(self, path: Path, direct: bool = True) -> None:
        super().__init__(path, direct)
        try:
            self._kvikio = _kvikio().CuFile(path, "r+")
        except BaseException:
            super().close()
            raise

    def read(self, out: np.ndarray, at: int) -> None:
        came = self._move(self._kvikio.pread, out, at)
        if came != out.nbytes:
            says = f"places.disk: short read: {out.nbytes} bytes were asked for at {at}, {came} came"
            raise OSError(errno.EIO, says, str(self.path))

    def write(self, data: np.ndarray, at: int) -> None:
        done = self._move(self._kvikio.pwrite, data, at)
        if done != data.nbytes:
            says = f"places.disk: short write: {data.nbytes} bytes were given at {at}, {done} were taken"
            raise OSError(errno.EIO, says, str(self.path))

    def _move(self, call: Callable[..., Any], data: np.ndarray, at: int) -> int:
        try:
            return int(call(data, data.nbytes, at).get())
        except RuntimeError as error:  # kvikio's for whatever the system said, and for the end of a file
            raise OSError(errno.EIO, f"places.disk: bytes from {at} on: {error}", str(self.path)) from error

    def close(self) -> None:
        self._kvikio.close()
        super().close()


@cache
def _kvikio() -> Any:
    """The package, with threads and direct reads; None where there is none, or none that works."""
    try:
        import kvikio
        import kvikio.defaults

        kvikio.defaults.set({"num_threads": THREADS, "auto_direct_io_read": True, "auto_direct_io_write": True})
    except (ImportError, OSError, RuntimeError):
        return None
    return kvikio


def opened(path: Path, direct: bool = True, gpu: bool = False) -> File:
    """A file, made where there is none: through kvikio if there is a GPU and kvikio works there."""
    if gpu and direct and KVIKIO and _kvikio() is not None:
        with suppress(RuntimeError):  # it wants more of a file system than the system's own calls do
            return Kvikio(path)
    return Plain(path, direct)


def buffer(size: int) -> np.ndarray:
    """Page-aligned memory."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)[:size]


def sync_folder(folder: Path) -> None:
    """Names of files in it are durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
