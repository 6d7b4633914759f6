"""`refopt vectors`: what must come out, for implementations in any language, as JSON.

Two sets: `exact` was computed in fractions and rounded once a step of the equations, with no NumPy; `published` came
with the definition of the rules. The reference is tested against both; neither was made by it.

A run has a rule, its hyper-parameters (others at their defaults), the codec of each state (float32 where none is
named), `start` (weights and the gradients of each step, decimal, to be rounded to float32), and `steps`: for step t the
float32 words of the weights and of each state, as hexadecimal, -0 written as +0; a coded state has `codes`, as
integers, and the words of its `scales`. Blocks are of 256 elements. A block has a codec, numbers, their codes, and the
words of the scale and of the decoded numbers where they are given.

>>> from refopt import vectors
>>> run = vectors.load("adamw")["runs"][0]
>>> run["set"], run["hyper"], run["steps"]["1"]["p"]
('published', {'lr': 0.01, 'wd': 0.1}, '3f7d2f1b bffe76c9 3efa9fbf 00000000')
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from refopt import rules
from refopt.assign import lookup

HERE = Path(__file__).parent / "golden"
SETS = ("published", "exact")


def load(rule: str | None = None) -> dict[str, Any]:
    """{"runs", "blocks"}, of one rule or of all; each run says which set it is of, how that was made, and its start."""
    runs, blocks = [], []
    for name in SETS:
        data = json.loads((HERE / f"{name}.json").read_text("utf-8"))
        further = {"set": name, "made": data["made"], "start": data["start"]}
        runs += [further | run for run in data["runs"] if rule in (None, run["rule"])]
        blocks += data.get("blocks", [])
    return {"runs": runs, "blocks": blocks}


def main(argv: list[str]) -> int:
    """`refopt vectors [RULE] [--out FILE]`: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="refopt vectors", description="Print golden vectors as JSON.")
    parser.add_argument("rule", nargs="?", help="one rule; all of them if none is named")
    parser.add_argument("--out", help="file to write (default: the terminal)")
    args = parser.parse_args(argv)
    try:
        found = load(args.rule and lookup("rule", rules.RULES, args.rule).stem)
        if not found["runs"]:
            held = sorted({run["rule"] for run in load()["runs"]})
            raise ValueError(f"no vectors of {args.rule!r}; there are those of {', '.join(held)}")
        text = json.dumps(found, indent=1)
        if args.out:
            Path(args.out).write_text(text + "\n", "utf-8")
    except (ValueError, OSError) as error:
        print(f"refopt vectors: {error}", file=sys.stderr)
        return 2
    print(args.out or text)
    return 0
