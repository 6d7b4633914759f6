"""NVRTC compiles the kernels where there is no driver: every functor with every codec and number format.

CuPy adds -ftz=true to every compilation, and so do these tests: the arithmetic must not obey it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from refopt_cuda.codecs import WEIGHTS, named
from refopt_cuda.kernels import build
from refopt_cuda.kernels.step_cuda import ROWS, SIZES, Launch, Tensor
from refopt_cuda.rules import RULES, Form, forms
from tests.kernels.covering import CODECS, WEIGHT_FORMATS, covering

nvrtc: Any = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings: pip install 'refopt[test]'")
try:
    SUPPORTED = set(nvrtc.nvrtcGetSupportedArchs()[1])
except RuntimeError as error:
    pytest.skip(f"needs NVRTC (pip install nvidia-cuda-nvrtc): {error}", allow_module_level=True)

ARCHITECTURES = [a for a in (75, 80, 86, 89, 90, 100, 120) if a in SUPPORTED]
OPTIONS = (*build.OPTIONS, "-ftz=true", "--ptxas-options=-v")
UNUSED = "177"
"""The one warning that is allowed: a helper that this combination of codecs has no use for."""

EXACT = re.compile(
    r"(add|sub|mul|div|fma|sqrt)\.rn\.f32|mul\.rn\.sat\.f32|(max|max\.NaN|abs|neg|copysign|selp|mov)\.f32|(ld|st)(\.\S+)?\.f32"
)
CONVERSIONS = re.compile(r"cvt\.f32\.f16|cvt\.rn\.(f16|bf16x2)\.f32|cvt\.rn\.satfinite\.e(4m3|5m2)x2\.f32")
CORES = {"rcp.approx.ftz.f32", "rsqrt.approx.ftz.f32"}
SPILLED = {100: 320, 120: 320}
"""Bytes a thread that ptxas may spill in the sample below where 72 registers are too few for it; elsewhere none."""
RAGGED = 256
"""The same where tiles of ragged rows keep three states until the next tile."""
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one thread block can have (CUDA programming guide, technical specifications)."""
FLAGS = {stem for stem, rule in RULES.items() if "coupled" in rule.SCALARS}
"""Rules whose scalars hold flags, 0 or 1, that a step compares with 0."""


class Compiled(NamedTuple):
    """PTX and the log, which holds what ptxas says of registers and spills."""

    ptx: str
    log: str


def compile_text(text: str, architecture: int, options: tuple[str, ...] = OPTIONS) -> Compiled:
    """One source for one real architecture; the log is the message where it does not compile."""
    flags = [flag.encode() for flag in (*options, f"-arch=sm_{architecture}")]
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), b"step.cu", 0, [], [])
    assert status == 0, status
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    assert status == 0, f"sm_{architecture}: {status.name}\n{log}"
    ptx = _read(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    nvrtc.nvrtcDestroyProgram(program)
    return Compiled(ptx, log)


def _read(size: Any, get: Any, program: Any) -> str:
    buffer = bytearray(size(program)[1])
    get(program, buffer)
    return buffer.rstrip(b"\0").decode()


@cache
def compiled(kernel: build.Kernel, architecture: int) -> Compiled:
    return compile_text(build.source(kernel), architecture)


def spilled(log: str) -> int:
    """Bytes that ptxas spills, stores and loads of the kernel and of its one function call together."""
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert len(found) >= 2, f"ptxas says nothing of spills: {log}"
    return sum(map(int, found))


def kernel_of(form: Form, codecs: tuple[str, ...], weight: str, grad: str, rows: int = 1) -> build.Kernel:
    """The kernel that a launch would ask for: a state that is never negative has codes without a sign."""
    coded = tuple(named(c, never) for c, (_, never) in zip(codecs, form.states, strict=True))
    return build.Kernel(form, coded, named(weight) if weight.split(".")[0] in WEIGHTS else weight, grad, rows=rows)


def plain(stem: str) -> Form:
    """The plainest form that keeps a state."""
    return next(form for form in forms(stem) if form.states)


COVERING = [(case, ARCHITECTURES[k % len(ARCHITECTURES)]) for k, case in enumerate(covering())]


def foreign(ptx: str, flags: bool) -> list[str]:
    """float32 instructions that round, flush or compare in a way that no functor asked for, and all float64."""
    found = []
    for line in re.split(r"[\n;{}]+", ptx):
        name, operands = [*line.split(None, 1), "", ""][:2]
        if name.startswith((".", "//")) or not re.search(r"\.f(32|64)", name):
            continue
        if name.startswith("setp.") and name.endswith(".f32"):
            allowed = comparable(operands, flags)
        else:
            allowed = bool(EXACT.fullmatch(name) or CONVERSIONS.fullmatch(name)) or name in CORES
        if not allowed:
            found.append(line.strip())
    return found


def comparable(operands: str, flags: bool) -> bool:
    """Whether flushing cannot change a comparison: a number with itself or a normal constant, or a flag with 0."""
    _, a, b = (operand.strip() for operand in operands.split(","))
    if b.startswith("0f"):
        exponent = int(b[2:], 16) >> 23 & 255
        return exponent > 0 or (flags and b == "0f00000000")
    return a == b


@pytest.mark.parametrize("k", range(len(COVERING)), ids=lambda k: f"{COVERING[k][0]}-sm_{COVERING[k][1]}")
def test_a_kernel_compiles_and_its_arithmetic_does_not_obey_the_flags(k):
    """Every second one with the tiles of ragged rows, where it may have them."""
    case, architecture = COVERING[k]
    kernel = replace(case.kernel, ragged=case.kernel.tiled and k % 2 == 1)
    ptx, log = compiled(kernel, architecture)
    assert set(re.findall(r"(?:warning|error) #(\d+)", log)) <= {UNUSED}, log
    assert not foreign(ptx, case.form.stem in FLAGS)
    assert ".f64" not in ptx
    assert spilled(log) <= max(SPILLED.get(architecture, 0), RAGGED * kernel.ragged), log
    assert len(re.findall(r"\bmul\.rn\.f32", ptx)) >= 8, "the rule itself must be in there"
    assert len(re.findall(r"\.entry\s+refopt_step", ptx)) == 1


def test_the_covering_set_holds_every_pair_and_every_form():
    pairs: Counter[Any] = Counter()
    for case, architecture in COVERING:
        ours = [case.form.stem, *case.codecs, ("p", case.weight), ("g", case.grad), case.block, ("rows", case.rows)]
        pairs.update(product(ours, ours))
        pairs.update([(case.form.stem, architecture), case.form])
    print(f"{len(COVERING)} kernels compiled for {', '.join(f'sm_{a}' for a in ARCHITECTURES)}")
    weights, grads = [("p", w) for w in WEIGHT_FORMATS], [("g", g) for g in build.NUMBERS]
    for one, other in combinations([[*RULES], CODECS, weights, grads], 2):
        assert not set(product(one, other)) - set(pairs)
    assert not set(product([*RULES], ARCHITECTURES)) - set(pairs)
    assert not {form for stem in RULES for form in forms(stem)} - set(pairs)


def test_plain_operators_would_obey_the_flags():
    """The reason for arithmetic by name, and proof that the law above can fail."""
    head = 'extern "C" __global__ void f(float* x) {'
    ptx = compile_text(f"{head} x[0] = x[0] * x[1] + x[2]; x[3] = sqrtf(x[0]); }}", 90).ptx
    assert {line.split()[0] for line in foreign(ptx, False)} >= {"mul.rn.ftz.f32", "add.rn.ftz.f32", "sqrt.rn.ftz.f32"}
    ptx = compile_text(f"{head} x[0] = x[1] != 0.0f && x[2] < x[3]; x[4] = x[4] * 1.1; }}", 90).ptx
    names = [line.split(None, 1)[0] for line in foreign(ptx, False)]
    assert len([n for n in names if n.startswith("setp.")]) == 2, names
    assert any(n.endswith(".f64") for n in names), names


@pytest.mark.parametrize(("rows", "grad"), list(product((1, 8), build.NUMBERS)))
@pytest.mark.parametrize("param", build.NUMBERS)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_a_kernel_of_8_bit_states_fits_a_multiprocessor_and_spills_nothing(rule, param, grad, rows):
    form = plain(rule)
    kernel = kernel_of(form, ("dynamic8",) * len(form.states), param, grad, rows)
    log = compiled(kernel, 90).log
    assert not spilled(log), log
    (registers,) = map(int, re.findall(r"Used (\d+) registers", log))
    assert registers * kernel.threads <= 65536


@pytest.mark.parametrize("codec", ["dynamic8", "q4", "fp8"])
def test_the_tiles_of_ragged_rows_take_hardly_more_registers_than_there_are(codec):
    kernel = replace(kernel_of(plain("adamw"), (codec, codec), "bfloat16", "bfloat16"), ragged=True)
    assert spilled(compiled(kernel, 90).log) <= 64


@pytest.mark.parametrize(("block", "ragged"), [(1, False), (64, True), (2048, False)])
def test_other_blocks_compile(block, ragged):
    kernel = kernel_of(plain("adamw"), ("dynamic8", "int8_linear"), "bfloat16", "float16", 8)
    kernel = replace(kernel, blocks=(block, block), ragged=ragged)
    ptx, log = compiled(kernel, 90)
    assert set(re.findall(r"(?:warning|error) #(\d+)", log)) <= {UNUSED}, log
    assert not foreign(ptx, False) and spilled(log) <= RAGGED * ragged


def layout(name: str, record: np.dtype, inside: Mapping[str, str] = MappingProxyType({})) -> str:
    """C++ that compiles only where `name` has the size and the offsets of a NumPy record."""
    lines = [f'static_assert(sizeof({name}) == {record.itemsize}, "size");']
    for field, (_, offset, *_) in (record.fields or {}).items():
        lines.append(f'static_assert(__builtin_offsetof({name}, {inside.get(field, field)}) == {offset}, "{field}");')
    return "\n".join(lines)


LAIR = {"p": "at.p", "rest": "at.rest"}


@pytest.mark.parametrize("states", [(), ("f32",), ("f32", "f32")], ids=len)
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("size", SIZES)
def test_a_launch_packs_its_arguments_as_the_kernel_reads_them(size, rows, states):
    launch = Launch(("sgd", "lion", "adamw")[len(states)], states, "float32", "float32")
    args = launch._args_type(size, rows)
    assert args.itemsize <= 32764, "what a launch can take since CUDA 12.1"
    table, *_ = launch._table([Tensor(0, ((0, 0),) * len(states), ())])
    text = build.source(launch._kernel(size, rows))
    compile_text(f"{text}\n{layout('Args', args)}\n{layout('Tensor', table.dtype, LAIR)}", 90)
    moved = np.dtype([("units", "u4"), ("count", "u4")])
    with pytest.raises(AssertionError, match="count"):
        compile_text(f"{text}\n{layout('Args', moved)}", 90)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tables_fit_the_shared_memory_of_every_architecture_but_turing(architecture):
    """A Turing GPU refuses a launch with the dynamic map: its kernels compile, but their tables find no room."""
    kernel = kernel_of(plain("lion"), ("dynamic8",), "float32", "float32")
    assert (kernel.shared <= SHARED[architecture] * 1024) == (architecture > 75)
    assert kernel_of(plain("lion"), ("int8_linear",), "float32", "float32").shared == 0
