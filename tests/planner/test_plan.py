"""The planner: bytes of a row are those of `refopt.memory`, advice follows from them, input is checked."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from refopt import memory, models
from refopt.__main__ import main
from refopt.planner import CARDS, Plan, Setup, advice, card, plan
from refopt.planner.setups import CLASSES, directions, setups

SEVEN = models.named("llama-2-7b")


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(SEVEN, "24GiB", sequence=512)


def test_every_row_is_there_once_and_those_that_give_up_least_come_first(found: Plan) -> None:
    rows = [row.setup for row in found.rows]
    assert len(rows) == len(set(rows)) == len(list(setups()))
    points = [advice.points(s) for s in rows]
    assert points == sorted(points)


def test_a_row_is_what_memory_says(found: Plan) -> None:
    (row,) = [r for r in found.rows if r.setup == Setup("full", "bf16", "AdamW8bit")]
    opt, step = row.setup.optimizer(), {"batch": 1, "sequence": 512, "checkpoint": True}
    assert row.peak == memory.peak(SEVEN, opt, **step, blas=card("24GiB").blas).total
    assert row.parts.states == memory.states(opt, SEVEN.shapes) and row.parts.weights == 2 * SEVEN.size
    assert row.fits == (1.05 * row.peak <= found.run.card.usable) and not row.fits


def test_a_master_is_told_from_states(found: Plan) -> None:
    by = {r.setup: r.parts for r in found.rows}
    plain, exact = (by[Setup("full", w, "AdamW8bit")] for w in ("bf16_sr", "bf16_rem16"))
    assert plain.master == 0 and exact.master == pytest.approx(2 * SEVEN.size, rel=1e-3)
    assert exact.states == pytest.approx(plain.states, rel=1e-3)


def test_paged_and_hosted_states_are_on_the_host(found: Plan) -> None:
    by = {r.setup: r for r in found.rows}
    here, paged, host = (by[Setup("full", "bf16_sr", "AdamW", p)] for p in ("resident", "paged", "host"))
    assert paged.parts.host == host.parts.host == here.parts.states
    assert (paged.parts.states, host.parts.states) == (3 * 2**24, 0)
    assert here.ms and paged.ms and here.ms < paged.ms and here.peak > paged.peak > host.peak


def test_rules_of_matrices_leave_the_rest_to_adamw(found: Plan) -> None:
    by = {r.setup: r for r in found.rows}
    for name, rank in (("Muon8bit", 0), ("GaLoreAdamW", 1024), ("APOLLO-Mini", 1)):
        row = by[Setup("full", "bf16", name)]
        opt = row.setup.optimizer(rank)
        assert row.parts.states == memory.states(opt, SEVEN) and row.peak > row.parts.states + 4 * SEVEN.size
        said = row.json()
        assert row.ms is said["optimizer_ms"] is None and row.untimed == said["untimed"] != ""
        assert said["beside"] == f"refopt_cuda.optim.{row.setup.beside}"
        assert f"rest = rc.optim.{row.setup.beside}(" in row.snippet
        assert rank == 0 or f"rank={rank}" in row.snippet
    assert {r.setup.rule for r in plan(SEVEN.shapes, "24GiB").rows}.isdisjoint({"muon", "galore", "apollo"})


def test_pages_of_whole_tensors_are_as_large_as_the_largest(found: Plan) -> None:
    """Three of Adam-mini's: the embedding's moments."""
    row = {r.setup: r for r in found.rows}[Setup("full", "bf16", "AdamMini", "paged")]
    assert row.parts.states == 3 * 4 * (32000 * 4096 + 32000)
    assert row.parts.host == memory.states(row.setup.optimizer(), SEVEN) and "pages of whole tensors" not in row.untimed
    (lamb,) = [r for r in found.rows if r.setup == Setup("full", "bf16", "LAMB", "paged")]
    assert lamb.ms is None and "pages of whole tensors" in lamb.untimed


def test_directions_are_a_quarter_of_the_width_where_every_matrix_has_as_many() -> None:
    assert [directions(models.named(n)) for n in ("llama-2-7b", "llama-2-70b", "gpt2")] == [1024, 1024, 192]


def test_every_rule_says_what_changes_for_someone_who_comes_from_adamw() -> None:
    assert {s.rule for s in setups()} - {"adamw"} <= advice.CHANGES.keys() & advice.RULE.keys()


def test_a_seven_on_24_gib_is_not_eight_bit_adam_as_the_overview_says(found: Plan) -> None:
    assert found.best is not None and found.best.setup.release and found.best.setup.method == "full"
    assert found.best_of("qlora").setup == Setup("qlora", "bf16", "AdamW")  # type: ignore[union-attr]


def test_a_thirteen_on_24_gb_is_qlora() -> None:
    best = plan(models.named("llama-2-13b"), "24GB").best
    assert best is not None and best.setup == Setup("qlora", "bf16", "AdamW")
    assert "rnn.prepare" in best.snippet


def test_more_devices_take_less_each_and_other_classes_alone() -> None:
    one, eight = plan(SEVEN, "h100"), plan(SEVEN, "h100", gpus=8)
    by = {r.setup: r.peak for r in one.rows}
    assert all(r.peak < by[r.setup] for r in eight.rows if r.setup.method == "full")
    assert {r.setup.place for r in eight.rows} == {"resident"} and not any(r.setup.release for r in eight.rows)
    alike = plan(SEVEN, "h100", gpus=8, zero=0)
    assert {r.setup: r.peak for r in alike.rows} == by


def test_every_class_is_there_and_has_a_page() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs/optim.md").read_text("utf-8")
    for s in setups():
        assert f".. autoclass:: refopt_cuda.optim.{s.cls}\n" in page, s.cls
    assert {s.name for s in setups()} == set(CLASSES)


def test_a_model_of_a_size_has_it() -> None:
    for count in (1e8, 1.3e9, 7e9, 70e9):
        assert models.sized(count).size == pytest.approx(count, rel=2e-3)


def test_shapes_a_module_and_a_configuration_are_models() -> None:
    shapes = [(512, 256), (256,)]
    module = SimpleNamespace(parameters=lambda: [SimpleNamespace(shape=s) for s in shapes])
    assert plan(module, "24GiB").run.model == plan(shapes, "24GiB").run.model == tuple(shapes)
    assert {r.setup.method for r in plan(shapes, "24GiB").rows} == {"full"}
    config = {"model_type": "gpt2"}
    module.config = SimpleNamespace(to_dict=lambda: config)
    assert plan(module, "24GiB").run.size == plan(config, "24GiB").run.size == models.named("gpt2").size
    assert plan("gpt2", "24GiB").run.model == models.named("gpt2")
    module.config = SimpleNamespace(to_dict=lambda: {"model_type": "mamba"})
    assert plan(module, "24GiB").run.model == tuple(shapes)


def test_cards_have_what_their_names_say() -> None:
    assert card("RTX 4090") == card("NVIDIA GeForce RTX 4090") == CARDS["rtx-4090"]
    assert card("24GB").memory < card("24 GiB").memory == CARDS["rtx-4090"].memory
    assert all(0.93 * c.memory < c.usable < c.memory for c in CARDS.values())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "gpu": ({"gpu": "rtx-409"}, r"no GPU 'rtx-409' \(did you mean 'rtx-4090'\?\)"),
    "size": ({"gpu": "0GB"}, "no GPU '0GB'"),
    "batch": ({"batch": 0}, "batch must be whole and >= 1, got 0"),
    "sequence": ({"sequence": 1.5}, "sequence must be whole and >= 1, got 1.5"),
    "gpus": ({"gpus": True}, "gpus must be whole and >= 1, got True"),
    "zero": ({"zero": 4}, "zero must be 0, 1, 2 or 3, got 4"),
    "alone": ({"zero": 3}, "zero=3 shares states among devices, and gpus is 1"),
    "method": ({"method": "lorra"}, "method must be any, full, lora, qlora, got 'lorra'"),
    "host": ({"host_bandwidth": 0}, "host_bandwidth must be above 0 and finite, got 0"),
    "rank": ({"rank": 5000}, "lora must be <= 4096"),
    "nothing": ({"model": []}, "model has no weights"),
    "adapters": ({"model": [(4, 4)], "method": "lora"}, "method='lora' needs a model whose blocks are known"),
    "few": ({"model": {"model_type": "mamba"}}, "model_type must be"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_one_sentence(what: str) -> None:
    words, says = WRONG[what]
    with pytest.raises(ValueError, match=says):
        plan(**({"model": SEVEN, "gpu": "24GiB"} | words))


def test_a_size_that_no_llama_has_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be 5e7 to 1e13"):
        models.sized(1e6)


def test_the_command_ends_with_a_recommendation_and_lines_to_copy(capsys: Any) -> None:
    assert main(["plan", "--params", "7e9", "--gpu", "24GB"]) == 0
    out = capsys.readouterr().out
    assert (
        "as an rtx-3090" in out
        and "\nOf what fits, this gives up least:" in out
        and "opt = rc.optim." in out
        and "--method qlora" in out
    )
    assert max(map(len, out.splitlines())) <= 140


def test_any_row_is_described_with_its_page_and_lines(capsys: Any) -> None:
    argv = ["plan", "--model", "llama-2-7b", "--gpu", "24GiB", "--sequence", "512", "--row"]
    found = plan(SEVEN, "24GiB", sequence=512)
    for k in (1, len(found.rows)):
        assert main([*argv, str(k)]) == 0
        out, row = capsys.readouterr().out, found.rows[k - 1]
        assert row.page in out and row.snippet in out and row.setup.label in out
    unknown = next(k for k, r in enumerate(found.rows, 1) if r.setup.name == "Muon")
    assert main([*argv, str(unknown)]) == 0 and "time not predicted: products of matrices" in capsys.readouterr().out
    assert main([*argv, "0"]) == 2 and "--row must be 1 to" in capsys.readouterr().err


def test_the_command_says_when_nothing_fits(capsys: Any) -> None:
    assert main(["plan", "--model", "llama-2-70b", "--gpu", "rtx-3060"]) == 1
    assert "Nothing fits. Closest: qlora" in capsys.readouterr().out


def test_json_holds_every_row(capsys: Any) -> None:
    assert main(["plan", "--model", "gpt2", "--gpu", "rtx-3060", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == len(list(setups())) and found["best"] is not None
    assert {"bytes", "peak", "moment", "fits", "optimizer_ms", "snippet", "page"} <= found["rows"][0].keys()
    assert found["run"]["weights"] == models.named("gpt2").size


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "llama-2-7", "--gpu", "24GB"], "did you mean 'llama-2-7b'"),
        (["--params", "7e9", "--gpu", "h1000"], "did you mean 'h100'"),
        (["--params", "1", "--gpu", "24GB"], "count must be"),
        (["--params", "7e9", "--gpu", "24GB", "--plot", "plan.txt"], "--plot must end in"),
    ],
)
def test_the_command_refuses_in_one_line(argv: list[str], says: str, capsys: Any) -> None:
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_plan_is_drawn(tmp_path: Any, capsys: Any) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs it")
    out = tmp_path / "plan.svg"
    assert main(["plan", "--model", "gpt2", "--gpu", "rtx-3060", "--plot", str(out)]) == 0
    assert "</svg>" in out.read_text("utf-8")


def test_a_plan_needs_numpy_alone() -> None:
    code = "import sys; from refopt.__main__ import main; main(['plan', '--model', 'gpt2', '--gpu', 'l4', '--json'])\n"
    code += "assert not {'torch', 'numba', 'matplotlib'} & set(sys.modules), 'imported'"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
