"""The text, its parts, and what it is compared with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refopt_cuda.train import data


def test_the_default_text_needs_no_download_and_has_prose_and_sources() -> None:
    text = data.standard_library()
    assert len(text.data) > 5_000_000
    raw = text.data.tobytes()
    assert b"def " in raw and b'The "assert" statement' in raw.replace(b"\n", b" ")
    assert len(text.sha256) == 64


def test_a_tenth_of_every_stretch_is_held_out() -> None:
    text = data.Text("x", (np.arange(20_000) % 251).astype(np.uint8))
    train, held = text.split()
    assert len(held) == 2000 and len(train) == 18_000
    assert np.array_equal(held[:100], text.data[900:1000])
    assert np.array_equal(train[900:1000], text.data[1000:1100])


def test_windows_are_bytes_and_the_bytes_that_follow() -> None:
    x, y = data.windows(np.arange(100, dtype=np.uint8), np.array([3, 50]), 4)
    assert x.tolist() == [[3, 4, 5, 6], [50, 51, 52, 53]]
    assert y.tolist() == [[4, 5, 6, 7], [51, 52, 53, 54]]


def test_batches_are_functions_of_seed_and_step() -> None:
    a = data.starts(1000, 16, 8, 3, 7)
    assert np.array_equal(a, data.starts(1000, 16, 8, 3, 7))
    assert not np.array_equal(a, data.starts(1000, 16, 8, 3, 8))
    assert not np.array_equal(a, data.starts(1000, 16, 8, 4, 7))
    many = np.concatenate([data.starts(20, 16, 8, 0, t) for t in range(100)])
    assert set(many) == {0, 1, 2, 3}, "every window that fits, and none beyond"


def test_held_out_windows_fit_and_do_not_overlap() -> None:
    for size in (17, 33, 1000, 1001):
        at = data.held_out_starts(size, 16, 10)
        assert at[-1] + 17 <= size and at[0] == 0
        assert (np.diff(at) >= 16).all()


def test_the_trigram_model_is_a_distribution_that_learns() -> None:
    rng = np.random.default_rng(0)
    at = np.arange(0, 400, 16)
    noise = rng.integers(0, 256, 4000).astype(np.uint8)
    assert 7.5 < data.trigram_bits(noise, noise[::-1].copy(), at, 16) < 10
    cycle = np.tile(np.frombuffer(b"abcabd", np.uint8), 700)
    bits = data.trigram_bits(cycle, cycle, at, 16)
    assert bits == pytest.approx(1 / 3, abs=0.05), "after `ab` one of two follows, elsewhere one of one"


def test_trigram_probabilities_sum_to_one() -> None:
    train = np.random.default_rng(1).integers(97, 123, 3000).astype(np.uint8)
    total = 0.0
    for z in range(256):
        held = np.array([97, 98, z], np.uint8)
        total += 2.0 ** -data.trigram_bits(train, held, np.array([1]), 1)
    assert math.isclose(total, 1, rel_tol=1e-9)


def test_xz_counts_bits_a_byte() -> None:
    assert data.xz_bits(np.zeros(100_000, np.uint8)) < 0.05
    assert data.xz_bits(np.random.default_rng(0).integers(0, 256, 50_000).astype(np.uint8)) == pytest.approx(8, abs=0.1)
