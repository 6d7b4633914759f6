"""`python -m tests.conform.field_gpu --commit ...` asks peers on a GPU and writes docs/bench/field_gpu.json.

Every scorecard and every reproduction is a process of its own: one that brings its device down takes no other along.
`python -m tests.conform.field` puts the file's rows and the reproductions that held on the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.conform.gpu_deviations import DEVIATIONS, GpuDeviation
from tests.conform.peers import ON_GPU, Peer

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / "docs/bench/field_gpu.json"
PACKAGES = ("bitsandbytes", "torchao", "flashoptim", "torch", "triton", "numpy")
CARD = """
import json, sys
from refopt import conform
target, claim, options = json.loads(sys.argv[1])
report = conform.run(target, claim, device="cuda", **options)
print("@@@" + report.json())
"""


class Done(NamedTuple):
    """How a process ended: what it printed, and the last line of what went wrong."""

    out: str
    error: str


def ran(code: str, *argv: str, limit: float = 240.0) -> Done:
    """A process of its own, from the project's root."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return Done("", f"not over after {limit:g} s")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Done(done.stdout.strip(), last if done.returncode else "")


def scored(peer: Peer) -> dict[str, Any]:
    """One scorecard: the findings, without what they rest on; or why there is none."""
    done = ran(CARD, json.dumps([peer.target, peer.claim, peer.options]))
    row: dict[str, Any] = {"target": peer.target, "claim": peer.claim, "options": peer.options}
    if done.error:
        return row | {"error": done.error}
    report = json.loads(done.out.partition("@@@")[2])
    keep = ("mode", "worst_ulps", "equal_bits")
    for f in report["findings"]:
        f["data"] = {n: x for n, x in f["data"].items() if n in keep}
    return row | {"seconds": report["seconds"], "findings": report["findings"]}


def shown(d: GpuDeviation) -> dict[str, Any]:
    """One reproduction: what it printed, and whether that shows what its text says."""
    done = ran(d.code)
    return {"title": d.title, "code": d.code, "printed": done.out, "error": done.error, "holds": d.holds(done.out)}


def held() -> dict[str, Any] | None:
    """What was measured, None if nothing was."""
    return json.loads(FOUND.read_text("utf-8")) if FOUND.is_file() else None


def device() -> dict[str, str]:
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"device": name, "cuda": str(torch.version.cuda), "python": platform.python_version(), **versions}


def measured(commit: str, jobs: int) -> dict[str, Any]:
    """Everything, `jobs` processes at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        rows, reproductions = pool.map(scored, ON_GPU), pool.map(shown, DEVIATIONS)
        found = {"commit": commit, **device(), "rows": list(rows), "reproductions": list(reproductions)}
    return found


def summary(found: dict[str, Any]) -> Iterator[str]:
    """A line a scorecard and a line a reproduction."""
    for row in found["rows"]:
        failed = sorted(
            {f"{f['level']}/{f['setting']}/{f['id']}" for f in row.get("findings", ()) if f["status"] == "fail"}
        )
        yield f"{row['target']:<36} {row.get('error') or ' '.join(failed) or 'conforms'}"
    for r in found["reproductions"]:
        yield f"{'holds' if r['holds'] else 'DOES NOT HOLD':<14} {r['title']}: {r['error'] or r['printed']}"


def main() -> int:
    """0 where bitsandbytes' order of decay was named, 1 where it was not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--commit", required=True, help="the commit that is measured")
    parser.add_argument("--jobs", type=int, default=6, help="processes at a time (default: 6)")
    parser.add_argument("--out", type=Path, default=FOUND)
    args = parser.parse_args()
    if not device()["device"]:
        parser.error("there is no GPU")
    found = measured(args.commit, args.jobs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print("\n".join(summary(found)))
    ids = {f["id"] for row in found["rows"] if "bitsandbytes" in row["target"] for f in row.get("findings", ())}
    return 0 if any("decay-order-after" in id for id in ids) else 1


if __name__ == "__main__":
    sys.exit(main())
