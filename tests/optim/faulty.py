"""Files for `place="disk"` that go wrong: the process is killed within a write, or what was not synced is lost."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np

from refopt_cuda.places import files

SECTOR = 512


class Dying(files.Plain):
    """`kill -9` of this process as soon as `left` more bytes are written, within whatever write they end in."""

    left = 0
    lock = threading.Lock()

    def write(self, data: np.ndarray, at: int) -> None:
        with self.lock:
            Dying.left -= data.nbytes
            if Dying.left < 0:
                fd = os.open(self.path, os.O_WRONLY)
                os.pwrite(fd, data.tobytes()[: data.nbytes + Dying.left], at)
                os.kill(os.getpid(), signal.SIGKILL)
        super().write(data, at)


class PowerLoss(Exception):
    """The machine is off."""


class Storage:
    """All files of a machine that goes off after `left` more writes: of what was not synced by then, sectors are there
    or not as a coin falls. `careless`: files whose `sync` does nothing."""

    def __init__(self, seed: int, left: int, careless: str = "") -> None:
        self.draw, self.left, self.careless = random.Random(seed), left, careless
        self.undo: list[tuple[Path, int, bytes]] = []
        self.lock, self.off = threading.Lock(), False

    def opened(self, path: Path, direct: bool = True, gpu: bool = False) -> Any:
        return Unsafe(self, path)

    def lose(self) -> None:
        """What the disk holds when the machine comes up again."""
        for path, at, old in reversed(self.undo):
            if path.exists():
                with path.open("r+b") as file:
                    for k in range(0, len(old), SECTOR):
                        if self.draw.random() < 0.5:
                            file.seek(at + k)
                            file.write(old[k : k + SECTOR])


class Unsafe(files.Plain):
    """A file of such a machine. What is written is seen by the process at once."""

    def __init__(self, storage: Storage, path: Path) -> None:
        super().__init__(path, direct=False)
        self.storage = storage

    def write(self, data: np.ndarray, at: int) -> None:
        with self.storage.lock:
            self.storage.left -= 1
            self.storage.off |= self.storage.left < 0
            if self.storage.off:
                raise PowerLoss
            old = os.pread(self.fd, data.nbytes, at)
            self.storage.undo.append((self.path, at, old + bytes(data.nbytes - len(old))))
            super().write(data, at)

    def sync(self) -> None:
        with self.storage.lock:
            if self.storage.off:
                raise PowerLoss
            if not (self.storage.careless and self.path.name.startswith(self.storage.careless)):
                self.storage.undo = [entry for entry in self.storage.undo if entry[0] != self.path]
