"""The map holds: stems have their homes, nothing lives elsewhere, imports run downward, public names are documented."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import refopt

ROOT = Path(__file__).resolve().parents[1]
ROWS: dict[str, dict[str, Any]] = {
    "rules": refopt.rules.RULES,
    "codecs": refopt.codecs.CODECS,
    "places": refopt.places.PLACES,
}
STEMS = [(row, stem) for row, records in ROWS.items() for stem in records]

WITHOUT_KERNEL = {
    "codecs/fp8_expand",
    "codecs/double",
    "rules/apollo",
    "rules/galore",
    "rules/muon",
    "rules/sm3",
    "places/resident",
}
"""Stems that have no home in refopt_cuda yet. This list may only shrink."""

SHARED = {
    "refopt/codecs/blocks.py": "the block list that all block codecs cut tensors along",
    "refopt_cuda/codecs/forms.py": "the shapes of the scalar forms",
    "refopt_cuda/codecs/nibbles.py": "the search for the nearest of sixteen values, and two codes a byte",
    "refopt_cuda/codecs/nibbles.cuh": "the same",
    "refopt_cuda/places/lanes.py": "copies in, steps, copies out, and events between them",
    "refopt_cuda/places/slabs.py": "host memory that a device can copy from",
    "refopt_cuda/places/timeline.py": "when each copy and each step was",
    "refopt_cuda/places/files.py": "direct reads and writes of aligned pages",
    "refopt_cuda/places/records.py": "two versions of a page in a file",
    "refopt_cuda/places/vault.py": "a directory of them, stamped step by step",
    "tests/codecs/test_blocks.py": "laws of the block list",
    "tests/codecs/test_every_codec.py": "laws that hold for all of them",
    "tests/codecs/test_weights.py": "laws that formats of weights have in common",
    "tests/rules/test_every_rule.py": "laws that hold for all of them",
    "tests/rules/test_torch.py": "all rules beside torch.optim",
    "tests/places/laws.py": "laws that all places have in common",
    "tests/rules/test_every_whole_rule.py": "laws that hold for all that see whole tensors",
    "tests/rules/whole.py": "a small case of matrices, published as words",
    "tests/rules/adaptive.py": "laws that Adam and AdamW have in common",
}
"""Files of a row that belong to no single stem, and why."""

ORACLE = [["spec", "models", "accelerate"], ["scalars", "reduce", "rng", "lines"], ["rules", "codecs", "places"]]
ORACLE += [
    ["cells", "assign", "trees"],
    ["step"],
    ["partition"],
    ["trace", "memory", "qlora"],
    ["curves"],
    ["tracing", "plot", "vectors", "conform", "planner"],
    ["__main__"],
]
FAST = [["scalars", "random", "arrays"], ["rules", "codecs", "places"], ["kernels"], ["quantization"]]
FAST += [["optim", "nn", "functional"], ["convert"], ["train"]]
RANK = {f"refopt.{m}": k for k, level in enumerate(ORACLE) for m in level}
RANK |= {f"refopt_cuda.{m}": k for k, level in enumerate(FAST) for m in level}
UPWARD = {
    ("refopt.spec", "refopt.codecs.blocks"): "inside a method: a codec's record lists its blocks",
}
"""Imports that run upward or across, each inside a function, and why."""

MADE_OF = {
    "refopt.codecs.double": {"refopt.codecs.dynamic8", "refopt.codecs.fp4", "refopt.codecs.nf4"},
    "refopt.codecs.fp8_expand": {"refopt.codecs.fp8"},
}
"""Stems that are others put together, and which."""


OPTIONAL = {
    "plot.py": {"matplotlib"},
    "picture.py": {"matplotlib"},
    "accelerate.py": {"numba"},
    "torch_target.py": {"torch"},
    "plugin.py": {"pytest"},
    "test_conform.py": {"pytest"},
}
"""Packages that a file of the reference imports inside a function, where they are installed."""

BY_NAME = ("refopt.__main__", "refopt.conform.load")
"""Modules that import what they are told to: the command line, and the suite for other people's optimizers."""


def homes(row: str, stem: str) -> list[str]:
    """Every file that a stem must have."""
    fast = [f"refopt_cuda/{row}/{stem}.py"] + ([f"refopt_cuda/{row}/{stem}.cuh"] if row != "places" else [])
    kernels = [] if f"{row}/{stem}" in WITHOUT_KERNEL else fast
    return [f"refopt/{row}/{stem}.py", *kernels, f"tests/{row}/test_{stem}.py", f"docs/{row}/{stem}.md"]


@pytest.mark.parametrize(("row", "stem"), STEMS)
def test_every_stem_has_its_homes(row: str, stem: str) -> None:
    missing = [home for home in homes(row, stem) if not (ROOT / home).is_file()]
    assert not missing, f"{row}/{stem} lacks {', '.join(missing)}"


def test_a_stem_with_a_kernel_leaves_the_list_of_those_without() -> None:
    known = {f"{row}/{stem}" for row, stem in STEMS}
    assert known >= WITHOUT_KERNEL, f"no such stem: {WITHOUT_KERNEL - known}"
    stale = [s for s in WITHOUT_KERNEL if any((ROOT / f"refopt_cuda/{s}{e}").exists() for e in (".py", ".cuh"))]
    assert not stale, f"{stale} have a kernel now: take them off WITHOUT_KERNEL"


@pytest.mark.parametrize("row", ROWS)
def test_no_file_of_a_row_is_without_a_stem(row: str) -> None:
    trees = [ROOT / tree / row for tree in ("refopt", "refopt_cuda", "tests", "docs")]
    found = {f.relative_to(ROOT).as_posix() for t in trees for f in t.glob("*.*") if f.suffix != ".pyc"}
    frame = {f for f in found if Path(f).name in ("__init__.py", "conftest.py", "index.md")}
    owned = {home for stem in ROWS[row] for home in homes(row, stem)}
    orphans = found - frame - owned - SHARED.keys()
    assert not orphans, f"no record in refopt.{row} owns {sorted(orphans)}"


def test_shared_files_exist() -> None:
    gone = [path for path in SHARED if not (ROOT / path).is_file()]
    assert not gone, f"take {gone} off SHARED"


@pytest.mark.parametrize(("row", "stem"), STEMS)
def test_a_page_has_the_title_of_its_record(row: str, stem: str) -> None:
    title = ROWS[row][stem].title
    first, *rest = (ROOT / f"docs/{row}/{stem}.md").read_text("utf-8").splitlines()
    assert first == f"# {title[:1].upper()}{title[1:]}"
    assert f"```{{stem}} {row}/{stem}" in rest


@pytest.mark.parametrize("row", ROWS)
def test_a_row_exports_its_records_and_their_table(row: str) -> None:
    package = getattr(refopt, row)
    assert set(package.__all__) == {row.upper(), *ROWS[row]}
    for stem, record in ROWS[row].items():
        assert getattr(package, stem) is record
        assert record.stem == stem


def test_all_equals_what_the_docs_document() -> None:
    text = (ROOT / "docs/reference.md").read_text("utf-8")
    documented = set(re.findall(r"^\.\. auto\w+:: refopt\.(\w+)$", text, re.MULTILINE))
    assert documented == set(refopt.__all__) - set(ROWS)


def test_all_drop_ins_are_documented() -> None:
    text = (ROOT / "docs/optim.md").read_text("utf-8")
    documented = re.findall(r"^\.\. autoclass:: refopt_cuda\.optim\.(\w+)$", text, re.MULTILINE)
    names = [
        "Composed",
        "APOLLOAdamW",
        "APOLLOAdamW8bit",
        "GaLoreAdamW",
        "GaLoreAdamW8bit",
        "GlobalOptimManager",
        "InBackward",
        "Muon",
        "Muon8bit",
        "SM3",
    ]
    for file in ("names", "placed", "whole_names", "matrix_names", "schedule_free"):
        tree = ast.parse((ROOT / f"refopt_cuda/optim/{file}.py").read_text("utf-8"))
        (found,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        names += ast.literal_eval(found)
    assert sorted(documented) == sorted(names)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, lazy: bool = True) -> Iterator[str]:
    """Every module that a file imports; without `lazy`, those that importing the file imports at once."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (resolve(str(node.module), alias.name) for alias in node.names)


def resolve(module: str, name: str) -> str:
    """`from module import name`: the submodule `name` if there is one, else `module`."""
    base = ROOT.joinpath(*module.split("."))
    return f"{module}.{name}" if (base / f"{name}.py").exists() or (base / name).is_dir() else module


def rank(module: str) -> int | None:
    return RANK.get(".".join(module.split(".")[:2]))


def allowed(source: str, target: str) -> bool:
    """Whether `source` may import `target`, both of one package: downward, or a file of its own folder."""
    if any(source == a and (target + ".").startswith(b + ".") for a, b in UPWARD):
        return True
    here, there = rank(source), rank(target)
    if source.count(".") == 0 or here is None:  # the package itself gathers what it exports
        return source.count(".") == 0
    if there is None:
        return source == "refopt.__main__"
    return there < here or target.split(".")[:2] == source.split(".")[:2]


@pytest.mark.parametrize("package", ["refopt", "refopt_cuda"])
def test_imports_run_downward(package: str) -> None:
    wrong = []
    for path in sources(package):
        source = module_name(path)
        for target in imports(path):
            if target.split(".")[0] == package and not allowed(source, target):
                wrong.append(f"{source} imports {target}")
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("package", ["refopt", "refopt_cuda"])
@pytest.mark.parametrize("row", ROWS)
def test_siblings_never_see_each_other(package: str, row: str) -> None:
    prefix = f"{package}.{row}."
    shared = {module_name(ROOT / path) for path in SHARED}
    for path in (ROOT / package / row).glob("[!_]*.py"):
        seen = {t for t in imports(path) if t.startswith(prefix)} - shared - {module_name(path)}
        assert seen == MADE_OF.get(module_name(path), set()), f"{module_name(path)} imports {sorted(seen)}"


def test_the_reference_imports_numpy_and_the_standard_library_alone() -> None:
    known = sys.stdlib_module_names | {"numpy", "refopt"}
    for path in sources("refopt"):
        later = set(imports(path)) - set(imports(path, lazy=False))
        for target in imports(path):
            known_here = known | OPTIONAL.get(path.name, set()) if target in later else known
            assert target.split(".")[0] in known_here, f"{module_name(path)} imports {target}"
            by_name = target == "importlib" and module_name(path) not in BY_NAME
            assert not by_name, f"{module_name(path)} imports by name; only {BY_NAME} do"


def test_lazy_imports_are_inside_functions() -> None:
    for source, target in UPWARD:
        path = ROOT.joinpath(*source.split(".")).with_suffix(".py")
        at_once = [t for t in imports(path, lazy=False) if (t + ".").startswith(target + ".")]
        assert not at_once, f"{source} imports {at_once} at the top"


def test_kernels_share_records_with_the_reference_never_arithmetic() -> None:
    for row in ("rules", "codecs", "places", "kernels"):
        for path in sorted((ROOT / "refopt_cuda" / row).rglob("*.py")):
            seen = {t for t in imports(path) if t.split(".")[0] == "refopt"} - {"refopt.spec"}
            assert not seen, f"{module_name(path)} imports {sorted(seen)}"


@pytest.mark.parametrize("row", ["rules", "codecs", "places", "kernels"])
def test_torch_stays_above_the_kernels(row: str) -> None:
    for path in sorted((ROOT / "refopt_cuda" / row).rglob("*.py")):
        assert "torch" not in {t.split(".")[0] for t in imports(path)}, f"{module_name(path)} imports torch"
