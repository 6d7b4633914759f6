"""torch's own database of optimizers over the classes of this package; the page that says so is fresh."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from tests.optim import torch_database as database
from tests.optim.torch_database import MATRIX, OURS, TAKEN, ULPS, Entry, Fault

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("entry", database.entries(), ids=str)
def test_an_input_of_torchs_database_ends_where_torch_does(entry: Entry, device: str) -> None:
    limit = MATRIX if entry.name == "Muon" else ULPS
    assert database.distance(entry, device) <= limit


@pytest.mark.parametrize("fault", [*database.faults()], ids=str)
def test_what_torch_refuses_is_refused_or_said_to_be_taken(fault: Fault) -> None:
    verdict, sentence = database.refused(fault)
    assert verdict == ("taken" if fault.message in TAKEN else "refused"), sentence
    assert verdict == "taken" or len(sentence) > 20


def test_every_optimizer_of_the_database_is_run_or_left_out_with_a_reason() -> None:
    assert set(database.infos()) == set(OURS) | set(database.LEFT_OUT)
    assert not {f.message for f in database.faults()}.isdisjoint(TAKEN)


def test_the_page_is_what_the_database_says() -> None:
    text = database.PAGE.read_text("utf-8")
    version = torch.__version__.partition("+")[0]
    if f"torch {version})" not in text:
        pytest.skip(f"the page is of another version of torch than {version}")
    assert text == database.page(), "python -m tests.optim.torch_database"
