"""The command: it learns, saves what peft and transformers load, counts bytes as predicted, and names bad input."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from refopt.__main__ import main
from refopt_cuda import optim
from refopt_cuda.nn import checkpoint
from refopt_cuda.train import job as jobs
from refopt_cuda.train.cli import INTERRUPTED
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.finetune import data, methods, plan
from tests.finetune.conftest import SMALL, tokenizer


def losses(here: Path) -> dict[tuple[str, str], float]:
    rows = csv.DictReader((here / "runs/x/metrics.csv").read_text("utf-8").splitlines())
    return {(r["method"], r["step"]): float(r["loss"]) for r in rows}


def test_all_methods_learn_from_the_same_blocks_and_are_saved(
    finetune: Callable[[str], int], here: Path, model: Path
) -> None:
    """Three methods, one table; adapters in peft's format, the whole model for full."""
    assert finetune(f"--text text.txt --qlora --lora --full --name x {SMALL} --steps 12") == 0
    found = losses(here)
    for method in ("qlora", "lora", "full"):
        assert found[method, "after"] < found[method, "before"] - 0.05, method
    assert abs(found["lora", "before"] - found["full", "before"]) < 1e-5
    folder = here / "runs/x/seed0"
    again = peft.PeftModel.from_pretrained(checkpoint.load(model), folder / "qlora")
    assert again.peft_config["default"].r == 4
    assert transformers.AutoModelForCausalLM.from_pretrained(folder / "full").config.hidden_size == 32
    report = (here / "runs/x/report.md").read_text("utf-8")
    assert "| qlora | frozen weights |" in report and "sha256" in report and '"rank": 4' in report
    assert "(loss_and_bytes.png)" in report and (here / "runs/x/loss_and_bytes.png").stat().st_size > 10_000


def test_what_is_counted_is_what_was_predicted(model: Path) -> None:
    """Weights, gradients and states to the byte; frozen ones but for the norms, which stay float32 here."""
    chosen = plan.Plan(str(model), text=("t",), rank=4, context=16, batch=2, optimizer="AdamW")
    for method in plan.METHODS:
        made, need = methods.build(chosen, method, 0), methods.predicted(chosen, method)
        assert need is not None
        params = [p for p in made.parameters() if p.requires_grad]
        opt = optim.AdamW(params)
        ids = torch.arange(16).view(1, 16)
        made(input_ids=ids, labels=ids).loss.backward()
        held = methods.bytes_of(p.grad for p in params)
        opt.step()
        got = methods.counted(made, opt, held)
        assert (got["weights"], got["gradients"], got["states"]) == (need.weights, need.gradients, need.states), method


def test_chats_are_learnt_where_the_assistant_speaks(finetune: Callable[[str], int], here: Path) -> None:
    assert finetune(f"--chat chats.jsonl --name x {SMALL}") == 0
    assert losses(here)["qlora", "after"] < losses(here)["qlora", "before"]


def test_labels_are_the_assistants_words_alone() -> None:
    """With a template and without; cut at the context, padded without labels."""
    words = tokenizer()
    chat = [{"role": "user", "content": "the moment of"}, {"role": "assistant", "content": "a gradient"}] * 2
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} [END] {% endfor %}"
    for chosen in (None, template + "{% if add_generation_prompt %}assistant : {% endif %}"):
        words.chat_template = chosen
        row = data.block(chat, words, 40)
        kept = [words.decode(t) for t in row["labels"][row["labels"] != data.IGNORED]]
        said = [w for w in kept if w in ("a", "gradient", "the", "moment", "of")]
        assert said == ["a", "gradient"] * 2
        assert (
            row["attention_mask"].sum() < 40 and not (row["labels"][row["attention_mask"] == 0] != data.IGNORED).any()
        )
        assert data.block(chat, words, 8)["input_ids"].shape == (8,)


def test_every_tenth_block_is_held_out(here: Path) -> None:
    blocks = data.load(["text.txt"], [], tokenizer(), 16)
    assert (len(blocks.train), len(blocks.held)) == (68, 7)
    assert blocks.tokens == 68 * 16 and all(torch.equal(r["labels"], r["input_ids"]) for r in blocks.train)


def test_the_same_seed_stopped_and_resumed_gives_the_same_bits(
    finetune: Callable[[str], int], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Within the first method and, after a second start, within the second; losses, adapters, weights."""
    words = f"--text text.txt --qlora --full {SMALL}"
    assert finetune(f"{words} --name whole") == 0
    calls = iter(range(1000))
    monkeypatch.setattr(jobs.Stop, "__call__", lambda self: next(calls) in (1, 4))
    assert finetune(f"{words} --name parts") == INTERRUPTED
    assert "--resume --name parts" in " ".join(capsys.readouterr().out.split())
    assert again("--resume --name parts") == INTERRUPTED
    (here / "runs/parts/seed0/full/checkpoint-9").mkdir()  # begun, and not whole
    assert again("--resume") == 0
    whole, parts = (here / "runs" / n for n in ("whole", "parts"))
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    for name in ("qlora/adapter_model.safetensors", "full/model.safetensors"):
        assert (whole / "seed0" / name).read_bytes() == (parts / "seed0" / name).read_bytes(), name
    assert not list(parts.glob("seed0/*/checkpoint-*"))


def again(words: str) -> int:
    """`refopt finetune ...` without a model."""
    return main(["finetune", *words.split()])


def test_what_cannot_be_resumed_is_named(
    finetune: Callable[[str], int], here: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refused(code: int, says: str) -> None:
        assert code == 2
        printed = capsys.readouterr().err
        assert says in printed and printed.count("\n") == 1

    refused(again(""), "name MODEL, a folder of transformers, or go on with --resume")
    refused(again("--resume"), "holds no run")
    refused(again("--resume --name x"), "runs/x holds no finetune.json")
    monkeypatch.setattr(jobs.Stop, "__call__", lambda self: True)
    assert finetune(f"--text text.txt --name x {SMALL}") == INTERRUPTED
    capsys.readouterr()
    refused(finetune(f"--text text.txt --name x {SMALL}"), "`refopt finetune --resume --name x`")
    refused(again("--resume --steps 9"), "--resume goes on with the plan of the run; leave out --steps")
    refused(again("--resume --lora"), "leave out --qlora, --lora and --full")
    refused(again(f"{model} --resume"), "leave out MODEL")
    (here / "text.txt").write_text("the moment " * 1000, "utf-8")
    refused(again("--resume"), "(their sha256 differs)")
    (here / "text.txt").unlink()
    refused(again("--resume"), "--text text.txt: no such file")
    (here / "runs/x/finetune.json").write_text('{"model": "m", "colour": 3}')
    refused(again("--resume"), "is not readable")


BAD = [
    ("", "name the data: --text FILE"),
    ("--text text.txt --chat chats.jsonl", "one of the two"),
    ("--text nowhere.txt", "--text nowhere.txt: no such file"),
    ("--text empty.txt", "--text empty.txt: is empty"),
    ("--text binary.bin", "--text binary.bin: is not UTF-8 text (byte 0)"),
    ("--chat text.txt", "--chat text.txt: line 1 is not JSON"),
    ("--chat .", "--chat .: is a folder"),
    ("--text text.txt --steps 0", "--steps must be at least 1, got 0"),
    ("--text text.txt --rank 33", "--rank must be at most 32, the model's width, got 33"),
    ("--text text.txt --context 4", "--context must be at least 8"),
    ("--text text.txt --context 4000", "gives 0 blocks of 4000 tokens"),
    ("--text text.txt --lr -1", "--lr must be a positive number"),
    ("--text text.txt --lr nan", "--lr must be a positive number, got nan"),
    ("--text text.txt --alpha inf", "--alpha must be a finite number, got inf"),
    ("--text text.txt --batch 0", "--batch must be at least 1, got 0"),
    ("--text text.txt --dropout 1", "--dropout must be at least 0 and below 1"),
    ("--text text.txt --quant-type int4", "--quant-type must be nf4 or fp4"),
    ("--text text.txt --optimizer AdamW9bit", "did you mean AdamW8bit"),
    ("--text text.txt --optimizer Muon", "no optimizer 'Muon'"),
    ("--text text.txt --seeds 0", "--seeds must be at least 1"),
    ("--text text.txt --device tpu", "--device must be cpu or cuda"),
    ("--text text.txt --name a/b", "--name must be the name of a folder"),
]


@pytest.mark.parametrize(("words", "says"), BAD)
def test_bad_input_is_one_sentence_and_makes_nothing(
    finetune: Callable[[str], int], here: Path, words: str, says: str, capsys: Any
) -> None:
    (here / "empty.txt").write_bytes(b"")
    (here / "binary.bin").write_bytes(b"\xff\xfe\x00")
    assert finetune(words if "--rank" in words else f"{words} --rank 4") == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.startswith("refopt finetune: ") and printed.count("\n") == 1
    assert not (here / "runs").exists()


def test_a_folder_that_is_no_model_is_named(here: Path, model: Path) -> None:
    with pytest.raises(InputError, match="is no folder; nothing is downloaded"):
        plan.make({"model": "gpt2", "text": ("text.txt",)})
    empty = here / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        plan.make({"model": str(empty), "text": ("text.txt",)})
    (empty / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        plan.make({"model": str(empty), "text": ("text.txt",)})
    (empty / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        plan.make({"model": str(empty), "text": ("text.txt",)})


def test_an_option_that_is_none_is_named(finetune: Callable[[str], int], here: Path, capsys: Any) -> None:
    for words, says in (("--stepz 3", "No such option"), ("--steps many", "Invalid value for '--steps'")):
        assert finetune(f"--text text.txt {words}") == 2
        assert says in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_cannot_be_written_is_refused(finetune: Callable[[str], int], here: Path, capsys: Any) -> None:
    (here / "runs").write_text("a file")
    assert finetune("--text text.txt --rank 4 --device cpu") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(finetune: Callable[[str], int], here: Path, capsys: Any) -> None:
    assert finetune(f"--text text.txt --full --name x {SMALL} --lr 3e38 --steps 3") == 2
    assert "try a smaller --lr" in capsys.readouterr().err


@pytest.mark.gpu
def test_all_methods_learn_on_a_gpu_and_their_bytes_are_measured(finetune: Callable[[str], int], here: Path) -> None:
    """In bfloat16, with states that are paged; activations and the peak come from the allocator."""
    words = f"{SMALL.replace('cpu', 'cuda')} --optimizer PagedAdamW --steps 12"
    assert finetune(f"--text text.txt --qlora --lora --full --name x {words}") == 0
    found = losses(here)
    for method in ("qlora", "lora", "full"):
        assert found[method, "after"] < found[method, "before"] - 0.03, method
        made = json.loads((here / f"runs/x/seed0/{method}/result.json").read_text("utf-8"))
        parts = made["counted"]
        assert parts["activations"] > 0 and (parts["scratch"] > 0) == (method == "qlora"), method
        assert made["peak"] >= parts["weights"] + parts["frozen"] + parts["gradients"], method


@pytest.mark.gpu
def test_a_stop_on_a_gpu_goes_on_where_it_was(
    finetune: Callable[[str], int], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"--text text.txt {SMALL.replace('cpu', 'cuda')} --optimizer PagedAdamW8bit"
    assert finetune(f"{words} --name whole") == 0
    calls = iter(range(1000))
    monkeypatch.setattr(jobs.Stop, "__call__", lambda self: next(calls) == 1)
    assert finetune(f"{words} --name parts") == INTERRUPTED
    assert again("--resume") == 0
    rows = [(here / "runs" / n / "metrics.csv").read_text("utf-8").splitlines()[1:] for n in ("whole", "parts")]
    whole, parts = ([float(line.split(",")[3]) for line in lines] for lines in rows)
    assert len(whole) == 6 and parts == pytest.approx(whole, abs=1e-4)


LINES = [
    ("{", "line 1 is not JSON"),
    ('{"text": "x"}', "must hold messages with role and content"),
    (json.dumps({"messages": [{"role": "robot", "content": "x"}]}), "a role is one of"),
    (json.dumps({"messages": [{"role": "user", "content": "x"}]}), "has no message of the assistant"),
]


@pytest.mark.parametrize(("line", "says"), LINES)
def test_a_bad_line_of_chats_is_named(line: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        data.messages(line, "--chat c.jsonl: line 1")
