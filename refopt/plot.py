"""`refopt plot`: what codecs do to numbers, drawn. With a name, that codec; without, all of them side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from refopt import codecs
from refopt.assign import lookup
from refopt.curves import errors, largest_update, levels, real_states
from refopt.spec import Codec

BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#7F7F7F", "#D55E00"
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
}
FOR_WEIGHTS = ("nf4", "fp4", "double")
"""Made for frozen weights; a state may take them, and should not."""
DECADES = (0.5, 1.0, 2.0, 3.0, 4.0)


def states_codecs() -> dict[str, Codec]:
    """Every codec that a state may take."""
    return {stem: c for stem, c in codecs.CODECS.items() if not c.weights and stem != "f32"}


def unsigned(codec: Codec) -> Codec:
    """The codec as a second moment takes it."""
    return codec(signed=False) if codec.unsigned else codec


def draw_codec(codec: Codec) -> Any:
    """Four panels: values, spacing, error, and a real second moment before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    values, gaps, error, real = figure.subplots(2, 2).flat
    x = levels(codec)
    many = x.size > 4096
    values.plot(np.arange(x.size), x, "-" if many else ".", ms=3, color=BLUE)
    values.set(title=f"{x.size:,} values of {codec.stem}", xlabel="in order", ylabel="value / largest of the block")
    up = x[x >= 0]
    gaps.loglog(up[1:], np.diff(up), "-" if many else ".", ms=4, color=BLUE)
    gaps.set(title="Spacing", xlabel="value / largest of the block", ylabel="distance to the value below")
    at, relative = errors(codec)
    error.loglog(at, np.maximum(relative, 1e-9), lw=0.8, color=BLUE)
    error.axhline(1, color=RED, lw=0.8, ls=":")
    error.annotate("1: became zero", (1e-8, 1.15), color=RED)
    error.set(title="Relative error", xlabel="magnitude / largest of the block", ylabel="|error| / magnitude")
    error.set_ylim(max(1e-5, float(np.median(relative)) / 50), 4)
    _draw_real(real, unsigned(codec))
    figure.suptitle(f"{codec.stem}: {codec.title} ({codec.source})", x=0.01, ha="left")
    return figure


def _draw_real(axes: Any, codec: Codec) -> None:
    """Histograms of a real v, exact and decoded."""
    _, v = real_states()
    kept = codec.encode(v).decode()
    bins = np.linspace(-24, 0, 73)
    for x, color, name, fill in ((v, GREY, "exact", True), (kept, BLUE, f"through {codec.stem}", False)):
        some = np.log10(x[x > 0])
        style = {"histtype": "stepfilled" if fill else "step", "alpha": 0.45 if fill else 1, "lw": 1.4}
        axes.hist(some, bins, color=color, label=name, **style)
    lost = np.mean((kept <= 0) & (v > 0)) / np.mean(v > 0)
    axes.set(title=f"v of a real model: {lost:.1%} became zero", xlabel="log10 of v", ylabel="weights")
    axes.legend(loc="upper left")


def draw_all() -> Any:
    """Two panels: the largest update that a coded v causes, and what becomes of a real v."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    why, real = figure.subplots(1, 2)
    shown = {stem: unsigned(c) for stem, c in states_codecs().items() if stem not in FOR_WEIGHTS}
    marks, colors = "osD^vP*X", [RED, BLUE, "#009E73", ORANGE, "#56B4E9", "#CC79A7", "#000000", GREY]
    order = sorted(shown, key=lambda stem: -largest_update(shown[stem], 4))
    for stem, mark, color in zip(order, marks, colors, strict=False):
        y = [largest_update(shown[stem], d) for d in DECADES]
        why.semilogy(DECADES, y, marker=mark, ms=5, color=color, label=stem)
    why.semilogy(DECADES, [largest_update(None, d) for d in DECADES], color="black", ls=":", label="exact v")
    why.set(title="Why a second moment must not be linear", xlabel="decades between gradients in a block")
    why.set_ylabel("largest update / lr, 300 steps of Adam")
    figure.legend(*why.get_legend_handles_labels(), loc="outside lower left", ncols=8)
    _draw_bars(real, shown)
    return figure


def _draw_bars(axes: Any, shown: dict[str, Codec]) -> None:
    """For each codec the share of a real v that becomes zero, and the median relative error of the rest."""
    _, v = real_states()
    some = v > 0
    lost, rough = {}, {}
    for stem, codec in shown.items():
        kept = codec.encode(v).decode()
        lost[stem] = float(np.mean(kept[some] <= 0))
        rough[stem] = float(np.median(np.abs(kept[some] - v[some]) / v[some]))
    order = sorted(shown, key=lambda stem: (rough[stem], lost[stem]))
    y = np.arange(len(order))
    axes.barh(y + 0.2, [rough[s] for s in order], 0.4, color=BLUE, label="median relative error")
    axes.barh(y - 0.2, [lost[s] for s in order], 0.4, color=RED, label="share that became zero")
    axes.set_yticks(y, order)
    axes.invert_yaxis()
    axes.set(title="v of a real model through each codec", xlim=(0, 1.05))
    axes.legend(loc="center right")


def main(argv: list[str]) -> int:
    """`refopt plot [CODEC] [--out FILE]`: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="refopt plot", description="Draw what codecs do to numbers.")
    parser.add_argument("codec", nargs="?", help=f"one of {', '.join(states_codecs())}; all of them if none is named")
    parser.add_argument("--out", help="file to write, .png or .svg (default: CODEC.png)")
    args = parser.parse_args(argv)
    try:
        codec = args.codec and lookup("codec", codecs.CODECS, args.codec)
        if codec and (codec.weights or codec.stem == "f32"):
            raise ValueError(f"{codec.stem} stores weights; there are {', '.join(states_codecs())}")
        out = Path(args.out or f"{codec.stem if codec else 'codecs'}.png")
        if out.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--out must end in .png, .svg or .pdf, got {args.out!r}")
        from matplotlib import rc_context

        with rc_context(STYLE):
            (draw_codec(codec) if codec else draw_all()).savefig(out, dpi=120)
    except (ValueError, OSError) as error:
        print(f"refopt plot: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"refopt plot needs {error.name}, which is not installed: pip install matplotlib", file=sys.stderr)
        return 2
    print(out)
    return 0
