"""Golden vectors as others get them: complete, and with all that is needed to compute them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refopt import Optimizer, vectors
from tests.golden.test_golden import as_words, hex_words


def test_a_stranger_can_follow_every_run() -> None:
    """From the JSON alone: start, hyper-parameters and codecs give the words."""
    runs = json.loads(json.dumps(vectors.load()))["runs"]
    assert {run["set"] for run in runs} == {"published", "exact"} and len(runs) > 60
    for run in runs:
        opt = Optimizer(run["rule"], run["codecs"], **run["hyper"])
        p = np.float32(run["start"]["p"])
        state = opt.init(p)
        for t, g in enumerate(run["start"]["grads"], 1):
            p, state = opt.step(p, np.float32(g), state)
            for role, want in run["steps"].get(str(t), {}).items():
                assert (hex_words(p) if role == "p" else as_words(state[0][role])) == want


def test_the_command_prints_or_writes_them(tmp_path: Path, capsys: Any) -> None:
    assert vectors.main(["lion"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {run["rule"] for run in printed["runs"]} == {"lion"} and printed["blocks"]
    assert vectors.main(["lion", "--out", str(tmp_path / "lion.json")]) == 0
    assert json.loads((tmp_path / "lion.json").read_text("utf-8")) == printed


@pytest.mark.parametrize(("argv", "words"), [(["lyon"], "did you mean 'lion'"), (["muon"], "no vectors of 'muon'")])
def test_bad_input_gives_one_sentence_and_exit_code_2(argv: list[str], words: str, capsys: Any) -> None:
    assert vectors.main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out
