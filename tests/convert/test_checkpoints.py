"""Our own format: old checkpoints load for ever, every combination survives a file bit for bit, others are refused."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import refopt_cuda as rc
from refopt import StateError
from refopt.rules import RULES
from refopt_cuda.codecs import WEIGHTS, named
from refopt_cuda.convert import files
from refopt_cuda.optim import names, states
from refopt_cuda.optim.matrix import MatrixOptimizer
from refopt_cuda.optim.whole import Whole
from refopt_cuda.rules import RULES as KERNELS
from tests.bits import same_bits
from tests.convert import golden, golden_classes
from tests.convert.beside import filled, params_of, same_tree, twins
from tests.kernels.covering import CODECS, words_of
from tests.optim.pairs import exact, give, stored

FILES = sorted(golden.FOLDER.glob("*/*.pt.gz"))
KEPT = [(path, codec) for path in FILES for codec in [*golden.STATES, *golden.WEIGHTS]]
STEPPED = [("lion", "dynamic8"), ("sgd", "f32")]
"""Combinations whose stored step the CPU kernels take too; a GPU takes all of them."""


def rule_of(path: Path) -> str:
    return path.name.partition(".")[0]


@pytest.fixture(scope="module")
def stored_files() -> dict[Path, dict[str, Any]]:
    return {path: golden.load(path) for path in FILES}


def test_every_element_rule_has_a_file_with_every_codec(stored_files: Any) -> None:
    rules = {stem for stem in KERNELS if RULES[stem].scope == "element"}
    for version in range(1, states.FORMAT + 1):
        assert {rule_of(p) for p in FILES if p.parent.name == str(version)} == rules
    assert {named(text) for text in golden.STATES} == {named(text) for text in CODECS}
    assert {named(text) for text in golden.WEIGHTS} == {named(text) for text in words_of(WEIGHTS)}


@pytest.mark.parametrize(("path", "codec"), KEPT, ids=lambda x: rule_of(x) if isinstance(x, Path) else x)
def test_a_stored_checkpoint_loads_and_its_next_step_is_the_stored_one(
    path: Path, codec: str, stored_files: Any
) -> None:
    """Loaded bit for bit; the reference then takes the step."""
    kept = stored_files[path][codec]
    opt = golden.resumed(rule_of(path), codec, kept)
    entry = opt.state[params_of(opt)[0]]
    same_tree(dict(entry), kept["optimizer"]["state"][0])
    mirror = golden.Reference(rule_of(path), codec, opt, kept["p"])
    mirror.take(entry)
    mirror.step(kept["g"])
    same_bits(mirror.p, exact(kept["p_next"]), "p")
    for key, x in mirror.entry().items():
        same_bits(np.asarray(stored(torch.as_tensor(x))), stored(torch.as_tensor(kept["state_next"][key])), key)


def steps_to_what_is_stored(rule: str, codec: str, kept: dict[str, Any], device: str) -> None:
    opt = golden.resumed(rule, codec, kept, device)
    (p,) = params_of(opt)
    p.grad = kept["g"].to(device)
    opt.step()
    assert torch.equal(p.detach().cpu(), kept["p_next"])
    for key, x in opt.state[p].items():
        want = kept["state_next"][key]
        assert torch.equal(x.cpu(), want) if isinstance(x, torch.Tensor) else x == want, key


@pytest.mark.parametrize(("rule", "codec"), STEPPED)
def test_the_loops_of_the_cpu_take_the_stored_step(rule: str, codec: str, stored_files: Any) -> None:
    for path in FILES:
        if rule_of(path) == rule:
            steps_to_what_is_stored(rule, codec, stored_files[path][codec], "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("path", "codec"), KEPT, ids=lambda x: rule_of(x) if isinstance(x, Path) else x)
def test_the_kernels_take_the_stored_step(path: Path, codec: str, stored_files: Any) -> None:
    steps_to_what_is_stored(rule_of(path), codec, stored_files[path][codec], "cuda")


CLASSES = sorted(golden.FOLDER.glob("*/classes/*.pt.gz"))
"""Of those that are no rule of elements."""


def test_every_other_class_has_a_file_with_every_codec() -> None:
    found = {name: getattr(rc.optim, name) for name in rc.optim.__all__ if not name.endswith(tuple(names.KEPT))}
    others = {n for n, cls in found.items() if isinstance(cls, type) and issubclass(cls, Whole | MatrixOptimizer)}
    others = {n for n in others if not n.startswith("Paged")}
    assert others == set(golden_classes.WORDS)
    for version in range(1, states.FORMAT + 1):
        assert {rule_of(p) for p in CLASSES if p.parent.parent.name == str(version)} == others


def follow(name: str, codec: str, kept: dict[str, Any], device: str) -> None:
    """The step that is stored, to the bit where no matrix product is in it."""
    opt = golden_classes.resumed(name, codec, kept, device)
    (p,) = params_of(opt)
    p.grad = kept["g"].to(device)
    opt.step()
    if name in golden_classes.PRODUCTS:
        torch.testing.assert_close(p.detach().cpu(), kept["p_next"], rtol=0, atol=1e-3)
        return
    assert torch.equal(p.detach().cpu(), kept["p_next"])
    for key, x in opt.state[p].items():
        want = kept["state_next"][key]
        assert torch.equal(x.cpu(), want) if isinstance(x, torch.Tensor) else x == want, key


@pytest.mark.parametrize("path", CLASSES, ids=rule_of)
def test_a_stored_checkpoint_of_a_class_loads_bit_for_bit(path: Path) -> None:
    """Torch's own steps are cheap: they are taken, too; all others on a GPU."""
    every = golden.load(path)
    assert list(every) == golden.STATES
    for codec, kept in every.items():
        opt = golden_classes.resumed(rule_of(path), codec, kept)
        same_tree(dict(opt.state[params_of(opt)[0]]), kept["optimizer"]["state"][0])
    if rule_of(path) in ("SM3", "Muon", "GaLoreAdamW", "APOLLOAdamW"):
        follow(rule_of(path), "f32", every["f32"], "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("path", CLASSES, ids=rule_of)
def test_kernels_of_a_class_take_the_stored_step(path: Path) -> None:
    for codec, kept in golden.load(path).items():
        follow(rule_of(path), codec, kept, "cuda")


WAYS = ["pt", "safetensors"]
EVERY = list(product(sorted(golden.WORDS), CODECS, [None, *words_of(WEIGHTS)]))
SAMPLE = [EVERY[k] for k in np.random.default_rng(20).permutation(len(EVERY))[:60]]


def through(saved: Any, way: str, folder: Path) -> Any:
    """What a file gives back."""
    if way == "safetensors":
        pytest.importorskip("safetensors")
    path = folder / f"x.{way}"
    files.write(saved, path)
    return files.read(path)


@pytest.mark.parametrize("way", WAYS)
def test_every_combination_survives_a_file(way: str, tmp_path: Path) -> None:
    """Sampled by a seed from rules, codecs and formats of weights. Equal states and settings make equal steps."""
    for rule, codec, weight in SAMPLE:
        codecs = {s.name: codec for s in RULES[rule].states} | ({"p": weight} if weight else {})

        def make(params: Any, rule: str = rule, codecs: Any = codecs) -> Any:
            return rc.optim.Composed(params, rule, codecs, min_size=0, seed=3, **golden.WORDS[rule])

        opt = filled(make, torch.bfloat16, [(5, 72), (7,)])
        saved = opt.state_dict()
        back = through(saved, way, tmp_path)
        same_tree(back, saved, f"{rule} {codec} {weight}")
        other = make(twins(opt))
        other.load_state_dict(back)
        same_tree(other.state_dict(), saved, f"{rule} {codec} {weight}")


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_takes_the_same_steps(way: str, tmp_path: Path) -> None:
    opt = filled(lambda params: rc.optim.AdamW8bit(params, lr=0.013), torch.float32)
    other = rc.optim.AdamW8bit(twins(opt))
    other.load_state_dict(through(opt.state_dict(), way, tmp_path))
    for t in range(2):
        for side in (opt, other):
            give(params_of(side), t)
            side.step()
    same_tree(other.state_dict(), opt.state_dict())
    for p, q in zip(params_of(opt), params_of(other), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB", "Muon"])
@pytest.mark.parametrize("found", [states.FORMAT + 1, 0, "1", True], ids=repr)
def test_a_format_of_a_later_version_is_refused(name: str, found: Any) -> None:
    opt = getattr(rc.optim, name)([torch.nn.Parameter(torch.ones(64, 128))])
    saved = opt.state_dict()
    assert saved["param_groups"][0]["format"] == states.FORMAT
    saved["param_groups"][0]["format"] = found
    with pytest.raises(StateError, match=f"group 0 is in checkpoint format {found!r}; .* reads up to {states.FORMAT}"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["format"] == states.FORMAT


def test_what_a_file_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.npz must end in \.pt"):
        files.write({}, tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())
    file = tmp_path / "evil.pt"
    buffer = io.BytesIO()
    torch.save({"state": Path("a")}, buffer)
    file.write_bytes(buffer.getvalue())
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        files.read(file)


def test_distributed_checkpoints_keep_the_format() -> None:
    """Their state dicts name parameters; everything that a group holds comes through."""
    from torch.distributed.checkpoint import state_dict as dcp

    def model() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 8))

    def optimizer(one: Any) -> Any:
        return rc.optim.AdamW8bit(one.parameters(), lr=0.013)

    nets = [model(), model()]
    opts = [optimizer(net) for net in nets]
    give(params_of(opts[0]), 0)
    opts[0].step()
    saved = dcp.get_optimizer_state_dict(nets[0], opts[0])
    assert saved["param_groups"][0]["format"] == states.FORMAT
    dcp.set_optimizer_state_dict(nets[1], opts[1], saved)
    same_tree(opts[1].state_dict()["state"], opts[0].state_dict()["state"])
    assert opts[1].param_groups[0]["format"] == states.FORMAT
