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
from tests.convert.beside import draw, filled, quietly, run, same_tree, twins
from tests.convert.test_factored import sides, states_of
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


OURS = {"torch": "Adafactor", "transformers": "Adafactor", "Muon": "Muon"}


@pytest.mark.parametrize("name", OURS)
def test_factors_and_matrices_pass_over_files_and_come_back(name: str, tmp_path: Path, capsys: Any) -> None:
    theirs, ours, take, _, shapes_ = sides(name)
    peer = run(theirs, shapes=shapes_)
    library, paths = {"Muon": "torch"}.get(name, name), [tmp_path / x for x in ("a.pt", "b.safetensors", "c.pt")]
    given, mine, back = map(str, paths)
    held, names = peer.state_dict(), [f"layer.{k}" for k in range(len(shapes_))]
    held["param_groups"][0]["param_names"] = names
    torch.save(held, given)
    assert shapes.library_of(held) == library
    assert [tuple(p.shape) for p in shapes.parameters(held, torch.float32, "")] == shapes_
    assert main(["convert", given, mine, "--optimizer", OURS[name]]) == 0
    want = ours(twins(peer))
    want.load_state_dict(take(peer.state_dict(), want))
    got = files.read(paths[1])
    same_tree(got["state"], want.state_dict()["state"])
    one, other = (tree["param_groups"][0] for tree in (got, want.state_dict()))
    assert one.pop("param_names") == names
    same_tree({**one, "ns_dtype": None}, {**other, "ns_dtype": None})
    assert main(["convert", mine, back, "--to", library]) == 0
    assert f"{OURS[name].lower()} of {len(shapes_)} parameters for {library}" in capsys.readouterr().out
    returned = files.read(paths[2])
    same_tree(states_of(returned), states_of(held))
    assert returned["param_groups"][0]["param_names"] == names
    theirs(twins(peer)).load_state_dict(returned)


def coded(name: str, shapes_: list[tuple[int, ...]], **words: Any) -> Any:
    """An Adafactor or Muon of ours that was never stepped, with states of random codes and numbers, at step 2."""
    params, random = [torch.nn.Parameter(torch.ones(s)) for s in shapes_], torch.Generator()
    opt = getattr(rc.optim, name)(params, **words)
    saved, group = opt.state_dict(), opt.param_groups[0]
    for k, p in enumerate(group["params"]):
        layout = opt._layout(group, {}, p) if "Muon" in name else opt.layout(p, opt.hyper(group, ""), group)[1]
        saved["state"][k] = {"step": 2, **{part.key: draw(part.shape, part.dtype, random) for part in layout.all}}
    opt.load_state_dict(saved)
    return opt


def test_coded_factors_and_matrices_of_ours_change_their_file_alone(tmp_path: Path, capsys: Any) -> None:
    """Factors tell a shape that packed codes do not; a matrix's states are all packed."""
    model, other = tmp_path / "model.pt", tmp_path / "b.safetensors"
    torch.save({"a": torch.ones(64, 80)}, model)
    cases = [("Adafactor4bit", SHAPES, {"beta1": 0.8, "variant": "transformers"}, [])]
    cases += [("Muon8bit", SHAPES[:1], {}, []), ("Muon", [(64, 80)], {"codecs": "q4"}, ["--model", str(model)])]
    for name, shapes_, words, more in cases:
        opt = coded(name, shapes_, **words)
        mine = saved(opt, tmp_path / "a.pt")
        assert main(["convert", mine, str(other), "--force", *more]) == 0
        same_tree(files.read(other), opt.state_dict())
    assert main(["convert", mine, str(tmp_path / "c.pt")]) == 2
    assert "packed in 4 bits, its shape is not told" in capsys.readouterr().err


def test_what_no_state_tells_is_empty_or_0(tmp_path: Path) -> None:
    """A matrix that was never stepped; weights whose RMS transformers keeps."""
    mine = saved(rc.optim.Muon([torch.nn.Parameter(torch.ones(3, 4))]), tmp_path / "a.pt")
    assert main(["convert", mine, str(tmp_path / "b.pt"), "--to", "torch"]) == 0
    assert files.read(tmp_path / "b.pt")["state"] == {}
    mine = saved(coded("Adafactor", [(3, 4)]), tmp_path / "c.pt")
    torch.save({"w": torch.full((3, 4), 0.5)}, tmp_path / "model.pt")
    for more, rms in ([], 0.0), (["--model", str(tmp_path / "model.pt")], 0.5):
        assert main(["convert", mine, str(tmp_path / "d.pt"), "--to", "transformers", "--force", *more]) == 0
        assert files.read(tmp_path / "d.pt")["state"][0]["RMS"] == rms


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
    (["a.pt", "b.pt", "--optimizer", "Adafactor"], "a.pt is of a rule of elements, not of Adafactor"),
    (["a.pt", "b.pt", "--to", "transformers"], "to_transformers: opt must be Adafactor of refopt_cuda.optim, got Comp"),
    (["factors.pt", "b.pt", "--optimizer", "Muon8bit"], "factors.pt is of Adafactor, not of Muon8bit"),
    (["factors.pt", "b.pt", "--to", "torch"], "torch.optim has variant='torch' alone, here it is 'transformers'"),
    (["factors.pt", "b.pt", "--to", "torchao"], "opt must be an element-wise optimizer of refopt_cuda.optim, got Adaf"),
    (["factors.pt", "b.pt", "--from", "transformers", "--optimizer", "AdamW"], "must be Adafactor of refopt_cuda.opt"),
    (["matrix.pt", "b.pt", "--to", "torch"], "group 0 has codecs {'B': 'dynamic8'}; torch.optim keeps float32"),
    (
        ["came.pt", "b.pt"],
        "came.pt is of neither a rule of elements nor Adafactor or Muon, which alone",
    ),
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
    for name, path in (("Adafactor", "factors.pt"), ("Muon8bit", "matrix.pt"), ("CAME", "came.pt")):
        saved(getattr(rc.optim, name)([torch.nn.Parameter(torch.ones(3, 4))]), Path(path))
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
