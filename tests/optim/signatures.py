"""Our signatures beside those of bitsandbytes and torch.optim; `python -m tests.optim.signatures` writes the page."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import refopt_cuda as rc

PAGE = Path(__file__).resolve().parents[2] / "docs" / "signatures.md"
TORCH = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adafactor", "Muon")
HEAD = """# Arguments beside those of torch.optim and bitsandbytes

Every argument whose name, place or default differs. Made from the signatures by `python -m tests.optim.signatures`; a
test fails where the page and the signatures part. Where torch and bitsandbytes disagree on a default, torch's holds;
behind the arguments that both have stand those of bitsandbytes.
"""


class Row(NamedTuple):
    """One argument that differs."""

    cls: str
    argument: str
    theirs: str
    here: str


def shown(p: inspect.Parameter, place: int) -> str:
    """Place (1 is params) and default."""
    where = f"place {place}" if p.kind is p.POSITIONAL_OR_KEYWORD else "keyword"
    return f"{where}, " + ("required" if p.default is p.empty else f"`{p.default!r}`")


def arguments(cls: Any) -> dict[str, tuple[inspect.Parameter, int]]:
    found = inspect.signature(cls).parameters.values()
    return {p.name: (p, k) for k, p in enumerate(found, 1) if p.kind is not p.VAR_KEYWORD}


def alike(one: inspect.Parameter, other: inspect.Parameter) -> bool:
    """Equal defaults, 0 and 0.0 and no default at all included; by keyword and by place are not compared here."""
    return one.default == other.default or (one.default is one.empty and one.name == "params")


def taken(cls: Any, name: str, default: Any) -> str:
    """What happens to an argument that our signature does not name."""
    weight = torch.nn.Parameter(torch.ones(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cls([weight], **{name: default})
        except (TypeError, ValueError) as error:
            return f"not here: {_why(error)}"
        try:
            cls([weight], **{name: True})
        except (TypeError, ValueError) as error:
            return f"`{default!r}` only: {_why(error)}"
    return "by keyword" if name in cls([weight]).param_groups[0] else "accepted, nothing to choose"


def _why(error: Exception) -> str:
    """What a refusal says, without the call and without a list of all arguments."""
    return str(error).partition(": ")[2].partition("; ")[0]


def rows(theirs: Any, ours: Any) -> Iterator[Row]:
    here = arguments(ours)
    for name, (p, place) in arguments(theirs).items():
        if name not in here:
            word = taken(ours, name, p.default)
            if p.kind is not p.KEYWORD_ONLY or word != "by keyword":
                yield Row(theirs.__name__, name, shown(p, place), word)
            continue
        q, other = here[name]
        moved = p.kind is p.POSITIONAL_OR_KEYWORD and (other != place or q.kind is not q.POSITIONAL_OR_KEYWORD)
        if not alike(p, q) or moved:
            yield Row(theirs.__name__, name, shown(p, place), shown(q, other))


def optimizers(module: Any) -> list[Any]:
    found = (getattr(module, name) for name in sorted(dir(module)))
    return [c for c in found if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]


def section(title: str, theirs: list[Any]) -> list[str]:
    """A table of what differs, and the names of the classes where nothing does, or that are missing here."""
    found = [(c, getattr(rc.optim, c.__name__, None)) for c in theirs]
    table = {c.__name__: list(rows(c, ours)) for c, ours in found if ours is not None}
    same = ", ".join(f"`{name}`" for name, differs in table.items() if not differs)
    gone = ", ".join(f"`{c.__name__}`" for c, ours in found if ours is None)
    out = [f"## {title}", ""]
    out += [f"Nothing differs: {same}.", ""] * bool(same) + [f"Not here: {gone}.", ""] * bool(gone)
    out += ["| class | argument | there | here |", "|---|---|---|---|"]
    out += [f"| `{r.cls}` | `{r.argument}` | {r.theirs} | {r.here} |" for some in table.values() for r in some]
    return [*out, ""]


def page() -> str:
    bnb = importlib.import_module("bitsandbytes")
    torchs = [getattr(torch.optim, name) for name in TORCH]
    lines = section(f"torch.optim {torch.__version__.partition('+')[0]}", torchs)
    lines += section(f"bitsandbytes {bnb.__version__}", optimizers(bnb.optim))
    return "\n".join([HEAD, *lines]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
