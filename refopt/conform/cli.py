"""`refopt conform TARGET --as RULE`: test an optimizer from the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from refopt.conform.engine import run
from refopt.conform.report import LEVELS, excepted, page, patterns
from refopt.conform.settings import valued


def arguments(parser: Any) -> None:
    """The options that the command and the pytest plugin share; `parser` is argparse's or a pytest group."""
    add = getattr(parser, "addoption", None) or parser.add_argument
    add("--as", dest="claim", metavar="RULE", help="the rule that it is said to follow: adamw, 'adam(decay=decoupled)'")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of a torch optimizer's constructor")
    add("--levels", default=",".join(LEVELS), help="those to run, L0 to L7 (default: all)")
    add("--weights", default=None, help="formats of weights: float32,bfloat16 (default: all that the target has)")
    add("--exceptions", metavar="FILE", help="lines level/setting/id that may fail")
    add("--compiled", action="store_true", help="let steps compile themselves (torch.compile)")
    add("--device", default="cpu", help="where a torch optimizer's weights are (default: cpu)")


def asked(target: str, claim: str, args: Any) -> Any:
    """The report that the options ask for."""
    options: dict[str, Any] = {}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option takes name=value, got {text!r}")
        options[name] = valued(value)
    if args.device != "cpu" or args.compiled:
        options |= {"device": args.device, "compiled": args.compiled}
    levels = [x.strip() for x in args.levels.split(",")]
    unknown = [x for x in levels if x not in LEVELS]
    if unknown:
        raise ValueError(f"--levels: no level {', '.join(unknown)}; there are {', '.join(LEVELS)}")
    dtypes = args.weights and args.weights.split(",")
    allowed = patterns(args.exceptions) if args.exceptions else []
    report = run(target, claim, only=levels, dtypes=dtypes, **options)
    return excepted(report, allowed)


def main(argv: list[str]) -> int:
    """0 where nothing fails, 1 where something does, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="refopt conform", description="Compare an optimizer with the reference.")
    parser.add_argument("target", help="module:Name of a torch optimizer, or of a refopt.conform.Target")
    arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write every finding")
    parser.add_argument("--html", metavar="FILE", help="write a scorecard")
    args = parser.parse_args(argv)
    try:
        if not args.claim:
            raise ValueError("say which rule it follows: --as adamw")
        report = asked(args.target, args.claim, args)
        for path, text in ((args.json, report.json()), (args.html, page([report], f"{args.target} as {args.claim}"))):
            if path:
                Path(path).write_text(text, "utf-8")
    except (ValueError, TypeError, OSError) as error:
        print(f"refopt conform: {error}", file=sys.stderr)
        return 2
    print(report.text())
    return 0 if report.ok else 1
