"""What only a GPU can show: the tests marked `gpu`, and a small run of the kernels that compute-sanitizer watches.

    python -m tests.gpu [--workers 8] [--tools memcheck,racecheck,initcheck,synccheck] [--logs FOLDER] [-- PYTEST_ARGS]

All of them run beside each other. Tests that fail so are run once more alone, since memory and time are shared before:
what fails again has failed. Ends with a line each, and 1 where one failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
SANITIZER = "compute-sanitizer"


def watched(tool: str) -> list[str]:
    """The small run under one tool."""
    small = [sys.executable, "-m", "tests.kernels.small"]
    return [SANITIZER, "--tool", tool, "--target-processes", "all", *small]


def tests(*more: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *more, "tests"]


def started(name: str, command: Sequence[str], logs: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"REFOPT_REQUIRE_GPU": "1"}
    with (logs / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def verdict(name: str, code: int, logs: Path) -> str:
    """ "ok", or what the log ends with."""
    text = (logs / f"{name}.log").read_text(errors="replace")
    clean = name not in TOOLS or {*SUMMARY.findall(text)} == {"0"}
    return "ok" if code == 0 and clean else "FAILED\n" + "\n".join(text.splitlines()[-40:])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8, help="processes that take tests")
    parser.add_argument("--tools", default=",".join(TOOLS), help="of compute-sanitizer; empty for none")
    parser.add_argument("--logs", type=Path, help="a folder for what each of them prints")
    parser.add_argument("pytest", nargs="*", help="for pytest, behind --")
    args = parser.parse_args(argv)
    tools = [tool for tool in args.tools.split(",") if tool]
    if unknown := sorted({*tools} - {*TOOLS}):
        parser.error(f"--tools: no such tool: {', '.join(unknown)}; there are {', '.join(TOOLS)}")
    if tools and shutil.which(SANITIZER) is None:
        parser.error(f"{SANITIZER} is not on PATH; --tools '' leaves it out")
    logs = args.logs or Path(tempfile.mkdtemp(prefix="refopt-gpu-"))
    logs.mkdir(parents=True, exist_ok=True)
    start, results = time.monotonic(), dict[str, str]()
    running = {tool: started(tool, watched(tool), logs) for tool in tools}
    shared = tests("-n", str(args.workers), "--dist", "worksteal", *args.pytest)
    code = started("tests", shared, logs).wait()
    for tool, process in running.items():
        results[tool] = verdict(tool, process.wait(), logs)
    results["tests"] = verdict("tests", code, logs)
    if code == 1:  # tests failed, and nothing else
        again = started("alone", tests("-n", "0", "--lf", *args.pytest), logs).wait()
        results["alone"] = verdict("alone", again, logs)
    for name, found in results.items():
        print(f"{name:<10} {found}")
    print(f"{time.monotonic() - start:.0f} s; logs in {logs}")
    bad = [name for name, found in results.items() if found != "ok" and not (name == "tests" and "alone" in results)]
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
