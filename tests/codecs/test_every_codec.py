"""Laws of every codec: shapes, bytes, non-finite and zero blocks, monotony, scale, what comes back twice."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, unsigned_zero, words
from tests.cases import BLOCKED, CODECS, ORDERED, CodecCase, label
from tests.strategies import arrays, f32

every_codec = pytest.mark.parametrize("case", CODECS, ids=label)
ordered = pytest.mark.parametrize("case", ORDERED, ids=label)
blocked = pytest.mark.parametrize("case", BLOCKED, ids=label)
NAN_WORDS = (0x7FC00000, 0x7FC0, 0x7E00)
"""The quiet NaN of float32, bfloat16 and float16."""


def of(case: CodecCase, x: Any) -> Any:
    """The array, without its signs for a codec that stores none."""
    return x if case.signed else np.abs(x)


def codes(box: Any) -> Any:
    """One code an element, flat: halves of bytes are taken apart one by one."""
    if box.codec.parts[0].per != "nibble":
        return box.codes.reshape(-1)
    bounds, out, at = box.codec.bounds(box.shape).tolist(), [], 0
    high_first = box.codec.mode.get("first", "high") == "high"
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        for byte in box.codes.reshape(-1)[at : at + (b - a + 1) // 2].tolist():
            out += [byte >> 4, byte & 15] if high_first else [byte & 15, byte >> 4]
        at, out = at + (b - a + 1) // 2, out[:b]
    return np.array(out, np.uint8)


@every_codec
@given(x=arrays())
def test_decoding_gives_the_shape_back_and_mutates_nothing(ref: ModuleType, case: CodecCase, x: Any) -> None:
    x, before = of(case, x), of(case, x).copy()
    box = case.record(ref).encode(x)
    same_bits(x, before, "x")
    kept = {name: a.copy() for name, a in box.arrays.items()}
    out = box.decode()
    assert (out.shape, out.dtype, codes(box).size, box.nbytes) == (
        x.shape,
        f32,
        x.size,
        case.record(ref).nbytes(x.shape),
    )
    assert box.codes.shape == x.shape or box.codec.parts[0].per == "nibble"
    for name, a in kept.items():
        same_bits(box.arrays[name], a, name)


@ordered
@given(x=arrays())
def test_encoding_keeps_signs_and_never_grows_a_block(ref: ModuleType, case: CodecCase, x: Any) -> None:
    x = of(case, x)
    out = case.record(ref).encode(x).decode()
    assert ((out == 0) | (np.sign(out) == np.sign(x)) | ((x == 0) & (not case.zeros))).all()
    assert not x.size or np.abs(out).max() <= np.abs(x).max() * (1 + 2.0**-7)


@ordered
@given(x=arrays([(31,), (129,)]))
def test_codes_follow_the_order_of_their_block(ref: ModuleType, case: CodecCase, x: Any) -> None:
    """Larger elements never decode to smaller values."""
    codec = case.record(ref)
    x = of(case, x)
    out = codec.encode(x).decode()
    bounds = codec.bounds(x.shape)
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        assert (np.diff(out[a:b][np.argsort(x[a:b])]) >= 0).all()


@every_codec
@given(x=arrays([(5, 3), (129,), (3, 40)], low=-8), k=st.integers(-20, 20))
def test_a_power_of_two_changes_scales_and_not_codes(ref: ModuleType, case: CodecCase, x: Any, k: int) -> None:
    x, codec = of(case, x), case.record(ref)
    k -= k % case.octaves
    one, other = codec.encode(x), codec.encode(x * f32(2.0**k))
    same_bits(other.decode(), one.decode() * f32(2.0**k), "decoded")
    if codec.scope != "element":
        same_bits(other.codes, one.codes, "codes")


@blocked
@given(x=arrays([(129,), (3, 40), (300,)]), seed=st.integers(0, 2**32 - 1))
def test_blocks_are_coded_one_by_one(ref: ModuleType, case: CodecCase, x: Any, seed: int) -> None:
    """Each block alone gives the same codes and scale; elements permuted inside it give permuted codes."""
    x, codec = of(case, x), case.record(ref)
    box, flat = codec.encode(x), x.reshape(-1)
    bounds = codec.bounds(x.shape)
    for k, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        order = np.random.default_rng(seed).permutation(b - a)
        alone = codec.encode(flat[a:b][order])
        same_bits(codes(alone), codes(box)[a:b][order], f"codes of block {k}")
        same_bits(alone.scales, box.scales.reshape(-1)[k : k + 1], f"scale of block {k}")


@blocked
@pytest.mark.parametrize("fill", [0.0, -0.0, 1e-45, 2.0**-127, 2.0**-101])
def test_a_dead_block_is_exactly_zero(ref: ModuleType, case: CodecCase, fill: float) -> None:
    """Below 2^-100 a block is stored as zeros with scale +0, and its neighbour is not touched."""
    codec = case.record(ref)
    x = np.full(2 * codec.block + 1, fill, f32)
    x[codec.block] = 1.0
    with np.errstate(all="raise"):
        box = codec.encode(x)
        out = box.decode()
    assert (codes(box)[: codec.block] == case.zero).all() and (codes(box)[-1:] == case.zero).all()
    assert words(box.scales)[0] == 0 and words(box.scales)[2] == 0
    assert not words(out[: codec.block]).any() and abs(out[codec.block] - 1) <= (2e-6 if case.octaves > 1 else 0)


@blocked
def test_a_block_of_2_to_the_minus_100_is_alive(ref: ModuleType, case: CodecCase) -> None:
    box = case.record(ref).encode(f32([2.0**-100]))
    assert box.decode()[0] == f32(2.0**-100) and box.scales[0] > 0


@blocked
@pytest.mark.parametrize("size", [2.0**126, 1.5 * 2.0**126, 1.99 * 2.0**127])
def test_the_largest_floats_are_coded(ref: ModuleType, case: CodecCase, size: float) -> None:
    """1 / absmax is subnormal here; the extreme still takes the end code, for want of overflow."""
    box = case.record(ref).encode(f32([size, size / 2, 0.0]))
    assert codes(box)[0] == codes(case.record(ref).encode(f32([1.0])))[0] and codes(box)[2] == case.zero
    np.testing.assert_allclose(box.decode()[: 2 + case.zeros], [size, size / 2, 0.0][: 2 + case.zeros], rtol=case.rough)


@blocked
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("where", [0, 3, -1])
def test_a_bad_element_spoils_its_block_alone(ref: ModuleType, case: CodecCase, bad: float, where: int) -> None:
    codec = case.record(ref)
    x = np.ones(3 * codec.block, f32)
    middle = slice(codec.block, 2 * codec.block)
    x[middle][where] = bad
    box = codec.encode(x)
    assert box.scales.view(f"u{box.scales.itemsize}").tolist()[1] in NAN_WORDS
    assert (codes(box)[middle] == case.zero).all()
    out = box.decode()
    assert np.isnan(out[middle]).all() and (np.delete(out, range(codec.block, 2 * codec.block)) == 1).all()


@blocked
def test_a_ragged_tail_has_its_own_scale(ref: ModuleType, case: CodecCase) -> None:
    codec = case.record(ref)
    x = np.full(codec.block + 3, 1000.0, f32)
    x[codec.block :] = [1.0, 0.5, 0.001]
    box = codec.encode(x)
    assert box.scales.shape == (2,)
    least = 0.004 if case.zeros else 0.07
    np.testing.assert_allclose(box.decode()[codec.block :], [1.0, 0.5, 0.001], rtol=case.rough, atol=least)


@every_codec
def test_an_all_zero_state_is_what_a_fresh_one_is(ref: ModuleType, case: CodecCase) -> None:
    box = case.record(ref).encode(np.zeros((3, 40), f32))
    assert not words(unsigned_zero(box.decode())).any() and (codes(box) == case.zero).all()


@every_codec
def test_nothing_and_a_single_number_are_arrays_too(ref: ModuleType, case: CodecCase) -> None:
    for x in (np.zeros(0, f32), np.zeros((3, 0), f32), np.zeros((0, 16), f32), np.array(2.25, f32)):
        out = case.record(ref).encode(x).decode()
        same_bits(out, x, f"shape {x.shape}")
