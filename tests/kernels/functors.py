"""The CUDA functors on the host: g++ builds the .cuh files into a library, these calls take NumPy arrays."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

from refopt_cuda.codecs import forms as codec_forms
from refopt_cuda.kernels import build
from refopt_cuda.rules import RULES, Form, forms

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC")
WORDS = {"f32": np.float32, "bf16": np.uint16}
Array = np.ndarray


def compiled(gxx: str, source: Path, folder: Path, options: tuple[str, ...] = OPTIONS) -> ctypes.CDLL:
    """`source` as a loaded library; the compiler's own words where it refuses."""
    library = folder / f"{source.stem}.so"
    every = [form for stem in RULES for form in forms(stem)]
    (folder / "rules.inc").write_text("".join(f'#include "rules/{stem}.cuh"\n' for stem in RULES))
    (folder / "forms.inc").write_text("".join(f"RULE({f.name}, {build.functor(f)})\n" for f in every))
    command = [gxx, *options, f"-I{build.ROOT}", f"-I{folder}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def tables(codec: str) -> Array:
    """What a codec looks up: its values, then the words of its encode table."""
    form = next(form for form in codec_forms(codec.rpartition("_")[0]) if form.name == codec)
    values, words = form.module.tables(**form.options)
    return np.concatenate([values.view(np.uint32), words])


class Functors:
    """One call for each functor, named as in the .cuh files, with `_signed` or `_unsigned` for a block codec."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.built = library

    def _call(self, name: str, n: int, *given: Array | float) -> None:
        function = getattr(self.built, name)
        function.restype = None
        function(
            ctypes.c_int64(n),
            *(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_float(a) for a in given),
        )

    def number(self, name: str) -> int:
        """A constant of a functor: `adamw_states`, `adamw_scalars`, `dynamic8_signed_zero` ..."""
        function = getattr(self.built, name)
        function.restype = ctypes.c_uint32
        return int(function())

    def step(self, form: Form, p: Array, g: Array, states: list[Array], row: Array) -> tuple[Array, list[Array]]:
        """The rule over flat float32 arrays; new arrays."""
        assert len(states) == self.number(f"{form.name}_states") and row.size == self.number(f"{form.name}_scalars")
        p, planes = p.copy(), np.array(states, np.float32).reshape(len(states), p.size)
        self._call(f"{form.name}_step", p.size, p, np.ascontiguousarray(g), planes, row)
        return p, list(planes)

    def scale(self, codec: str, absmax: float) -> np.float32:
        """The scale that is stored for a block's largest magnitude."""
        function = getattr(self.built, f"{codec}_scale")
        function.restype = ctypes.c_float
        return np.float32(function(ctypes.c_float(absmax)))

    def encode(self, codec: str, x: Array, inv: np.float32) -> Array:
        """Codes of a flat float32 array as bytes; four elements a word, zeros behind the last."""
        padded = np.pad(x, (0, -x.size % 4))
        codes = np.zeros(padded.size, np.uint8)
        self._call(f"{codec}_encode", padded.size, padded, float(inv), tables(codec), codes)
        return codes[: x.size]

    def decode(self, codec: str, codes: Array, scale: np.float32) -> Array:
        """float32 values of a flat array of bytes, a multiple of four."""
        x = np.zeros(codes.size, np.float32)
        self._call(f"{codec}_decode", codes.size, codes, float(scale), tables(codec), x)
        return x

    def store(self, codec: str, x: Array) -> Array:
        """Words of an element codec."""
        codes = np.zeros(x.size, WORDS[codec])
        self._call(f"{codec}_store", x.size, x, codes)
        return codes

    def load(self, codec: str, codes: Array) -> Array:
        """float32 values of an element codec's words."""
        x = np.zeros(codes.size, np.float32)
        self._call(f"{codec}_load", codes.size, codes, x)
        return x

    def signs(self, x: Array) -> Array:
        out = np.zeros(x.size, np.float32)
        self._call("signs", x.size, x, out)
        return out
