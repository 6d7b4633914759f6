"""One source text for each kernel that is asked for: functors and template joined, names of the combination in front.

The text is complete (nothing is included at compile time), so that a cache keyed by the text is right, and so that
NVRTC compiles it anywhere: CuPy on a machine with a driver, `cuda.bindings.nvrtc` where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from refopt_cuda.rules import Form

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("--std=c++17", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-lineinfo", "-default-device")
NUMBERS = ("float32", "bfloat16", "float16")
CODECS = {"f32": False, "bf16": False, "int8_linear": True, "dynamic8": True}
"""codec of a state -> whether it comes with a sign and without"""
TABLES = 65536 + 2 * 2945 * 4
"""Bytes of shared memory that the dynamic map's two tables take."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: a form of a rule, a (codec, signed) for each state, number formats, block size and launch shape."""

    rule: Form
    codecs: tuple[tuple[str, bool], ...]
    param: str
    grad: str
    block: int = 256
    tensors: int = 512
    rows: int = 1

    @property
    def lookups(self) -> bool:
        return any(stem == "dynamic8" for stem, _ in self.codecs)

    @property
    def coded(self) -> bool:
        return any(CODECS[stem] for stem, _ in self.codecs)

    @property
    def threads(self) -> int:
        """Threads of the one block on a multiprocessor. The dynamic map keeps the arithmetic busy: as many warps as get
        72 registers a thread (80 with three states). What waits for memory alone reaches it better with fewer."""
        if not self.coded or self.param == "float32":
            return 640
        return 896 if len(self.codecs) < 3 else 768

    @property
    def shared(self) -> int:
        return TABLES if self.lookups else 0

    def __post_init__(self) -> None:
        if len(self.codecs) != len(self.rule.states):
            raise ValueError(f"Kernel: {len(self.codecs)} codecs for {self.rule.name}, which keeps {self.rule.states}")
        for stem, _ in self.codecs:
            if stem not in CODECS:
                raise ValueError(f"Kernel: no codec {stem!r} for a state on the GPU; there are {', '.join(CODECS)}")
        for number in (self.param, self.grad):
            if number not in NUMBERS:
                raise ValueError(f"Kernel: no number format {number!r}; there are {', '.join(NUMBERS)}")


@cache
def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8").replace("#pragma once", "")


def functor(stem: str, signed: bool) -> str:
    """The C++ name of a codec's functor."""
    return f"{stem}<{str(signed).lower()}>" if CODECS[stem] else stem


def rule_type(form: Form) -> str:
    """The C++ name of a rule's form: its choices are the template's arguments."""
    words = [str(c).lower() if isinstance(c, bool) else c.upper() for c in form.choices]
    return f"{form.stem}<{', '.join(words)}>" if words else form.stem


def functors(rule: str, codecs: tuple[str, ...]) -> str:
    """Arithmetic, codecs and the rule: plain C++ that g++ compiles as well."""
    parts = ["kernels/arith.cuh", *(f"codecs/{stem}.cuh" for stem in codecs), f"rules/{rule}.cuh"]
    return "\n".join(_text(part) for part in parts)


def source(kernel: Kernel) -> str:
    """The whole text of one kernel; its entry is `refopt_step`."""
    codecs = tuple(dict.fromkeys([stem for stem, _ in kernel.codecs] + ["bf16", "dynamic8"]))
    names = {
        "RULE": rule_type(kernel.rule),
        "CODECS": ", ".join(functor(*c) for c in kernel.codecs),
        "PARAM": kernel.param,
        "GRAD": kernel.grad,
        "BLOCK": kernel.block,
        "THREADS": kernel.threads,
        "TENSORS": kernel.tensors,
        "ROWS": kernel.rows,
        "LOOKUPS": int(kernel.lookups),
        "AHEAD": int(kernel.coded),
    }
    defines = "\n".join(f"#define {name} {value}" for name, value in names.items())
    return "\n".join(
        [functors(kernel.rule.stem, codecs), defines, _text("kernels/formats.cuh"), _text("kernels/step.cu")]
    )
