"""Write refopt/golden/exact.json: `python -m tests.golden.make`. Every rule case, uncoded and with pairs of codecs.

The inputs are hard on purpose: sizes from 1e-9 to 1e3 in one block, exact zeros, a sign that turns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cases import RULES
from tests.golden import exact

HERE = Path(__file__).resolve().parents[2] / "refopt/golden"
P = [1.0, -2.0, 0.5, 0.0, -3e-3, 7.25]
GRADS = [
    [0.1, -0.2, 0.3, 0.0, 1e-9, -40.0],
    [-0.05, 0.4, 0.3, 1e-8, -2e-9, 1e3],
    [2.0, 0.0, -0.7, -1e-3, 3e-7, 0.25],
    [1e-4, -5e-4, -0.7, 0.0, 0.0, -250.0],
]
PAIRS = [
    {},
    {"m": "dynamic8", "v": "dynamic8", "buf": "dynamic8", "s": "bf16", "w": "int8_linear", "m2": "dynamic8"},
    {"m": "int8_linear", "v": "bf16", "buf": "int8_linear", "s": "int8_linear", "w": "dynamic8", "m2": "bf16"},
]


def vectors() -> dict[str, Any]:
    """Every run, as plain data."""
    runs = []
    for case in RULES:
        for pair in PAIRS if case.states else PAIRS[:1]:
            codecs = {role: name for role, name in pair.items() if role in case.states}
            steps = exact.run(case.stem, case.hyper, P, GRADS, codecs)
            flat = [{k: " ".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in steps]
            runs.append(
                {
                    "rule": case.stem,
                    "hyper": case.hyper,
                    "codecs": codecs,
                    "steps": {str(t): r for t, r in enumerate(flat, 1)},
                }
            )
    return {"made": "python -m tests.golden.make", "start": {"p": P, "grads": GRADS}, "runs": runs}


def text() -> str:
    """exact.json as it is written."""
    return json.dumps(vectors(), indent=1) + "\n"


if __name__ == "__main__":
    (HERE / "exact.json").write_text(text(), encoding="utf-8")
