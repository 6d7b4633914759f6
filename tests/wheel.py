"""What a built wheel must hold: every source file of both packages, the CUDA sources and the type markers among them.

Usage: python -m tests.wheel dist/refopt-0.1.0-py3-none-any.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("refopt", "refopt_cuda")
SHIPPED = {".py", ".cu", ".cuh", ".j2", ".html", ".json", ".typed"}


def expected(root: Path = ROOT) -> set[str]:
    """Paths, from the root, of everything that belongs in the wheel."""
    files = (f for package in PACKAGES for f in (root / package).rglob("*"))
    return {f.relative_to(root).as_posix() for f in files if f.suffix in SHIPPED or f.name == "py.typed"}


def belongs(name: str) -> bool:
    """Whether a path in the wheel is of one of the two packages or of the metadata."""
    top = name.split("/")[0]
    return top in PACKAGES or top.endswith(".dist-info")


def main(wheel: str) -> int:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    missing, extra = expected() - held, {n for n in held if not belongs(n)}
    for name in sorted(missing):
        print(f"{wheel}: {name} is not inside", file=sys.stderr)
    for name in sorted(extra):
        print(f"{wheel}: {name} does not belong inside", file=sys.stderr)
    cuda = sum(n.endswith((".cu", ".cuh")) for n in held)
    print(f"{len(held)} files, {cuda} of them CUDA sources")
    return int(bool(missing or extra or not cuda))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
