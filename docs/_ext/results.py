"""`{results}`: the rows of docs/bench/results.csv, newest first; says so where there are none."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PATH = Path(__file__).parents[1] / "bench" / "results.csv"
SHOWN = ("date", "commit", "device", "bench", "work", "subject", "metric", "value", "unit", "baseline", "ratio")


class Results(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(PATH))
        node = nodes.container()
        self.state.nested_parse(StringList(table(rows()), source=self.env.docname), 0, node)
        return node.children


def rows() -> list[dict[str, str]]:
    if not PATH.exists():
        return []
    with PATH.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[::-1]


def table(found: list[dict[str, str]]) -> list[str]:
    if not found:
        return ["*No row has been recorded yet.*"]
    line = "|" + "---|" * len(SHOWN)
    return ["| " + " | ".join(SHOWN) + " |", line, *("| " + " | ".join(r[c] for c in SHOWN) + " |" for r in found)]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("results", Results)
    return {"parallel_read_safe": True}
