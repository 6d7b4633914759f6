"""The sharded checks on 1, 2, 3 and 4 gloo ranks, and on one GPU; the number of comparisons is printed at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
WORLDS = [1, 2, 3, 4]


def run(*argv: str, **environment: str) -> dict[str, Any]:
    """What the checks found, in a process of their own: it forks, and this one may have threads."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.sharded.run", *argv]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    lines = done.stdout.strip().splitlines()
    assert lines and lines[-1].startswith("{"), f"{command} ended with {done.returncode}: {done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(lines[-1])
    crash = done.stderr.find("Fatal Python error")
    assert not found["wrong"], "\n".join(
        [*found["wrong"], done.stderr[crash:][:3000] if crash >= 0 else done.stderr[-3000:]]
    )
    return found["cases"]


@pytest.fixture
def say(record_property: Callable[[str, object], None]) -> Callable[[dict[str, Any]], None]:
    """Have the number of comparisons of each world printed at the end of the session."""

    def said(cases: dict[str, Any]) -> None:
        for ranks, counts in cases.items():
            record_property("printed", f"{ranks} ranks: {sum(counts.values())} comparisons: {counts}")

    return said


def test_every_rule_and_codec_has_the_bits_of_one_rank(say: Any) -> None:
    cases = run("steps")
    say(cases)
    assert [*cases] == [str(n) for n in WORLDS]
    for n in WORLDS:
        counts = cases[str(n)]
        assert counts["rows in shards"] == n * cases["1"]["rows in shards"] > 5000 * n
        assert counts["put together"] == n * cases["1"]["put together"] > 400 * n
        for claim in ("paged shards", "host shards", "a norm over all ranks", "a loss scale"):
            assert counts[claim] == n * cases["1"][claim] > 0
    assert all(cases[str(n)]["disk shards"] > 0 for n in WORLDS)
    assert cases["4"]["a norm over a mesh"] > 0 < cases["4"]["columns and rows"]
    assert cases["4"]["columns of whole blocks"] == 2 * cases["2"]["columns of whole blocks"] > 0
    assert cases["4"]["replicated shards"] == cases["4"]["shards of shards"] > 1000


def test_a_model_under_fully_shard_has_the_bits_of_its_twin(say: Any) -> None:
    cases = run("models")
    say(cases)
    assert all(cases[str(n)]["fully_shard"] == n * cases["1"]["fully_shard"] > 0 for n in WORLDS)
    assert cases["4"]["fully_shard HSDP"] > 0 < cases["4"]["fully_shard of tensor parallel"]


def test_a_checkpoint_of_any_number_of_ranks_goes_on_at_any_other(say: Any) -> None:
    cases = run("checkpoints")
    say(cases)
    assert all(cases[str(n)]["resharded"] == n * cases["1"]["resharded"] > 0 for n in WORLDS)
    assert all(cases[str(n)]["a rank killed"] > 0 for n in WORLDS)
    assert all(cases[n]["resumed shards"] > 0 for n in ("1", "2", "4"))


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["steps", "models", "checkpoints"])
def test_one_rank_on_a_gpu_has_the_bits_of_whole_tensors(suite: str, say: Any, tmp_path: Path) -> None:
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    say(run(suite, "--device", "cuda", REFOPT_SHARDED_FOLDER=str(tmp_path), **one))
