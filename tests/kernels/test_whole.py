"""The passes of whole.cu on an emulated grid: the words of the oracle, without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from refopt import Optimizer, reduce
from refopt_cuda.kernels import whole_build as build
from refopt_cuda.kernels import whole_cut
from refopt_cuda.kernels.whole_cuda import tensor_type
from refopt_cuda.kernels.whole_rules import WHOLE, form_of, forms
from tests.bits import same_bits
from tests.cases import label
from tests.kernels.whole_cases import CASES, NUMBERS, SHAPES, numbers, shapes_of, special, weights
from tests.kernels.whole_emulator import Emulated
from tests.kernels.whole_pair import Host, WholePair

pytestmark = pytest.mark.gxx
BRIEF = [(), (0,), (7,), (257,), (70_000,), (3, 40), (33, 255), (300, 520), (2, 3, 512), (2, 33, 264)]
TURNS = [("float32", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16"), ("bfloat16", "float32")]


@pytest.fixture(scope="module")
def grid(gxx: str, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(gxx, tmp_path_factory.mktemp("whole"))


def pair(case: Any, numbers: tuple[str, str], grid: Emulated, **more: Any) -> WholePair:
    return WholePair(case.stem, case.hyper | more, *numbers, Host, grid)


def steps(both: WholePair, shapes: list[tuple[int, ...]], seed: int = 0) -> None:
    """A step without some tensors, one with two rows of scalars, one of gradients off their alignment."""
    rng = np.random.default_rng(seed)
    both.start(weights(rng, shapes))
    for k in range(3):
        both.step([None if k == 0 and j % 3 == 1 else numbers(rng, s) for j, s in enumerate(shapes)], 2 * (k == 2))


@pytest.mark.parametrize("k", range(len(CASES)), ids=lambda k: CASES[k].label)
def test_every_case_steps_as_the_oracle(k: int, grid: Emulated) -> None:
    case = CASES[k]
    shapes = shapes_of(case, SHAPES if k % 4 == 0 else BRIEF)
    steps(pair(case, TURNS[k % len(TURNS)], grid), shapes)


def test_the_cases_hold_every_form_of_every_rule() -> None:
    taken = {form_of(case.stem, Optimizer(case.stem, **case.hyper).hyper) for case in CASES}
    assert taken == {form for stem in WHOLE for form in forms(stem)}


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.label in {"lamb", "lars", "adafactor", "came", "adam_mini-rows"}], ids=label
)
def test_special_gradients_step_as_the_oracle(case: Any, grid: Emulated) -> None:
    both, rng = pair(case, TURNS[0], grid), np.random.default_rng(3)
    both.start(weights(rng, [(40, 512), (40, 33)]))
    for _ in range(2):
        both.step([special(rng, (40, 512)), special(rng, (40, 33))])


@pytest.mark.parametrize("case", [c for c in CASES if c.label in {"lamb", "came"}], ids=label)
def test_rows_in_memory_step_as_those_of_the_arguments(case: Any, grid: Emulated) -> None:
    """A step that is to be skipped leaves weights, states and factors as they are."""
    both, rng = pair(case, TURNS[0], grid), np.random.default_rng(4)
    shapes = [(40, 512), (300,), (33, 40)]
    both.start(weights(rng, shapes))
    for skip in (False, True, False):
        both.step_live([numbers(rng, s) for s in shapes], skip)


@pytest.mark.parametrize("case", [c for c in CASES if c.label in {"lamb", "adafactor-momentum"}], ids=label)
def test_zero_gradients_and_zero_weights_step_as_the_oracle(case: Any, grid: Emulated) -> None:
    both, zero = pair(case, TURNS[0], grid), np.zeros((5, 300), np.float32)
    both.start([zero, np.ones_like(zero)])
    both.step([np.ones_like(zero), zero])


def test_tall_and_wide_matrices_have_more_tiles_than_a_thread_adds(grid: Emulated) -> None:
    case = next(c for c in CASES if c.label == "adafactor")
    both, rng = pair(case, TURNS[0], grid), np.random.default_rng(5)
    shapes = [(2, 33 * 256 + 8), (33 * 256 + 3, 2)]
    both.start(weights(rng, shapes))
    both.step([numbers(rng, s) for s in shapes])


def scratch(both: WholePair, k: int, name: str, count: int) -> np.ndarray:
    """What the passes have left in the scratch of tensor k, float64."""
    whole = both.whole
    entry = whole.table.view(tensor_type(whole.form))[k]
    return whole.scratch[int(entry[name]) - whole.scratch.ctypes.data :][: 8 * count].view(np.float64)


def summed(shape: tuple[int, ...], grid: Emulated, seed: int = 6) -> tuple[WholePair, np.ndarray]:
    """LARS after one step, which has left sums of p^2 and of g^2, and p."""
    rng = np.random.default_rng(seed)
    both, (p, g) = WholePair("lars", {}, "float32", "float32", Host, grid), weights(rng, [shape, shape])
    both.start([p])
    both.step([g])
    return both, p


@pytest.mark.parametrize("shape", [(5, 300), (9, 256), (2, 3, 519), (70_000,), (3, 65_000), (700, 100)], ids=str)
def test_sums_of_pieces_have_the_bits_of_float64(shape: tuple[int, ...], grid: Emulated) -> None:
    """The rules round them to float32 in the end, where another order would hardly ever be seen."""
    both, p = summed(shape, grid)
    by_row = len(shape) > 1 and shape[-1] >= 256
    flat = reduce.squares(p).reshape(-1, shape[-1]) if by_row else reduce.squares(p).reshape(-1)
    want = flat if by_row else [flat[k : k + 65536] for k in range(0, flat.size, 65536)]
    sums = [reduce.r256(piece) for piece in want]
    sums[0] = reduce.total(reduce.squares(p))  # the whole takes the place of the first
    same_bits(scratch(both, 0, "sums", len(sums)), np.array(sums), "sums")


def test_more_pieces_than_a_chunk_are_added_in_levels(
    grid: Emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Chunks are shortened in all three places: whole tensors of 65,536 rows would take minutes here."""
    text = build.text
    monkeypatch.setattr(build, "text", lambda path: text(path).replace("CHUNK = 65536", "CHUNK = 300"))
    monkeypatch.setattr(whole_cut, "CHUNK", 300)
    monkeypatch.setattr(reduce, "CHUNK", 300)
    for shape in ((777, 256), (300 * 700 + 5,)):
        both, p = summed(shape, Emulated(grid.gxx, tmp_path))
        same_bits(scratch(both, 0, "sums", 1)[0], np.float64(reduce.total(reduce.squares(p))), f"R of {shape}")


@pytest.mark.parametrize("shape", [(5, 300), (256, 256), (300, 520), (3, 40, 264), (2, 600, 7)], ids=str)
def test_sums_of_rows_and_columns_have_the_bits_of_float64(shape: tuple[int, ...], grid: Emulated) -> None:
    rng = np.random.default_rng(7)
    both, (g,) = WholePair("adafactor", {}, "float32", "float32", Host, grid), weights(rng, [shape])
    both.start([np.ones(shape, np.float32)])
    both.step([g])
    m, n = shape[-2:]
    cut = whole_cut.Cut.of(both.whole.form, shape, {})
    parts = scratch(both, 0, "lines", cut.partials)
    rows, columns = np.split(parts, [cut.matrices * m * cut.across])
    rows = reduce.r256_rows(rows.reshape(cut.across, -1).T).reshape(-1, m)
    columns = reduce.r256_rows(columns.reshape(cut.down, -1).T).reshape(-1, n)
    for k, matrix in enumerate((g * g + np.float32(1e-30)).reshape(-1, m, n)):
        want = reduce.row_and_column_sums(matrix)
        same_bits(rows[k], want[0], f"rows of matrix {k}")
        same_bits(columns[k], want[1], f"columns of matrix {k}")


PROBE = """
extern "C" void probe(const double* x, const double* apart, uint32_t n, double* out) {
    Grid::it().body = [=] {
        static double shared[THREADS];
        const double block = r256(x, n, shared), warp = r256_of_warp(apart, 3, n, threadIdx.x & 31);
        if (threadIdx.x == 0) out[0] = block, out[1] = warp, out[2] = n <= 32 ? r256_of_thread(apart, 3, n) : block;
    };
    Grid::it().run(0, 1);
}
"""


@pytest.mark.parametrize("n", [1, 2, 5, 8, 31, 32, 33, 255, 256, 300, 5000])
def test_blocks_warps_and_threads_add_alike(n: int, grid: Emulated) -> None:
    library = grid.library(build.Kernel(forms("lars")[0], "float32", "float32"), PROBE)
    x, out = np.random.default_rng(n).standard_normal(n), np.zeros(3)
    apart = np.repeat(x, 3)
    library.probe(
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_void_p(apart.ctypes.data),
        ctypes.c_uint(n),
        ctypes.c_void_p(out.ctypes.data),
    )
    same_bits(out, np.full(3, reduce.r256(x)), f"R256 of {n}")


def test_a_sum_in_another_order_would_be_seen(grid: Emulated, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Proof that these comparisons can fail: two of the last additions of the tree are exchanged."""
    text, one, other = build.text, "a[0], a[4]), add64(a[2], a[6]", "a[0], a[2]), add64(a[4], a[6]"
    assert one in text("kernels/whole_walk.cuh")
    monkeypatch.setattr(build, "text", lambda path: text(path).replace(one, other))
    with pytest.raises(AssertionError, match="sums"):
        test_sums_of_pieces_have_the_bits_of_float64((50, 256), Emulated(grid.gxx, tmp_path))


@pytest.mark.parametrize("number", NUMBERS)
def test_an_unknown_format_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match="float64"):
        build.Kernel(forms("lamb")[0], number, "float64")
