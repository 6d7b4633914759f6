"""What every test shares: hypothesis profiles, and what to do where there is no GPU or no g++.

Where CI=true the modules in BY_TURNS take a seventh of their cases a day, so that a week takes all; REFOPT_ALL=1 takes
all at once.

`HYPOTHESIS_PROFILE` is quick (default), ci (default where CI=true) or nightly. A missing g++ is an error where CI=true
or REFOPT_REQUIRE_GXX=1, a missing GPU where REFOPT_REQUIRE_GPU=1; elsewhere both are skips that say why.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

CI = os.environ.get("CI", "").lower() in ("true", "1")
REQUIRE_GXX = CI or os.environ.get("REFOPT_REQUIRE_GXX") == "1"
REQUIRE_GPU = os.environ.get("REFOPT_REQUIRE_GPU") == "1"
TURNS = 7 if CI and not REQUIRE_GPU and os.environ.get("REFOPT_ALL") != "1" else 1
DAY = int(os.environ.setdefault("REFOPT_DAY", str(datetime.now(UTC).toordinal())))  # one for all workers
BY_TURNS = {
    "conform": ("test_dialects", "test_peers"),
    "convert": ("test_bitsandbytes",),
    "functional": ("test_quantize", "test_step"),
    "kernels": (
        "test_codec_functors",
        "test_muon",
        "test_nvrtc",
        "test_rows",
        "test_schedule_free",
        "test_whole",
        "test_whole_host",
        "test_whole_nvrtc",
    ),
    "optim": (
        "test_checkpoints",
        "test_coded_matrices",
        "test_equal_to_refopt",
        "test_every_codec",
        "test_hosted",
        "test_live_whole",
        "test_paged",
        "test_scaling",
        "test_torch_database",
        "test_torch_optim",
        "test_whole",
        "test_whole_coded",
    ),
    "places": ("test_disk", "test_host", "test_paged"),
    "rules": ("test_every_rule", "test_every_whole_rule"),
    "step": ("test_partition", "test_step", "test_trace"),
    "twins": ("test_host", "test_ptx"),
}
"""Large products of rules, codecs and formats, most of whose time compilers take."""


def todays(items: Sequence[Any]) -> list[Any]:
    """Those of a list whose turn it is: where CI=true a seventh a day, elsewhere all."""
    return [item for k, item in enumerate(items) if (k + DAY) % TURNS == 0]


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("quick", max_examples=20, deadline=None, suppress_health_check=SLOW)
settings.register_profile(
    "ci", max_examples=10, deadline=None, derandomize=True, print_blob=True, suppress_health_check=SLOW
)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if CI else "quick"))


@cache
def no_gpu() -> str:
    """Why the tests marked `gpu` cannot run, or ""; asks the driver, imports nothing heavy."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver: libcuda is not on this machine"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver reports no usable GPU"
    missing = [name for name in ("cupy", "torch") if importlib.util.find_spec(name) is None]
    return f"there is a GPU, but not {' and '.join(missing)}: pip install 'refopt[torch,cuda13]'" if missing else ""


@cache
def no_gxx() -> str:
    """Why the tests that build the CUDA functors for the host cannot run, or ""."""
    return "" if shutil.which("g++") else "needs g++ on PATH, which builds the CUDA functors for the host"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each module in BY_TURNS every seventh case, by the number of the day."""
    seen: dict[Path, int] = {}
    left = []
    for item in items:
        path = item.path
        large = path.stem in BY_TURNS.get(path.parent.name, ())
        if TURNS > 1 and large and not item.get_closest_marker("gpu"):
            seen[path] = seen.get(path, -1) + 1
            if (seen[path] + DAY) % TURNS:
                left.append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark, why, required in (("gpu", no_gpu, REQUIRE_GPU), ("gxx", no_gxx, REQUIRE_GXX)):
        if item.get_closest_marker(mark) and (reason := why()):
            (pytest.fail if required else pytest.skip)(reason)


@pytest.fixture(scope="session")
def gxx() -> str:
    """The path of g++."""
    if reason := no_gxx():
        (pytest.fail if REQUIRE_GXX else pytest.skip)(reason)
    return str(shutil.which("g++"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests recorded to be printed: how many cases they ran."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if name == "printed" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {value}")
