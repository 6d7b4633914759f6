"""A step over the `.cuh` functors of one combination, which g++ builds for the host: `step` is called as a twin's is.

Number formats of weights and gradients are instructions on a GPU, not functors: NumPy converts them here. Blocks lie
where the oracle's list of them says.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refopt.codecs import blocks
from refopt_cuda.codecs import Form as Codec
from refopt_cuda.kernels import arguments, build
from refopt_cuda.kernels.arguments import Combination
from refopt_cuda.rules import Form
from tests.kernels.gpu_step import narrow, widen

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC")
NUMBERS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


class Kept(ctypes.Structure):
    """A state's arrays, as functors.cpp has them."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scales", "bounds", "starts")]
    _fields_ += [("blocks", ctypes.c_int64), ("values", ctypes.c_void_p), ("words", ctypes.c_void_p)]


def step(
    rule: str | Form,
    codecs: Sequence[str | Codec],
    p: np.ndarray,
    g: np.ndarray,
    states: Sequence[dict[str, np.ndarray]],
    shape: Sequence[int],
    block: int | Sequence[int],
    scalars: np.ndarray,
    layout: str | None = None,
    *,
    weight: str | Codec | None = None,
    rest: np.ndarray | None = None,
    random: tuple[int, int] | None = None,
) -> None:
    """Update one parameter and its states in place; arguments are those of `step_host.step`."""
    of = arguments.combination(rule, tuple(codecs), p.dtype, g.dtype, weight)
    lengths = tuple(block) if isinstance(block, Sequence) else (block,) * len(codecs)
    cut = arguments.cut(of.codecs, tuple(shape), lengths, layout)
    flat = arguments.arrays(of, cut, p, g, states, rest)
    x, gradient = np.empty(cut.size, np.float32), np.array(widen(flat.g, NUMBERS[of.grad]))
    planes, built = np.empty(len(codecs) * cut.size + 1, np.float32), library(of)
    alive: list[Any] = []
    kept = (Kept * (len(codecs) + 1))()
    for k, (codec, size) in enumerate(zip(of.codecs, lengths, strict=True)):
        kept[k] = _kept(codec, size, tuple(shape), layout, flat.codes[k], flat.scales[k], alive)
    if isinstance(of.weight, str):
        x[:] = widen(flat.p, NUMBERS[of.weight])
    else:
        _call(built.open_weights, cut.size, flat.p, flat.rest, x)
    _call(built.step, cut.size, x, gradient, ctypes.addressof(kept), planes, np.ascontiguousarray(scalars))
    if isinstance(of.weight, str):
        flat.p[:] = narrow(x, NUMBERS[of.weight]).view(flat.p.dtype)
    else:
        word, number = random or (0, 0)
        _call(built.close_weights, cut.size, x, flat.p, flat.rest, ctypes.c_uint64(word), ctypes.c_uint32(number))


def _kept(
    codec: Codec, block: int, shape: tuple[int, ...], layout: str | None, codes: Any, scales: Any, alive: list[Any]
) -> Kept:
    if not codec.scaled:
        return Kept(codes.ctypes.data, None, None, None, 0, None, None)
    bounds = blocks.bounds(shape, block, layout)
    starts = bounds if codec.module.BITS == 8 else blocks.byte_starts(bounds)
    arrays = [codes, scales, bounds, starts, *codec.module.tables(**codec.options)]
    alive.extend(arrays)
    *first, values, words = (a.ctypes.data for a in arrays)
    return Kept(*first, len(bounds) - 1, values, words)


def _call(function: Any, n: int, *given: Any) -> None:
    function.restype = None
    function(ctypes.c_int64(n), *(_argument(a) for a in given))


def _argument(a: Any) -> Any:
    return ctypes.c_void_p(a.ctypes.data if isinstance(a, np.ndarray) else a) if isinstance(a, np.ndarray | int) else a


@cache
def library(of: Combination) -> ctypes.CDLL:
    """The combination's functors and functors.cpp, built. RuntimeError with the compiler's words where it refuses."""
    gxx = shutil.which("g++")
    if gxx is None:
        raise ImportError("no g++ on PATH, which builds the functors for the host")
    folder = Path(tempfile.mkdtemp(prefix="refopt-functors-"))
    source, built = folder / "step.cpp", folder / "step.so"
    source.write_text(text(of), encoding="utf-8")
    done = subprocess.run([gxx, *OPTIONS, str(source), "-o", str(built)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    loaded = ctypes.CDLL(str(built))
    shutil.rmtree(folder, ignore_errors=True)
    return loaded


def text(of: Combination) -> str:
    """Arithmetic, the functors that the combination names, and the loops."""
    weight = [] if isinstance(of.weight, str) else [of.weight]
    stems = dict.fromkeys(["nibbles", "bf16", *(form.stem for form in [*of.codecs, *weight])])
    head = '#include <algorithm>\n#include <cstring>\n#include <type_traits>\n#include "kernels/arith.cuh"'
    parts = ["kernels/random.cuh", *(f"codecs/{stem}.cuh" for stem in stems), f"rules/{of.rule.stem}.cuh"]
    states = ", ".join(f"State<{build.functor(codec)}>" for codec in of.codecs)
    defines = [f"#define RULE {build.functor(of.rule)}", f"#define KEPT std::tuple<{states}>"]
    defines += [f"#define WEIGHT {build.functor(form)}" for form in weight]
    absolute = (f'#include "{build.ROOT / part}"' for part in parts)
    members = "#undef HD\n#define HD inline  // codecs' functions say `static` themselves"
    lines = [head.replace("kernels/", f"{build.ROOT}/kernels/"), members, *absolute, *defines]
    return "\n".join([*lines, SOURCE.read_text(encoding="utf-8")])
