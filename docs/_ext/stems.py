"""`{stem} rules/lion`: the page of a rule, codec or place, made of its module, its record and its kernels.

With `:only: words` what its module and record say, with `:only: code` the rest: a page of a place has its use between.
`{records} rules`: all records of a row of the map. No equation, default or byte count is typed twice.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import refopt

ROOT = Path(__file__).parents[2]
RECORDS: dict[str, dict[str, Any]] = {
    "rules": refopt.rules.RULES,
    "codecs": refopt.codecs.CODECS,
    "places": refopt.places.PLACES,
}
BODY = {"rules": ("init", "update"), "codecs": ("pack", "unpack"), "places": ("pages", "peak")}


class Generated(SphinxDirective):
    """A directive whose content is MyST text made by `text`."""

    required_arguments = 1

    def text(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        node = nodes.container()
        self.state.nested_parse(StringList(self.text(), source=self.env.docname), 0, node)
        return node.children


class Stem(Generated):
    option_spec: ClassVar[Any] = {"only": lambda said: directives.choice(said, ("words", "code"))}

    def text(self) -> list[str]:
        row, stem = self.arguments[0].split("/")
        self.env.note_dependency(str(ROOT / f"refopt/{row}/{stem}.py"))
        parts = {"words": words, "code": source}
        chosen = [self.options["only"]] if "only" in self.options else parts
        return [line for name in chosen for line in parts[name](row, stem)]


def words(row: str, stem: str) -> list[str]:
    """What the module says, and its record."""
    module = ["```{eval-rst}", f".. automodule:: refopt.{row}.{stem}", "```", ""]
    return [*module, *facts(row, RECORDS[row][stem])]


def source(row: str, stem: str) -> list[str]:
    """The reference's functions, and the files of the same stem in refopt_cuda."""
    out: list[str] = []
    for name in BODY[row]:
        title = f"`{name}`, as the reference computes it"
        out += code(title, inspect.getsource(getattr(RECORDS[row][stem], name)), f"refopt/{row}/{stem}.py")
    return out + forms(row, stem)


class Combinations(SphinxDirective):
    """`{combinations}`: which rules, codecs and formats of weights have kernels, and why the others have none."""

    def run(self) -> list[nodes.Node]:
        node = nodes.container()
        self.state.nested_parse(StringList(combinations(), source=self.env.docname), 0, node)
        return node.children


def combinations() -> list[str]:
    """Two tables: what a state is kept in under each rule, and what weights are kept in."""
    from refopt_cuda.codecs import FROZEN, STATES, WEIGHTS
    from refopt_cuda.optim.settings import WITHOUT
    from refopt_cuda.rules import RULES

    rules, codecs = RECORDS["rules"], RECORDS["codecs"]
    out = [f"| rule | scope | other places | {' | '.join(STATES)} |", "|---|---|---|" + "---|" * len(STATES)]
    for stem, record in rules.items():
        mark = "yes" if stem in RULES else decoded(stem)
        where = ", ".join(f"`{place}`" for place in places(stem)) or "none"
        marks = " | ".join([where, *[mark] * len(STATES)])
        out.append(f"| [{stem}](rules/{stem}.md) | {record.scope} | {marks} |")
    out += ["", "Where letters stand, these states are decoded for a step and encoded behind it; the rest are float32."]
    out += ["A rule with a dash runs in the reference alone.", ""]
    out += ["| format of weights | bits | what lies beside a bfloat16 word |", "|---|---|---|"]
    out += ["| float32, bfloat16, float16 | 32, 16, 16 | nothing |"]
    for stem in WEIGHTS:
        parts = codecs[stem].parts[1:]
        beside = ", ".join(f"`{part.name}`" for part in parts) or "nothing; random bits by the element's number"
        bits = 16 + sum(8 * np.dtype(part.dtype).itemsize for part in parts)
        out.append(f"| [{stem}](codecs/{stem}.md) | {bits} | {beside} |")
    frozen = ", ".join(f"[{stem}](codecs/{stem}.md)" for stem in FROZEN)
    out += ["", f"{frozen} keep weights that are not trained (`refopt_cuda.quantize`), and so does `double`.", ""]
    out += ["| without a kernel for states | because |", "|---|---|"]
    out += [f"| [{stem}](codecs/{stem}.md) | {why} |" for stem, why in WITHOUT.items()]
    return [
        *out,
        "| `q4` by rows and columns, `fp8` by tensors | a scale is known when the whole tensor has been seen |",
        "",
    ]


CLASSES = {"muon": "Muon", "sm3": "SM3", "galore": "GaLoreAdamW", "apollo": "APOLLOAdamW"}
CLASSES |= {"schedule_free": "ScheduleFreeAdamW"}
"""Of rules whose drop-ins are classes of their own."""


def places(stem: str) -> tuple[str, ...]:
    """Where states of a rule may live but beside the weights."""
    from refopt_cuda import optim
    from refopt_cuda.kernels.whole_rules import WHOLE
    from refopt_cuda.optim import placing, whole_places
    from refopt_cuda.rules import RULES

    if stem in RULES:
        return placing.KNOWN[1:]
    whole = stem in WHOLE or (stem in CLASSES and getattr(optim, CLASSES[stem]).places)
    return whole_places.PLACES[1:] if whole else ()


def decoded(stem: str) -> str:
    """The states of a rule of whole tensors or matrices that may be coded, "-" where the rule has no fast path."""
    from refopt_cuda import optim
    from refopt_cuda.kernels.whole_rules import WHOLE, forms

    if stem in WHOLE:
        return ", ".join(f"`{n}`" for n in dict.fromkeys(n for form in forms(stem) for n in form.elements))
    cls = CLASSES.get(stem)
    return ", ".join(f"`{name}`" for name in getattr(optim, cls).codable) if cls else "-"


def facts(row: str, record: Any) -> list[str]:
    """What the record says beyond the module's text."""
    if row == "rules":
        head = ["| argument | in the paper | default | range | meaning | in torch.optim |", "|---|---|---|---|---|---|"]
        states = "; ".join(f"`{s.name}` ({s.doc}{f'; torch: `{s.torch}`' if s.torch else ''})" for s in record.states)
        promise = f"Scope: {record.scope}. Tier: {record.tier}. States: {states}."
        return [*head, *(hyper(h) for h in record.hypers), "", promise, ""]
    if row == "codecs":
        sizes = ", ".join(f"{record.nbytes(shape):,} for {shape}" for shape in [(4096,), (1024, 1024)])
        return [f"Scope: {record.scope}. Stored bytes: {sizes}.", ""]
    return []


def hyper(h: Any) -> str:
    if isinstance(h.default, bool) or h.choices:
        bounds = ", ".join(map(repr, h.choices or (True, False)))
    else:
        low = "" if h.low is None else f">= {h.low:g}"
        bounds = ", ".join(filter(None, [low, "" if h.high is None else f"< {h.high:g}"]))
    torch = f"`{h.torch or h.name}`" if h.torch or h.name == "lr" else ""
    return f"| `{h.name}` | {h.symbol} | {h.default!r} | {bounds} | {h.doc} | {torch} |"


def forms(row: str, stem: str) -> list[str]:
    """The files of the same stem in refopt_cuda, as they are."""
    out: list[str] = []
    homes = {".py": "One element, as Numba compiles it", ".cuh": "One element, as CUDA compiles it"}
    if row == "places":
        homes = {".py": "What moves when, on the fast path"}
    for suffix, title in homes.items():
        path = ROOT / f"refopt_cuda/{row}/{stem}{suffix}"
        if path.exists():
            out += code(title, path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
    return out


def code(title: str, text: str, path: str) -> list[str]:
    language = "cuda" if path.endswith(".cuh") else "python"
    head = [":::{rubric} " + title, ":::", "", "```{code-block} " + language, f":caption: {path}", ""]
    return [*head, *text.rstrip().splitlines(), "```", ""]


class Table(Generated):
    def text(self) -> list[str]:
        row = self.arguments[0]
        out = ["| stem | what | source |", "|---|---|---|"]
        return out + [f"| [{s}]({s}.md) | {r.title} | {r.source} |" for s, r in RECORDS[row].items()]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("stem", Stem)
    app.add_directive("records", Table)
    app.add_directive("combinations", Combinations)
    return {"parallel_read_safe": True}
