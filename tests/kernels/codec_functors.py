"""The functors of block codecs over NumPy arrays: on the host, built by g++, or on a GPU, built by NVRTC."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from refopt_cuda.kernels import build
from tests.codec_points import FORMS, MODULES, CodecForm

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-Wall")
Array = np.ndarray


def type_of(form: CodecForm) -> str:
    """The C++ name: options are the template's arguments."""
    words = [str(c).lower() if isinstance(c, bool) else c.upper() for c in form.options.values()]
    return f"{form.stem}<{', '.join(words)}>" if words else form.stem


def text() -> str:
    """Arithmetic, every codec, and the loops."""
    parts = ["kernels/arith.cuh", "codecs/nibbles.cuh", *(f"codecs/{stem}.cuh" for stem in MODULES)]
    head, *codecs = [(build.ROOT / part).read_text(encoding="utf-8").replace("#pragma once", "") for part in parts]
    members = "#ifndef __CUDACC_RTC__\n#undef HD\n#define HD inline\n#endif"  # they say `static` themselves
    calls = [f"CODEC({form.name}, {type_of(form)})" for form in FORMS]
    return "\n".join([head, members, *codecs, SOURCE.read_text(encoding="utf-8"), *calls, ""])


class Functors:
    """One call for each function of a codec; arrays of rows that share a scale."""

    def _call(self, name: str, *given: Any) -> None:
        raise NotImplementedError

    def constants(self, form: CodecForm) -> dict[str, int]:
        out = np.zeros(7, np.uint32)
        self._call(f"{form.name}_constants", out)
        names = ("BITS", "ZERO", "ROWS", "WORDS", "SCALE_BITS", "FACTOR_OF_SCALE", "SCALED")
        return dict(zip(names, out.tolist(), strict=True))

    def encode(self, form: CodecForm, rows: Array, factors: Array) -> Array:
        """Bytes of each row."""
        per = 32 // form.module.BITS
        codes = np.zeros((rows.shape[0], rows.shape[1] // per), np.uint32)
        inv = np.repeat(factors, codes.shape[1])
        self._call(f"{form.name}_encode", codes.size, np.ascontiguousarray(rows), inv, *tables(form), codes)
        return codes.view(np.uint8)

    def decode(self, form: CodecForm, codes: Array, scales: Array) -> Array:
        """float32 of rows of bytes."""
        words = np.ascontiguousarray(codes).view(np.uint32)
        x = np.zeros((words.shape[0], words.shape[1] * 32 // form.module.BITS), np.float32)
        self._call(f"{form.name}_decode", words.size, words, np.repeat(scales, words.shape[1]), *tables(form), x)
        return x

    def scale(self, form: CodecForm, amax: Array) -> Array:
        out = np.zeros(amax.size, np.float32)
        self._call(f"{form.name}_scale", amax.size, amax, out)
        return out

    def narrow(self, form: CodecForm, s: Array) -> Array:
        out = np.zeros(s.size, np.uint32)
        self._call(f"{form.name}_narrow", s.size, s, out)
        return out.astype(np.uint16)

    def widen(self, form: CodecForm, w: Array) -> Array:
        out = np.zeros(w.size, np.float32)
        self._call(f"{form.name}_widen", w.size, w.astype(np.uint32), out)
        return out


def tables(form: CodecForm) -> tuple[Array, Array]:
    """The codec's tables; one unused entry where there is none."""
    values, words = form.module.tables(**form.options)
    return np.append(values, np.float32(0)), np.append(words, np.uint32(0))


class Host(Functors):
    def __init__(self, gxx: str, folder: Path) -> None:
        source, library = folder / "codecs.cpp", folder / "codecs.so"
        source.write_text(text(), encoding="utf-8")
        done = subprocess.run([gxx, *OPTIONS, str(source), "-o", str(library)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.built = ctypes.CDLL(str(library))

    def _call(self, name: str, *given: Any) -> None:
        function = getattr(self.built, name)
        function.restype = None
        function(*(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in given))


class Device(Functors):
    """Compiled as CuPy compiles the kernels: with -ftz=true."""

    def __init__(self) -> None:
        import cupy

        self.cupy, self.module = cupy, cupy.RawModule(code=text(), options=build.OPTIONS)

    def _call(self, name: str, *given: Any) -> None:
        args = tuple(self.cupy.asarray(a) if isinstance(a, np.ndarray) else np.int64(a) for a in given)
        shape = ((256,), (256,)) if len(given) > 1 else ((1,), (1,))
        self.module.get_function(name)(*shape, args)
        given[-1][...] = args[-1].get()
