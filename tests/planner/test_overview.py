"""What `docs/overview.md` says in words is what its tables say in numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from refopt.planner import overview

PAGE = (Path(__file__).parents[2] / "docs/overview.md").read_text("utf-8")


def rows(name: str) -> dict[str, tuple[str, ...]]:
    _, lines = overview.TABLES[name]()
    return {line[0]: line[1:] for line in lines}


def test_every_table_is_on_the_page_once() -> None:
    assert re.findall(r"```{overview} (\S+)", PAGE) == list(overview.TABLES)


def test_the_sums_of_a_seven() -> None:
    found = rows("breakdown")
    assert found["weights"] == ("28.0", "14.0", "14.0", "14.0") == found["gradients"]
    assert found["states"] == ("56.0", "56.0", "56.0", "28.0") and found["master"][2] == "28.0"


def test_eight_bits_save_three_quarters() -> None:
    found = rows("eight-bit")
    assert found["8 bits, block 256"] == ("14.2", "2.031", "74.6%") and found["block 2048"][0] == "14.0"


def test_weights_and_gradients_stay_on_the_gpu() -> None:
    found = rows("paged")
    assert [found[f"{n}B"][0] for n in (1, 7, 13, 70)] == ["8.0", "56.0", "104", "560"]
    assert [found[f"{n}B"][3] for n in (7, 70)] == ["28.1", "280"]


def test_no_step_of_a_seven_takes_a_millisecond_and_no_paged_one_a_hundred() -> None:
    for cells in rows("steps").values():
        plain, _, paged = (float(c.replace(",", "")) for c in cells[:3])
        assert plain > 50 and paged > 1000


def test_bytes_a_weight() -> None:
    found = rows("per-weight")
    assert [found["AdamW"][k] for k in (1, 3)] == ["12.00", "10.00"]
    assert [found["AdamW8bit"][k] for k in (1, 3)] == ["6.03", "4.03"]
    assert found["Lion"][3] == found["SGD, momentum 0.9"][3] == "6.00" and found["Adafactor"][3] == "2.00"


def test_which_recommendations_hold() -> None:
    fits = {name: cells[2] for name, cells in rows("decisions").items()}
    assert list(fits.values()) == ["no", "no", "yes", "yes", "yes"]


def test_the_hierarchy_of_a_seven() -> None:
    found = rows("hierarchy")
    peaks = [float(cells[3]) for cells in found.values()]
    assert peaks == sorted(peaks) and 6.0 < peaks[0] < 6.4 and found["AdamW, float32 weights"][3] == "112"


def test_the_command_prints_a_table(capsys: Any) -> None:
    assert overview.main(["eight-bit"]) == 0 and "74.6%" in capsys.readouterr().out
    assert overview.main(["nine-bit"]) == 2 and "there are breakdown" in capsys.readouterr().err
