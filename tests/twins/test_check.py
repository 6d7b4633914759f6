"""`python -m tests.twins.check` says what it compared and fails where a word differs."""

from __future__ import annotations

import pytest

from tests.twins import check

pytest.importorskip("numba")
from refopt_cuda.kernels import step_host

COMMAND = ["adamw", "--codec", "dynamic8", "--codec", "m=f32", "--hyper", "eps=1e-6", "--shape", "3x40", "--steps", "1"]


def test_a_combination_that_is_equal_exits_0(capsys):
    assert check.main(COMMAND) == 0
    said = capsys.readouterr().out
    assert "adamw_no_amsgrad_outside_before-f32+dynamic8-float32-float32-128 on host, shape (3, 40), 1 steps" in said
    assert "step 1: v.scales               3 words  equal" in said
    assert said.endswith("\nequal\n")


def test_one_wrong_bit_is_counted_and_exits_1(capsys, monkeypatch):
    def wrong(rule, codecs, p, *args, **kept):
        step_host.step(rule, codecs, p, *args, **kept)
        p.view("u4")[0, 7] ^= 1

    monkeypatch.setattr(check, "stepper", lambda place: wrong)
    assert check.main(COMMAND) == 1
    assert capsys.readouterr().out.endswith("1 words differ\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--codec", "buf=q4"], "keeps no 'buf'; it keeps m, v"),
        (["--codec", "q5"], "unknown codec 'q5'"),
        (["--codec", "q4", "--block", "64,96", "--shape", "400"], "block 64 does not divide block 96"),
    ],
)
def test_what_is_no_combination_exits_2(words, says, capsys):
    assert check.main([*COMMAND, *words]) == 2
    assert says in capsys.readouterr().err
