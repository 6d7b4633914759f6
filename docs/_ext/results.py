"""What docs/bench/results.csv holds, on a page.

`{measured}`       the table of the landing page, as `figures.py` makes it
`{results}`        its rows, newest first; `:bench:` names the scripts whose rows are shown, `:without:` those left out
`{convergence}`    held-out loss of the newest job at GPT-2-small's size: mean and noise of seeds, differences in pairs
`{finetune}`       held-out loss of each fine-tuning of SmolLM2 before and after, likewise; bytes at the peak
`{plot} NAME`      docs/bench/NAME.svg, which `python -m tests.bench.plots` draws; the content says what it shows

Each says so where there is nothing yet.
"""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from figures import HEAD, PATH, grid, measured, rows
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FOLDER = PATH.parent
SHOWN = ("bench", "work", "subject", "metric", "value", "unit", "ratio", "baseline", "date", "commit", "device")
BASELINE = "torch.AdamW"
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Student's t: the 95 % interval of a mean of one value more than this."""


class Written(SphinxDirective):
    """A directive whose lines are made from the csv."""

    has_content = True

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(PATH))
        node = nodes.container()
        self.state.nested_parse(StringList(self.lines(), source=self.env.docname), 0, node)
        return self.shown(node)

    def shown(self, node: nodes.container) -> list[nodes.Node]:
        return node.children


class Measured(Written):
    def lines(self) -> list[str]:
        return grid(HEAD, measured(rows()))


class Results(Written):
    """Its node has the class `rows`, which the style sheet shows in a window of its own."""

    option_spec: ClassVar[Any] = {"bench": directives.unchanged, "without": directives.unchanged}

    def lines(self) -> list[str]:
        wanted, without = (self.options.get(name, "").split() for name in ("bench", "without"))
        return table([r for r in rows()[::-1] if r["bench"] in (wanted or [r["bench"]]) and r["bench"] not in without])

    def shown(self, node: nodes.container) -> list[nodes.Node]:
        node["classes"].append("rows")
        return [node]


class Convergence(Written):
    def lines(self) -> list[str]:
        return convergence(rows())


class Finetune(Written):
    def lines(self) -> list[str]:
        return finetune(rows())


class Plot(Written):
    required_arguments = 1

    def lines(self) -> list[str]:
        path = FOLDER / f"{self.arguments[0]}.svg"
        if not path.exists():
            return [f"*Not drawn yet: {' '.join(self.content)}*"]
        return [f"![{' '.join(self.content)}](/bench/{path.name})"]


def table(found: list[dict[str, str]]) -> list[str]:
    if not found:
        return ["*No row has been recorded yet.*"]
    return grid(SHOWN, [tuple(r[c] for c in SHOWN) for r in found])


def convergence(found: list[dict[str, str]]) -> list[str]:
    """A sentence about the job, and a line for each subject."""
    some = [r for r in found if r["bench"] == "convergence" and r["metric"] == "loss"]
    if not some:
        return ["*No run has been recorded yet.*"]
    last = some[-1]
    key = last["work"], last["device"]
    losses: dict[str, dict[str, float]] = {}
    for r in some:
        if (r["work"], r["device"]) == key:
            subject, _, seed = r["subject"].rpartition(" seed ")
            losses.setdefault(subject, {})[seed] = float(r["value"])
    state = {
        r["subject"].rpartition(" seed ")[0]: r["value"]
        for r in found
        if r["bench"] == "convergence" and r["metric"] == "bytes_per_param" and (r["work"], r["device"]) == key
    }
    head = ("optimizer", "held-out loss", "deviation", "seeds", f"minus {BASELINE}, seed by seed", "state, B/param")
    base = losses.get(BASELINE, {})
    lines = [
        (f"`{s}`", f"{mean(by.values()):.4f}", noise(by), str(len(by)), beside(s, by, base), state.get(s, ""))
        for s, by in losses.items()
    ]
    said = f"Job `{last['work']}` on {last['device']}, {last['date']}, commit {last['commit']}; nats a byte."
    missing = "" if all(len(by) >= 3 for by in losses.values()) and len(losses) >= 6 else " Not all runs are there yet."
    return [said + missing, "", *grid(head, lines)]


def finetune(found: list[dict[str, str]]) -> list[str]:
    """A sentence about each job, and a line for each method: those of most seeds first, then the newest."""
    some = [r for r in found if r["bench"] == "finetune" and r["metric"] == "loss"]
    if not some:
        return ["*No run has been recorded yet.*"]
    lasts = {(r["work"], r["device"]): r for r in some}
    jobs = [_job(found, lasts[key]) for key in dict.fromkeys((r["work"], r["device"]) for r in reversed(some))]
    return [line for _, lines in sorted(jobs, key=lambda job: -job[0]) for line in ("", *lines)][1:]


def _job(found: list[dict[str, str]], last: dict[str, str]) -> tuple[int, list[str]]:
    """How many seeds each way has at least in the job that `last` is a row of, and its lines."""
    of = {
        metric: _by_seed(found, metric, last)
        for metric in ("loss", "loss before", "trained", "s_per_step", "peak_bytes", "frozen_bytes")
    }
    head = ("method", "before", "after", "deviation", "seeds", "minus LoRA, seed by seed")
    head += ("trained weights", "frozen weights, MB", "peak, GB", "s/step")
    lines = []
    for method, by in of["loss"].items():
        means = {name: mean(values[method].values()) for name, values in of.items() if method in values}
        pairs = beside(method, by, of["loss"].get("lora", {}), "lora")
        peak = f"{means['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in means else ""
        cells = (f"`{method}`", f"{means['loss before']:.4f}", f"{means['loss']:.4f}", noise(by), str(len(by)), pairs)
        sizes = (f"{means['trained']:,.0f}", f"{means['frozen_bytes'] / 1e6:.1f}", peak, f"{means['s_per_step']:.3g}")
        lines.append((*cells, *sizes))
    said = f"Job `{last['work']}` on {last['device']}, {last['date']}, commit {last['commit']}; nats a token."
    seeds = {len(by) for by in of["loss"].values()}
    full = len(seeds) == 1 and len(of["loss"]) >= 3
    return min(seeds), [said + ("" if full else " Not all runs are there yet."), "", *grid(head, lines)]


def _by_seed(found: list[dict[str, str]], metric: str, last: dict[str, str]) -> dict[str, dict[str, float]]:
    """{subject: {seed: newest value}} of the job that `last` is a row of."""
    out: dict[str, dict[str, float]] = {}
    for r in found:
        if all(r[key] == last[key] for key in ("bench", "work", "device")) and r["metric"] == metric:
            subject, _, seed = r["subject"].rpartition(" seed ")
            out.setdefault(subject, {})[seed] = float(r["value"])
    return out


def noise(by_seed: dict[str, float]) -> str:
    """The standard deviation over seeds."""
    return f"{stdev(by_seed.values()):.4f}" if len(by_seed) > 1 else "one seed"


def beside(subject: str, by_seed: dict[str, float], base: dict[str, float], baseline: str = BASELINE) -> str:
    """The mean difference with its 95 % interval, of the seeds that both have."""
    pairs = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
    if subject == baseline or not pairs:
        return ""
    if len(pairs) < 2:
        return f"{pairs[0]:+.4f}"
    half = T95.get(len(pairs) - 1, 1.96) * stdev(pairs) / len(pairs) ** 0.5
    return f"{mean(pairs):+.4f} ± {half:.4f}"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("measured", Measured)
    app.add_directive("results", Results)
    app.add_directive("convergence", Convergence)
    app.add_directive("finetune", Finetune)
    app.add_directive("plot", Plot)
    return {"parallel_read_safe": True}
