"""FlashOptim (0.1): companded states in groups of 32 with float16 scales, and weights with error-correction bits.

Its state dict is made to survive torch's cast of states to the weights' dtype: beside bfloat16 weights the float16
scales are named bfloat16 (the same bits), 8 error bits are bfloat16 numbers, 16 error bits the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from refopt.spec import StateError
from refopt_cuda.codecs import named
from refopt_cuda.convert import walk
from refopt_cuda.convert.coded import Coded, Kept, Losses, values
from refopt_cuda.optim import states
from refopt_cuda.optim.composed import Composed

KEYS: dict[str, dict[str, str]] = {
    "sgd": {"buf": "momentum_buffer"},
    "adam": {"m": "exp_avg", "v": "exp_avg_sq"},
    "adamw": {"m": "exp_avg", "v": "exp_avg_sq"},
    "lion": {"m": "exp_avg"},
}
WORDS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening")
GROUP = 32
COUNTED = ("adam", "adamw")
"""Rules of which FlashOptim keeps a step count."""
ERRORS = {3: torch.int8, 4: torch.int16}
"""What lies beside a bfloat16 weight, by the bytes of the whole (`master_bytewidth`)."""


def from_flashoptim(state_dict: Mapping[str, Any], opt: Composed) -> dict[str, Any]:
    """A state dict of FlashOptim as one that `opt.load_state_dict` takes; `opt` is left as it is.

    state_dict  of FlashSGD, FlashAdam, FlashAdamW or FlashLion: `exp_avg::quantized` (int8; `exp_avg_sq` uint8) of the
                parameter's shape with `exp_avg::scales` (float16, one for 32), or plain `exp_avg`; `error_bits`
    opt         the same rule over the same parameters, in the same groups. Error bits need `codecs={"p": "bf16_ecc"}`
                (24-bit weights) or "bf16_ecc.16" (32); the codecs of states are free

    Where `opt` keeps compand8 in blocks of 32 and the rows of a tensor are whole blocks, codes and scales pass as they
    are, and decode to FlashOptim's numbers but for a few units in the last place. All else is decoded and, where `opt`
    codes it, encoded anew, with a warning. FlashLion and FlashSGD keep no step count: 1 is taken.

    Settings come along, but nesterov, which FlashOptim does not save. Raises StateError or ShapeError for another rule,
    other shapes, or error bits that `opt` has no place for.
    """
    call, opt = "from_flashoptim", walk.check_composed(opt, "from_flashoptim")
    keys = walk.refuse(opt.rule, KEYS, call, "FlashOptim")

    def group(theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {name: theirs[name] for name in WORDS if name in theirs}

    def entry(theirs: Mapping[str, Any], place: walk.Place, where: str) -> walk.Entry:
        here = {role: key for role, key in keys.items() if role in place.roles}
        kept: dict[str, Kept] = {role: _state(theirs, key, role == "v", where) for role, key in here.items()}
        if "error_bits" in theirs:
            kept["p"] = _errors(theirs["error_bits"], place, where)
        return walk.Entry(states.count(theirs, where, None if opt.rule.stem in COUNTED else 1), kept)

    return walk.read(state_dict, opt, call, group, entry)


def _state(entry: Mapping[str, Any], key: str, root: bool, where: str) -> Kept:
    """Codes and scales, or numbers. `root`: codes are of the square root."""
    codes, scales = (entry.get(f"{key}::{part}") for part in ("quantized", "scales"))
    if not isinstance(codes, torch.Tensor) or not isinstance(scales, torch.Tensor):
        x = entry.get(key)
        if not isinstance(x, torch.Tensor):
            raise StateError(f"{where} has neither '{key}' nor '{key}::quantized' with its scales")
        return x
    scales = scales.view(torch.float16) if scales.dtype == torch.bfloat16 else scales.to(torch.float16)
    codes = codes.to(torch.uint8 if root else torch.int8)
    if scales.numel() != -(-codes.numel() // GROUP):
        raise StateError(
            f"{where}: '{key}::scales' has {scales.numel()} for {codes.numel()} codes in groups of {GROUP}"
        )
    return Coded(codes, scales, GROUP, tuple(codes.shape), named("compand8", root))


def _errors(bits: torch.Tensor, place: walk.Place, where: str) -> torch.Tensor:
    """Error bits in the dtype that they are of."""
    if place.p.dtype != torch.bfloat16 or place.layout.beside is None:
        need = "bfloat16 weights with codecs={'p': 'bf16_ecc'} keep them here"
        raise StateError(f"{where} has error bits of {place.p.dtype} weights; {need}")
    if bits.dtype == torch.bfloat16 and place.layout.beside.dtype == torch.int16:
        return bits.view(torch.int16)
    return bits.to(torch.int8) if bits.dtype == torch.bfloat16 else bits


def to_flashoptim(opt: Composed) -> dict[str, Any]:
    """The state of `opt` as a state dict of the FlashOptim class of the same rule.

    Compand8 in blocks of 32 (float16 scales) along rows of whole blocks passes as it is; other states become float32
    numbers, which FlashOptim rounds when it loads them. Bits of `bf16_ecc` weights become `error_bits`: build its
    optimizer with master_weight_bits=24, or 32 for "bf16_ecc.16". Other bits beside weights stay behind, with a
    warning. FlashOptim's optimizers run on CUDA alone; a state dict needs no GPU.

    Raises StateError for a rule, or a setting, that FlashOptim does not have.
    """
    call, opt = "to_flashoptim", walk.check_composed(opt, "to_flashoptim")
    keys = walk.refuse(opt.rule, KEYS, call, "FlashOptim")

    def group(ours: Mapping[str, Any], where: str) -> dict[str, Any]:
        walk.plain(ours, opt.rule, {*WORDS, "nesterov"}, where, "FlashOptim")
        weight = named(ours["codecs"].get("p", "f32"))
        width = 2 + weight.options["bits"] // 8 if weight.stem == "bf16_ecc" else 2  # type: ignore[operator]
        words = {name: ours[name] for name in WORDS if name in ours}
        return {"initial_lr": ours["lr"], "master_bytewidth": width, "quantize": True, **words}

    def entry(found: walk.Entry, place: walk.Place, losses: Losses) -> dict[str, Any]:
        out: dict[str, Any] = {"step": torch.tensor(found.step)} if opt.rule.stem in COUNTED else {}
        kept = dict(found.kept)
        if place.layout.weight is not None and place.layout.weight.stem == "bf16_ecc":
            bits = kept.pop("p")
            assert isinstance(bits, torch.Tensor)
            out["error_bits"] = bits.view(torch.bfloat16) if bits.dtype == torch.int16 else bits.to(torch.bfloat16)
        for role, x in walk.without_bits(found._replace(kept=kept), losses).items():
            out |= _parts(x, keys[role], place, role == "v")
        return out

    return walk.write(opt, call, group, entry)


def _parts(x: Kept, key: str, place: walk.Place, root: bool) -> dict[str, torch.Tensor]:
    shape = tuple(place.p.shape)
    if not isinstance(x, Coded) or x.form != named("compand8", root) or x.block != GROUP:
        return {key: values(x).reshape(shape)}
    scales = x.scales.reshape(-1)
    named_so = scales.view(torch.bfloat16) if place.p.dtype == torch.bfloat16 else scales
    return {f"{key}::quantized": x.codes.reshape(shape), f"{key}::scales": named_so}
