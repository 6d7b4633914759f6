"""Curves and pictures: what is drawn is what the codecs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refopt import codecs
from refopt.curves import errors, levels, real_states
from refopt.plot import main, states_codecs
from tests.bits import same_bits
from tests.strategies import f32

COUNTS = {"int8_linear": 255, "dynamic8": 256, "q4": 16, "nf4": 16, "fp4": 15}


@pytest.mark.parametrize("stem", COUNTS)
def test_every_value_of_a_codec_is_drawn(stem: str) -> None:
    """As many as it has codes: int8 leaves out -128, and the 4-bit float has two zeros."""
    x = levels(codecs.CODECS[stem])
    assert x.size == COUNTS[stem] and x.max() == 1 and (np.diff(x) > 0).all()


def test_levels_are_the_table_itself() -> None:
    from refopt.codecs.dynamic8 import table

    same_bits(levels(codecs.dynamic8), np.sort(np.asarray(table(True), f32)), "dynamic8")


@pytest.mark.parametrize("stem", sorted(states_codecs()))
def test_no_error_is_larger_than_the_number_but_near_zero(stem: str) -> None:
    at, relative = errors(codecs.CODECS[stem])
    assert at.shape == relative.shape and relative[-1] < 1e-6 and np.isfinite(relative).all()


def test_the_model_is_real() -> None:
    """Rows of frequent and rare bytes differ by decades; bytes that were not seen have none."""
    m, v = real_states()
    assert m.shape == v.shape == (256, 256) and (v >= 0).all() and v.any()
    rows = v.max(1)
    assert rows.max() > 1e4 * rows[rows > 0].min() and (rows == 0).sum() > 50


@pytest.mark.parametrize("argv", [["dynamic8"], ["q4"], ["bf16"], []], ids=str)
def test_a_picture_is_written(argv: list[str], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    out = tmp_path / "a.png"
    assert main([*argv, "--out", str(out)]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 20_000
    assert capsys.readouterr().out == f"{out}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["dynamic"], "no codec 'dynamic' (did you mean 'dynamic8'?)"),
        (["bf16_sr"], "bf16_sr stores weights"),
        (["dynamic8", "--out", "a.gif"], "--out must end in .png, .svg or .pdf, got 'a.gif'"),
        (["dynamic8", "--out", "/nowhere/a.png"], "/nowhere/a.png"),
    ],
    ids=str,
)
def test_bad_input_gives_one_sentence_and_exit_code_2(argv: list[str], words: str, capsys: Any) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out
