"""`python -m tests.mutants [WORD]`: every mutant (with WORD in its name) and its fate; exit code 1 if one survives."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

from tests.mutants import MUTANTS
from tests.mutants.run import killed


def main(word: str = "") -> int:
    chosen = [m for m in MUTANTS if word in m.label]
    dead = 0
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for m in chosen:
            fate = killed(m, Path(home))
            dead += fate
            print(f"{'killed  ' if fate else 'SURVIVES'}  {m.label:<45} {m.law}", flush=True)
    print(f"killed {dead} of {len(chosen)}")
    return 0 if dead == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
