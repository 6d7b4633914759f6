"""`refopt convert` on files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt.__main__ import main
from refopt_cuda.convert import files, shapes
from tests.convert.beside import filled, quietly, same_tree, twins
from tests.optim.pairs import give

ADAMW = {"lr": 0.0078125, "betas": (0.75, 0.96875), "eps": 1e-7, "weight_decay": 0.125}
SHAPES = [(64, 256), (9,)]


def saved(opt: Any, path: Path) -> str:
    files.write(opt.state_dict(), path)
    return str(path)


def adamw8(seed: int = 0, **more: Any) -> Any:
    return filled(lambda params: rc.optim.AdamW8bit(params, **ADAMW, **more), torch.float32, SHAPES, seed)


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_there_and_back_over_files_changes_no_bit(library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    opt = adamw8()
    mine, other, back = saved(opt, tmp_path / "a.safetensors"), tmp_path / "b.pt", tmp_path / "c.safetensors"
    assert main(["convert", mine, str(other), "--to", library]) == 0
    assert main(["convert", str(other), str(back), "--optimizer", "AdamW8bit"]) == 0
    same_tree(files.read(back), opt.state_dict())


def test_a_file_of_torch_becomes_8_bits_in_place_of_its_settings(tmp_path: Path, capsys: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(s)) for s in SHAPES]
    peer = torch.optim.AdamW([(f"layer.{k}", p) for k, p in enumerate(params)], lr=0.5)
    give(params, 0)
    peer.step()
    torch.save({"epoch": 3, "optimizer": peer.state_dict()}, tmp_path / "a.bin")
    torch.save({"layer.1": params[1], "more": torch.ones(3), "layer.0": params[0]}, tmp_path / "model.pt")
    argv = ["convert", str(tmp_path / "a.bin"), str(tmp_path / "b.pt"), "--optimizer", "AdamW8bit"]
    assert main([*argv, "--model", str(tmp_path / "model.pt")]) == 0
    assert "note: from_torch: states rounded anew: 1" in capsys.readouterr().err
    made = files.read(tmp_path / "b.pt")
    opt = rc.optim.AdamW8bit(twins(peer))
    opt.load_state_dict(made)
    assert opt.param_groups[0]["lr"] == 0.5 and made["param_groups"][0]["param_names"] == ["layer.0", "layer.1"]
    assert opt.state[opt.param_groups[0]["params"][0]]["step"] == 1


def test_weights_formats_and_packed_codes_need_what_is_not_in_the_file(tmp_path: Path, capsys: Any) -> None:
    opt = filled(lambda params: rc.optim.AdamW4bit(params, **ADAMW), torch.bfloat16, SHAPES)
    mine = saved(opt, tmp_path / "a.pt")
    assert main(["convert", mine, str(tmp_path / "b.pt"), "--to", "torch"]) == 2
    assert "packed in 4 bits, its shape is not told" in capsys.readouterr().err
    torch.save(dict(zip("ab", twins(opt), strict=True)), tmp_path / "model.pt")
    assert main(["convert", mine, str(tmp_path / "b.pt"), "--to", "torch", "--model", str(tmp_path / "model.pt")]) == 0
    rem = filled(lambda params: rc.optim.AdamW4bit(params, codecs={"p": "bf16_rem16"}), torch.bfloat16, SHAPES)
    assert main(["convert", saved(rem, tmp_path / "c.pt"), str(tmp_path / "d.pt"), "--to", "torch"]) == 0
    assert "left behind: what lies beside bfloat16 weights, of 2 tensors" in capsys.readouterr().err


def test_flashoptims_error_bits_over_files(tmp_path: Path) -> None:
    codecs = {"m": "compand8", "v": "compand8", "p": "bf16_ecc"}
    opt = filled(lambda params: rc.optim.AdamW(params, codecs=codecs), torch.bfloat16, [(64, 96), (9,)])
    mine, other, back = (str(tmp_path / name) for name in ("a.pt", "b.safetensors", "c.pt"))
    saved(opt, Path(mine))
    assert main(["convert", mine, other, "--to", "flashoptim"]) == 0
    assert main(["convert", other, back, "--optimizer", "AdamW", "--codecs", "m=compand8,v=compand8,p=bf16_ecc"]) == 0
    got, want = files.read(back), opt.state_dict()
    same_tree(got["state"], want["state"])
    assert got["param_groups"][0].pop("initial_lr") == want["param_groups"][0]["lr"]
    same_tree(got["param_groups"], want["param_groups"])


def test_a_list_prints_what_is_in_a_file_and_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    mine = saved(adamw8(), tmp_path / "a.pt")
    assert main(["convert", mine, "--list"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("refopt: 2 states\ngroup 0: ") and "rule adamw" in out and "format 1" in out
    assert "m.codes uint8 (64, 256)" in out and "33,352 bytes of states" in out
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


REFUSED: list[tuple[list[str], str]] = [
    (["a.pt"], "name the file to write, or --list"),
    (["a.pt", "a.pt"], "a.pt is there; --force writes over it"),
    (["a.pt", "b.npz"], "b.npz must end in .pt"),
    (["a.pt", "b.pt", "--to", "jax"], "no library 'jax'; there are refopt, torch"),
    (["a.pt", "b.pt", "--from", "jax"], "no library 'jax'; there are refopt, torch"),
    (["a.pt", "b.pt", "--from", "torch"], "is of torch: name our class between (--optimizer AdamW8bit)"),
    (["a.pt", "b.pt", "--from", "torch", "--optimizer", "NAdam"], "optimizer must be one of SGD"),
    (["a.pt", "b.pt", "--from", "torch", "--optimizer", "AdamW"], "has 'm.codes', which adamw does not keep"),
    (["a.pt", "b.pt", "--optimizer", "Lion8bit"], "has rule 'adamw', this optimizer has 'lion'"),
    (["a.pt", "b.pt", "--dtype", "int8"], "--dtype must be one of float32"),
    (["a.pt", "b.pt", "--key", "ema"], "holds no state dict of an optimizer under 'ema'; it holds state, param_groups"),
    (["model.pt", "b.pt"], "model.pt holds no state dict of an optimizer; it holds weight"),
    (["a.pt", "b.pt", "--model", "model.pt"], "model.pt holds 1 tensors, the state is of 2 parameters without names"),
    (["a.pt", "b.pt", "--kind", "4bit"], "kind '4bit' is a choice among torchao's classes, not of refopt"),
    (["a.pt", "b.pt", "--to", "torchao", "--kind", "2bit"], "kind must be one of 8bit, 4bit, fp8, got '2bit'"),
    (["none.pt", "b.pt"], "No such file"),
    (["code.pt", "b.pt"], "code.pt cannot be read without running code from it"),
    (["a.pt", "b.pt", "--to", "torchao", "--model", "pair.pt"], "it must have (256, 64)"),
]


@pytest.mark.parametrize(("argv", "text"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(
    argv: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(adamw8(), Path("a.pt"))
    torch.save({"weight": torch.ones(3)}, "model.pt")
    torch.save({"a": torch.ones(256, 64), "b": torch.ones(9)}, "pair.pt")
    torch.save({"state": Path("x"), "param_groups": []}, "code.pt")
    before = {p.name: p.read_bytes() for p in Path().iterdir()}
    assert main(["convert", *argv]) == 2
    err = capsys.readouterr().err
    assert text in err and err.startswith("refopt convert: ") and "Traceback" not in err
    assert {p.name: p.read_bytes() for p in Path().iterdir()} == before


def test_force_writes_over_a_file(tmp_path: Path) -> None:
    mine = saved(adamw8(), tmp_path / "a.pt")
    other = saved(adamw8(seed=1), tmp_path / "b.pt")
    assert main(["convert", mine, other, "--force"]) == 0
    same_tree(files.read(other), files.read(mine))


def test_the_library_of_a_file_is_seen() -> None:
    opt = adamw8()
    ways = {"refopt": opt.state_dict(), "torch": quietly(rc.convert.to_torch, opt)[0]}
    ways["bitsandbytes"] = quietly(rc.convert.to_bitsandbytes, opt)[0]
    ways["flashoptim"] = quietly(rc.convert.to_flashoptim, opt)[0]
    assert {name: shapes.library_of(state_dict) for name, state_dict in ways.items()} == {name: name for name in ways}
    for state_dict in ways.values():
        assert [tuple(p.shape) for p in shapes.parameters(state_dict, torch.float32, "")] == SHAPES


def test_every_public_function_has_its_place_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text("utf-8")
    assert sorted(re.findall(r"autofunction:: refopt_cuda\.convert\.(\w+)$", text, re.MULTILINE)) == sorted(
        rc.convert.__all__
    )
