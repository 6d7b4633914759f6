"""The page of arguments that differ says what the signatures say."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.optim import signatures  # noqa: E402

PINS = dict(
    line.split("==")
    for line in (Path(__file__).resolve().parents[2] / "constraints.txt").read_text("utf-8").splitlines()
    if "==" in line
)


def test_the_page_of_arguments_is_fresh(capsys: pytest.CaptureFixture) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    found = {"torch": torch.__version__.partition("+")[0], "bitsandbytes": bnb.__version__}
    if found != {name: PINS[name] for name in found}:
        pytest.skip(f"the page is about the pinned versions, these are {found}")
    page = signatures.page()
    with capsys.disabled():
        print(page.count("\n| `"), "arguments differ; docs/signatures.md lists them")
    assert signatures.PAGE.read_text("utf-8") == page, "python -m tests.optim.signatures writes it anew"


def test_a_name_that_bitsandbytes_has_is_here_or_says_what_to_take() -> None:
    import refopt_cuda as rc

    bnb = pytest.importorskip("bitsandbytes")
    for cls in signatures.optimizers(bnb.optim):
        if not hasattr(rc.optim, cls.__name__):
            with pytest.raises(AttributeError, match=f"no {cls.__name__}: take "):
                getattr(rc.optim, cls.__name__)
