"""What a run of the suite found, as text, JSON or a page; and the exceptions that an outsider allows."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

LEVELS = {
    "L0": "smoke",
    "L1": "rule",
    "L2": "trajectory",
    "L3": "codec",
    "L4": "place",
    "L5": "persistence",
    "L6": "special values",
    "L7": "memory",
}
STATUSES = ("pass", "fail", "skip", "excepted")


@dataclass(frozen=True)
class Finding:
    """One answer: `status` is pass, fail, skip or excepted; `id` the diagnosis ("" where nothing was to be said);
    `text` a sentence; `data` what it rests on."""

    level: str
    setting: str
    status: str
    id: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What an exception is matched with: level/setting/id."""
        return f"{self.level}/{self.setting}/{self.id or self.status}"

    def __str__(self) -> str:
        return f"{self.status:<8} {self.key:<44} {self.text}"


@dataclass
class Report:
    """Every finding about one target, `claim` being the rule that it is said to follow."""

    target: str
    claim: str
    findings: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not any(f.status == "fail" for f in self.findings)

    @property
    def ids(self) -> set[str]:
        """The diagnoses of what failed."""
        return {f.id for f in self.findings if f.status == "fail"}

    def of(self, level: str) -> list[Finding]:
        return [f for f in self.findings if f.level == level]

    def worst(self, level: str) -> str:
        """The level in one word: fail before excepted before pass before skip; "" where it was not run."""
        have = {f.status for f in self.of(level)}
        return next((s for s in ("fail", "excepted", "pass", "skip") if s in have), "")

    def text(self) -> str:
        lines = [f"{self.target} as {self.claim}, {self.seconds:.1f} s"]
        lines += [str(f) for f in self.findings] + [f"warning: {w}" for w in self.warnings]
        counts = [f"{n} {s}" for s in STATUSES if (n := sum(f.status == s for f in self.findings))]
        return "\n".join([*lines, ", ".join(counts)])

    def json(self) -> str:
        return json.dumps(plain(asdict(self)), indent=1, allow_nan=False) + "\n"


def plain(x: Any) -> Any:
    """The same as JSON can hold it: numbers that are not finite, which it has no words for, as "nan" and "inf"."""
    if isinstance(x, dict):
        return {str(n): plain(y) for n, y in x.items()}
    if isinstance(x, list | tuple | set):
        return [plain(y) for y in x]
    if x is None or isinstance(x, str | bool | int):
        return x
    return float(x) if math.isfinite(x) else str(float(x))


def excepted(report: Report, patterns: Iterable[str]) -> Report:
    """The report with the failures that a pattern names excepted; a pattern that names none is warned about."""
    patterns = list(patterns)
    used: set[str] = set()
    out = []
    for f in report.findings:
        hit = next((p for p in patterns if fnmatch.fnmatchcase(f.key, p)), None) if f.status == "fail" else None
        used |= {hit} if hit else set()
        out.append(Finding(f.level, f.setting, "excepted", f.id, f.text, f.data) if hit else f)
    stale = [f"no failure is called {p}: take it off the exceptions" for p in patterns if p not in used]
    return Report(report.target, report.claim, out, report.warnings + stale, report.seconds)


def patterns(path: str | Path) -> list[str]:
    """The lines of a file of exceptions: level/setting/id, shell wildcards allowed, # begins a comment."""
    lines = (line.partition("#")[0].strip() for line in Path(path).read_text("utf-8").splitlines())
    return [line for line in lines if line]


def page(reports: list[Report], title: str = "Scorecard") -> str:
    """One page of HTML: a row a target, a column a level, then every finding."""
    template = Template((Path(__file__).parent / "scorecard.html").read_text("utf-8"))
    head = "".join(f'<th title="{LEVELS[n]}">{n}</th>' for n in LEVELS)
    rows = "".join(row(r) for r in reports)
    return template.substitute(title=escape(title), head=head, rows=rows, details="".join(detail(r) for r in reports))


def row(r: Report) -> str:
    cells = "".join(f'<td class="{r.worst(n)}">{r.worst(n)}</td>' for n in LEVELS)
    return f"<tr><td><code>{escape(r.target)}</code></td><td><code>{escape(r.claim)}</code></td>{cells}</tr>\n"


def detail(r: Report) -> str:
    lines = "".join(
        f'<tr><td class="{f.status}">{f.status}</td><td><code>{escape(f.key)}</code></td>'
        f"<td>{escape(f.text)}</td></tr>\n"
        for f in r.findings
    )
    return f"<h2><code>{escape(r.target)}</code> as <code>{escape(r.claim)}</code></h2>\n<table>\n{lines}</table>\n"
