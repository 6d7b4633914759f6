"""The raw kernels against the oracle, bit for bit, on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import refopt
from refopt_cuda.rules import Form
from tests.cases import RULES
from tests.kernels.covering import covering
from tests.kernels.gpu_step import Pair

pytestmark = pytest.mark.gpu

SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (256,),
    (257,),
    (70_000,),
    (3, 16),
    (5, 40),
    (33, 255),
    (8, 264),
    (4, 1000),
    (2, 3, 512),
    (64, 4096),
    (37, 264),
    (1600, 1000),
]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "wd": 0.1}
NUMBERS = ["float32", "bfloat16", "float16"]


def hyper_of(form: Form) -> dict[str, Any]:
    """Hyper-parameters of one of the tables' cases, under which the rule takes this form."""
    usual = next(case.hyper for case in reversed(RULES) if case.stem == form.stem)
    defaults = {h.name: h.default for h in refopt.rules.RULES[form.stem].hypers}
    on = {n: c if isinstance(c, str) or isinstance(defaults[n], bool) else 0.85 * c for n, c in form.options.items()}
    hyper = {n: v for n, v in usual.items() if n not in on} | on
    return hyper if hyper.get("momentum", 1) else hyper | {n: False for n in ("nesterov",) if n in hyper}


def numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Magnitudes from 1e-12 to 1e6, a few zeros, and an outlier now and then."""
    x = rng.standard_normal(shape) * 10 ** rng.uniform(-12, 6, shape)
    x = np.where(rng.random(shape) < 0.05, 0.0, x)
    return np.asarray(x, np.float32)


def pair(codecs: tuple[str, ...], weight: str, grad: str, block: int | tuple[int, ...] = 256) -> Pair:
    return Pair("adamw", codecs, weight, grad, HYPER, block)


@pytest.mark.parametrize("case", covering(), ids=str)
def test_the_kernel_equals_the_oracle_bit_for_bit(case):
    rng = np.random.default_rng(0)
    both = Pair(case.form.stem, case.codecs, case.weight, case.grad, hyper_of(case.form), case.block)
    assert both.launch.form == case.form
    both.start([np.asarray(rng.standard_normal(s), np.float32) for s in SHAPES])
    for k in range(3):  # the second step has two rows of scalars
        both.step([None if k == 0 and j % 3 == 1 else numbers(rng, s) for j, s in enumerate(SHAPES)])


@pytest.mark.parametrize("shift", [1, 2, 4, 8, 15])
@pytest.mark.parametrize("grad", NUMBERS)
def test_a_gradient_may_start_at_any_address(grad, shift):
    rng = np.random.default_rng(1)
    both = pair(("dynamic8", "dynamic8"), "bfloat16", grad)
    both.start([np.asarray(rng.standard_normal(s), np.float32) for s in SHAPES])
    for _ in range(2):
        both.step([numbers(rng, s) for s in SHAPES], shift)


@pytest.mark.parametrize("block", [1, 16, 32, 64, 100, 128, 512, 1024, 2048, (64, 256), (2048, 128), (200, 50)])
def test_any_block_size_gives_the_oracles_bits(block):
    rng = np.random.default_rng(2)
    both = pair(("dynamic8", "int8_linear"), "float32", "bfloat16", block)
    shapes = [(5,), (33, 255), (4, 4096), (9000,), (70, 16), (9, 32), (40, 64), (33, 40), (3, 4104), (2, 2560)]
    both.start([np.asarray(rng.standard_normal(s), np.float32) for s in shapes])
    for _ in range(2):
        both.step([numbers(rng, s) for s in shapes])


@pytest.mark.parametrize("codecs", [("f32", "f32"), ("dynamic8", "dynamic8"), ("int8_linear", "dynamic8")])
def test_special_gradients_give_the_oracles_bits(codecs):
    rng = np.random.default_rng(3)
    both = pair(codecs, "float32", "float32")
    both.start([np.asarray(rng.standard_normal((40, 512)), np.float32)])
    special = np.float32([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-38, 1e-22, 3e38, 1e18, -1e19])
    for _ in range(3):
        g = numbers(rng, (40, 512))
        at = rng.integers(0, 40, 12), rng.integers(0, 512, 12)
        g[at] = special
        g[35] = 0.0
        g[36] *= np.float32(1e-30)
        both.step([g])


@pytest.mark.parametrize("codecs", [("dynamic8", "dynamic8"), ("int8_linear", "f32")])
def test_whole_units_and_the_blocks_left_over_give_the_oracles_bits(codecs):
    """More blocks than warps, eight at a time: full rounds of units, then single blocks, a short one last."""
    rng = np.random.default_rng(6)
    both = pair(codecs, "bfloat16", "bfloat16")
    shapes = [(2 * 132 * 32 * 8 * 256 + 3 * 8 * 256 + 256 + 40,), (300, 264), (3, 256), (132 * 32 * 8 * 256,), (9,)]
    both.start([np.asarray(rng.standard_normal(s), np.float32) for s in shapes])
    for missing in (None, 1):
        both.step([None if k == missing else numbers(rng, s) for k, s in enumerate(shapes)])


def test_a_skipped_tensor_keeps_its_bits_and_its_step_count():
    rng = np.random.default_rng(4)
    both = pair(("dynamic8", "dynamic8"), "bfloat16", "bfloat16")
    shapes = [(64, 256), (300,), (16, 512)]
    both.start([np.asarray(rng.standard_normal(s), np.float32) for s in shapes])
    for missing in (0, 1, 2, 1):
        both.step([None if k == missing else numbers(rng, s) for k, s in enumerate(shapes)])


def test_eps_zero_and_tiny_gradients_leave_the_fast_cores_range():
    rng = np.random.default_rng(5)
    both = Pair("adamw", ("f32", "dynamic8"), "float32", "float32", {**HYPER, "eps": 0.0})
    both.start([np.asarray(rng.standard_normal((8, 1024)), np.float32)])
    for scale in (1e-30, 1e-20, 1.0, 1e15):
        both.step([numbers(rng, (8, 1024)) * np.float32(scale)])


@pytest.mark.parametrize("cuts", [(1024, 4096), (33, 66, 165, 4229), (1, 2, 3, 4103)])
def test_pieces_of_a_tensor_draw_the_bits_of_the_whole(cuts):
    import cupy

    from refopt_cuda.kernels.step_cuda import Launch, Tensor
    from refopt_cuda.random import step_word
    from refopt_cuda.rules import RULES

    n, stream = 9000, cupy.cuda.get_current_stream().ptr
    g = cupy.asarray(np.random.default_rng(7).standard_normal(n), cupy.float32)
    whole = cupy.full(n, 0x3F80, cupy.uint16)
    pieces, launch = whole.copy(), Launch("sgd", (), "bf16_sr", "float32")
    row, drawn = RULES["sgd"].scalars(1, lr=1e-3)[None], [step_word(0, 1)]
    launch.bind([Tensor(whole.data.ptr, (), (n,), number=2)])
    launch.run([g.data.ptr], row, None, stream, drawn)
    spans = [*zip((0, *cuts), (*cuts, n), strict=True)]
    launch.bind([Tensor(pieces.data.ptr + 2 * lo, (), (hi - lo,), number=2, first=lo) for lo, hi in spans])
    launch.run([g.data.ptr + 4 * lo for lo, _ in spans], row, None, stream, drawn)
    assert bool((pieces == whole).all())
    assert len(set(whole.get().tolist())) > 1


def test_a_tensor_of_more_than_two_to_the_31_elements_is_stepped_to_its_end():
    import cupy

    from refopt_cuda.kernels.step_cuda import Launch, Tensor
    from refopt_cuda.rules import RULES

    n = 2**31 + 2**20 + 3
    if cupy.cuda.Device().mem_info[0] < 6 * n:
        pytest.skip(f"needs {6 * n / 2**30:.0f} GiB of free device memory")
    p, g = cupy.full(n, 0x3F80, cupy.uint16), cupy.full(n, 0xBF80, cupy.uint16)
    codes, scales = cupy.full(n, 127, cupy.uint8), cupy.zeros(-(-n // 256), cupy.float32)
    launch = Launch("lion", ("dynamic8",), "bfloat16", "bfloat16")
    launch.bind([Tensor(p.data.ptr, ((codes.data.ptr, scales.data.ptr),), (n,))])
    row = RULES["lion"].scalars(1, lr=0.5, beta1=0.9, beta2=0.5, wd=0.0)
    launch.run([g.data.ptr], row[None], None, cupy.cuda.get_current_stream().ptr)
    assert bool((p == 0x3FC0).all())
    assert bool((codes == 0).all())
    assert bool((scales == 0.5).all())
