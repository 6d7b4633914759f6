"""Text as bytes: where it comes from, what is held out, the batches, and what simpler models make of it."""

from __future__ import annotations

import hashlib
import lzma
import pydoc_data.topics
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from refopt_cuda.train.errors import InputError

STRETCHES = 20
"""The text is cut into this many equal stretches; the last tenth of each is held out."""

NOT_TEXT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """A text as bytes (uint8), and the sentence that says what it is."""

    name: str
    data: np.ndarray

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data.tobytes()).hexdigest()

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) bytes: the last tenth of each of 20 equal stretches is held out."""
        length = len(self.data) // STRETCHES
        held = np.zeros(len(self.data), bool)
        held[: length * STRETCHES].reshape(STRETCHES, length)[:, length - length // 10 :] = True
        return self.data[~held], self.data[held]


def standard_library() -> Text:
    """The prose and the sources that every Python interpreter ships: nothing is downloaded."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in root.rglob("*.py") if not NOT_TEXT & set(f.relative_to(root).parts))
    prose = [topic.encode() for _, topic in sorted(pydoc_data.topics.topics.items())]
    data = b"\n".join([*prose, *(f.read_bytes() for f in files if f.name != "topics.py")])
    version = sysconfig.get_python_version()
    return Text(f"Python {version} standard library: {len(prose)} topics, {len(files)} sources", _bytes(data))


def read(paths: Sequence[Path]) -> Text:
    """UTF-8 files, one after the other. Raises InputError that names the file at fault."""
    parts = [utf8(path, "--text") for path in paths]
    return Text(", ".join(path.name for path in paths), _bytes(b"\n".join(parts)))


def utf8(path: Path, option: str) -> bytes:
    """The bytes of a file of text. Raises InputError that names the option, the file and what is wrong with it."""
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except IsADirectoryError:
        raise InputError(f"{option} {path}: is a folder; name the files in it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{option} {path}: {(error.strerror or str(error)).lower()}") from None
    if not data:
        raise InputError(f"{option} {path}: is empty")
    return data


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def starts(size: int, context: int, count: int, seed: int, step: int) -> np.ndarray:
    """Where the windows of one step's batch begin: a function of seed and step alone; any step can be redone."""
    draw = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    return draw.integers(0, size - context, count)


def windows(data: np.ndarray, at: np.ndarray, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [len(at), context]: bytes, and the byte that follows each."""
    cut = torch.from_numpy(data[at[:, None] + np.arange(context + 1)].astype(np.int64))
    return cut[:, :-1], cut[:, 1:]


def held_out_starts(size: int, context: int, most: int) -> np.ndarray:
    """At most `most` windows that do not overlap, evenly spread over the held-out text."""
    room = (size - 1) // context
    return np.linspace(0, room - 1, min(room, most)).astype(np.int64) * context


def xz_bits(data: np.ndarray) -> float:
    """Bits per byte of `xz -9e` on the same bytes."""
    return 8 * len(lzma.compress(data.tobytes(), preset=9 | lzma.PRESET_EXTREME)) / len(data)


def trigram_bits(train: np.ndarray, held: np.ndarray, at: np.ndarray, context: int, weight: float = 5.0) -> float:
    """Bits per byte of a byte trigram model on the bytes that the windows `at` of the held-out text ask for.

    Counts of one, two and three bytes, each order smoothed by `weight` pseudo-counts of the order below.
    """
    a = train.astype(np.int64)
    three = np.bincount(a[:-2] << 16 | a[1:-1] << 8 | a[2:], minlength=1 << 24).reshape(256, 256, 256)
    two = three.sum(0)
    one = (two.sum(0) + 1) / (two.sum() + 256)
    p2 = (two + weight * one) / (two.sum(1, keepdims=True) + weight)
    target = (at[:, None] + np.arange(1, context + 1)).reshape(-1)
    target = target[target >= 2]
    x, y, z = (held[target - k].astype(np.int64) for k in (2, 1, 0))
    p3 = (three[x, y, z] + weight * p2[y, z]) / (three.sum(2)[x, y] + weight)
    return float(-np.log2(p3).mean())
