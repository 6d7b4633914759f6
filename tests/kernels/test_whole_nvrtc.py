"""NVRTC compiles the passes of whole.cu where there is no driver: every form of every rule, no spills."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from refopt_cuda.kernels import rows_cuda
from refopt_cuda.kernels import whole_build as build
from refopt_cuda.kernels.whole_cuda import SIZES, args_type, tensor_type
from refopt_cuda.kernels.whole_rules import WHOLE, Form, forms
from tests.kernels.test_nvrtc import ARCHITECTURES, UNUSED, compile_text, foreign, layout, spilled

FORMS = [form for stem in WHOLE for form in forms(stem)]
NUMBERS = list(product(build.NUMBERS, build.NUMBERS))
CASES = [
    (form, *NUMBERS[(7 * k + j) % len(NUMBERS)], architecture)
    for k, form in enumerate(FORMS)
    for j, architecture in enumerate(ARCHITECTURES)
]
F64 = re.compile(
    r"(add|mul|sub|div|sqrt|fma)\.rn\.f64|cvt\.f64\.f32|cvt\.rn\.f32\.f64|cvt\.rn\.f64\.u(32|64)|cvt\.rn\.f64\.s64"
    r"|setp\.\w+\.f64|(selp|mov|max|min|neg|abs)\.f64|(ld|st)(\.\S+)?\.f64"
)
"""float64 of the canonical sums: each rounds by itself, and no flag reaches it."""
HARMLESS = re.compile(r"min\.f32|setp\.(nan|num)\.ftz\.f32")
"""A subnormal is no NaN, flushed or not."""


def name(value: object) -> str:
    return value.name if isinstance(value, Form) else str(value)


@pytest.mark.parametrize(("form", "weight", "grad", "architecture"), CASES, ids=name)
def test_the_passes_compile_without_spills_and_obey_no_flag(
    form: Form, weight: str, grad: str, architecture: int
) -> None:
    text = build.source(build.Kernel(form, weight, grad))
    ptx, log = compile_text(text, architecture)
    assert set(re.findall(r"(?:warning|error) #(\d+)", log)) <= {UNUSED}, log
    odd = [line for line in foreign(ptx, False) if not (F64.match(line) or HARMLESS.match(line))]
    assert not odd
    assert spilled(f"{log}\n0 bytes spill stores, 0 bytes spill loads") == 0, log
    assert sorted(re.findall(r"\.entry\s+(\w+)", ptx)) == sorted(form.passes)


@pytest.mark.parametrize(("k", "form"), [*enumerate(FORMS)], ids=name)
def test_passes_that_read_their_rows_from_the_device_spill_nothing(k: int, form: Form) -> None:
    kernel = build.Kernel(form, *NUMBERS[5 * k % len(NUMBERS)], live=True)
    record = layout("Args", args_type(kernel.tensors, live=True))
    check = f'static_assert(sizeof(Live) == {rows_cuda.PAIR // 2}, "row");'
    _, log = compile_text(f"{build.source(kernel)}\n{record}\n{check}", ARCHITECTURES[k % len(ARCHITECTURES)])
    assert spilled(f"{log}\n0 bytes spill stores, 0 bytes spill loads") == 0, log


@pytest.mark.parametrize("form", FORMS, ids=name)
@pytest.mark.parametrize("size", SIZES)
def test_a_launch_packs_its_arguments_as_the_kernel_reads_them(form: Form, size: int) -> None:
    args = args_type(size)
    assert args.itemsize <= 32764, "what a launch can take since CUDA 12.1"
    text = build.source(build.Kernel(form, "float32", "float32", size))
    fields = "\n".join((layout("Args", args), layout("Tensor", tensor_type(form))))
    scalars = f"static_assert(sizeof(Scalars) == {4 * len(form.module.SCALARS)} && sizeof(Scalars) <= 64);"
    wide = f"static_assert(sizeof(Wide) == {8 * len(form.module.WIDE)} && sizeof(Wide) <= 64);"
    compile_text("\n".join((text, fields, scalars, wide)), 90)
    with pytest.raises(AssertionError, match="count"):
        compile_text(f"{text}\n{layout('Args', np.dtype([('count', 'u4')]))}", 90)
