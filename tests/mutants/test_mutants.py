"""Mutants judge the suite: each law that is named must hold on the package and break on its mutant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import todays
from tests.mutants import MUTANTS
from tests.mutants.load import copied, package
from tests.mutants.run import broken, killed


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_mutant_is_killed_by_the_law_it_names(tmp_path: Path, capsys: Any) -> None:
    """In CI a seventh of them a day, of their laws too."""
    chosen = todays(MUTANTS)
    survivors = [m for m in chosen if not killed(m, tmp_path)]
    with capsys.disabled():
        print(f"\nkilled {len(chosen) - len(survivors)} of {len(chosen)} mutants, of {len(MUTANTS)} in all")
    assert not survivors, "\n".join(f"{m.label} survives {m.law}" for m in survivors)


def test_every_law_that_kills_holds_on_the_package_itself(tmp_path: Path) -> None:
    """An unpatched copy, loaded and run the same way: otherwise a kill would prove nothing. A few examples of each: the
    suite itself runs every law on many."""
    with package(copied(tmp_path / "whole")) as ref:
        for law in sorted({m.law for m in todays(MUTANTS)}):
            assert (error := broken(law, ref, 3)) is None, f"{law}: {error}"


def test_mutants_have_names_of_their_own() -> None:
    assert len({m.label for m in MUTANTS}) == len(MUTANTS)
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


def test_a_patch_that_does_not_apply_is_an_error(tmp_path: Path) -> None:
    stale = MUTANTS[0]._replace(old="no such line")
    with pytest.raises(LookupError, match="occurs 0 times"):
        killed(stale, tmp_path)
