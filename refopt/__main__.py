"""The command line: `trace` and `plan` need NumPy alone; `train` and `convert` import their packages when called."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "trace": "print a rule's equations with the numbers in them (NumPy alone)",
    "plot": "draw a codec's values, spacing and errors, or all codecs side by side (matplotlib)",
    "plan": "which optimizer fits a model on a GPU: bytes, milliseconds, lines to copy (NumPy; matplotlib to draw)",
    "vectors": "print the golden vectors as JSON, for implementations in other languages (NumPy alone)",
    "conform": "compare an optimizer with the reference, and name its dialect (NumPy; torch for a torch optimizer)",
    "train": "train a small language model once per optimizer and compare (refopt[train])",
    "convert": "optimizer states from one library's file to another's (refopt[convert])",
    "finetune": "fine-tune a model of transformers in 4 bits, with adapters (refopt[finetune])",
}
LATER = {
    "train": "refopt_cuda.train.cli",
    "convert": "refopt_cuda.convert.cli",
    "finetune": "refopt_cuda.train.finetune.cli",
}
"""Commands that need more than NumPy: imported when they are called."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for input that cannot be used."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print("usage: refopt COMMAND ...\n")
        print("\n".join(f"  {name:<8} {what}" for name, what in COMMANDS.items()))
        return 0
    if args[0] == "trace":
        from refopt.tracing import main as trace

        return trace(args[1:])
    if args[0] == "plot":
        from refopt.plot import main as plot

        return plot(args[1:])
    if args[0] == "plan":
        from refopt.planner.command import main as plan

        return plan(args[1:])
    if args[0] == "vectors":
        from refopt.vectors import main as vectors

        return vectors(args[1:])
    if args[0] == "conform":
        from refopt.conform.cli import main as conform

        return conform(args[1:])
    if args[0] in LATER:
        return later(args[0], args[1:])
    print(f"refopt: no command {args[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def later(name: str, argv: list[str]) -> int:
    """A command of `refopt_cuda`, or one sentence about the package that it lacks."""
    try:
        run = importlib.import_module(LATER[name]).main
    except ModuleNotFoundError as error:
        need = f"which is not installed: pip install 'refopt[{name}]'"
        print(f"refopt {name} needs {error.name}, {need}", file=sys.stderr)
        return 2
    return int(run(argv))


if __name__ == "__main__":
    sys.exit(main())
