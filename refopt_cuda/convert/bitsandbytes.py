"""bitsandbytes (0.37 to 0.50): state1, state2 in blocks of 256 of the flattened tensor, or in float32.

Its first state takes the signed dynamic map whatever it holds, so the second moment of RMSprop and Adagrad, which is
unsigned here, is decoded and encoded anew both ways; all others pass as the same bytes where rows are whole blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from refopt.codecs.dynamic8 import bitsandbytes_table
from refopt.spec import Rule, StateError
from refopt_cuda.codecs import Form, named
from refopt_cuda.convert import walk
from refopt_cuda.convert.coded import Coded, Kept, Losses, coded_as, reads, values
from refopt_cuda.optim import states
from refopt_cuda.optim.composed import Composed
from refopt_cuda.optim.settings import Coding

ONE, TWO = ("m",), ("v",)
SLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sgd": (("buf",),),
    "adam": (ONE, TWO),
    "adamw": (ONE, TWO),
    "lion": (ONE,),
    "rmsprop": (TWO,),
    "adagrad": (("s",),),
    "ademamix": (("m1", "m2"), TWO),
}
"""What state1 and state2 hold: two roles lie one behind the other along a new first axis."""
WRAPPED = "__bnb_optimizer_quant_state__"
SIGNED, UNSIGNED = Coding(named("dynamic8"), 256), Coding(named("dynamic8.unsigned"), 256)
BLOCKS = (256, 2048)
"""Of today's releases, and of those before blocks were made smaller."""


def from_bitsandbytes(state_dict: Mapping[str, Any], opt: Composed) -> dict[str, Any]:
    """A state dict of bitsandbytes as one that `opt.load_state_dict` takes; `opt` is left as it is.

    state_dict  of its SGD, Adam, AdamW, Lion, RMSprop, Adagrad or AdEMAMix, 8 or 32 bits, paged or not: uint8 `state1`
                of the parameter's shape, float32 `qmap1` (256), `absmax1` (one for 256 elements), wrapped or not
    opt         the same rule over the same parameters, in the same groups; its codecs are free

    Where `opt` keeps dynamic8 in blocks of 256 and the rows of a tensor are whole blocks, codes and scales pass as they
    are; their map differs from ours by at most one unit in the last place (unsigned: two). All else is decoded with
    the map in the file and, where `opt` codes it, encoded anew, with a warning that says how many states and why.

    Settings come along. Raises StateError or ShapeError for another rule, other shapes, or a map with holes.
    """
    call, opt = "from_bitsandbytes", walk.check_composed(opt, "from_bitsandbytes")
    slots = walk.refuse(opt.rule, SLOTS, call, "bitsandbytes")

    def entry(theirs: Mapping[str, Any], place: walk.Place, where: str) -> walk.Entry:
        theirs = {**theirs, **theirs.get(WRAPPED, {})}
        kept: dict[str, Kept] = {}
        for k, roles in enumerate(slots, 1):
            kept |= zip(roles, _states(theirs, k, roles, where), strict=True)
        return walk.Entry(states.count(theirs, where), kept)

    return walk.read(state_dict, opt, call, lambda g, where: _settings(g, opt.rule, where), entry)


def _states(entry: Mapping[str, Any], k: int, roles: tuple[str, ...], where: str) -> list[Kept]:
    """What lies in `state1` or `state2`."""
    x = entry.get(f"state{k}")
    if not isinstance(x, torch.Tensor):
        raise StateError(f"{where} has no tensor 'state{k}'; it has {', '.join(map(str, entry))}")
    each = list(x) if len(roles) > 1 else [x]
    if len(each) != len(roles):
        raise StateError(f"{where}: 'state{k}' has {len(each)} parts, {', '.join(roles)} were expected")
    if x.dtype != torch.uint8:
        return [*each]
    table, absmax = entry.get(f"qmap{k}"), entry.get(f"absmax{k}")
    if not isinstance(table, torch.Tensor) or not isinstance(absmax, torch.Tensor) or table.numel() != 256:
        raise StateError(f"{where}: 'state{k}' is coded, but there is no 'qmap{k}' of 256 values with an 'absmax{k}'")
    absmax = absmax.reshape(len(roles), -1)
    n = each[0].numel()
    sizes = [b for b in BLOCKS if absmax.shape[1] == -(-n // b)]
    if not sizes:
        raise StateError(f"{where}: 'absmax{k}' has {absmax.shape[1]} scales, blocks of 256 of {n} need {-(-n // 256)}")
    form = next((c.form for c in (SIGNED, UNSIGNED) if reads(c.form, table)), None)
    return [Coded(y, a, sizes[0], tuple(y.shape), form, table.float()) for y, a in zip(each, absmax, strict=True)]


def _settings(group: Mapping[str, Any], rule: Rule, where: str) -> dict[str, Any]:
    """A group of theirs in our words."""
    out = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    betas, stem = group["betas"], rule.stem
    if stem == "adam" and group["weight_decay"]:
        raise StateError(
            f"{where}: bitsandbytes' Adam decays decoupled (weight_decay {group['weight_decay']}): that is AdamW here"
        )
    if stem in ("adam", "adamw", "rmsprop", "adagrad", "ademamix"):
        out["eps"] = group["eps"]
    if stem in ("adam", "adamw", "lion", "ademamix"):
        out["betas"] = tuple(betas)
    if stem in ("adam", "adamw"):
        out["amsgrad"] = False
    elif stem == "sgd":
        out |= {"momentum": betas[0], "dampening": 0.0, "nesterov": False}
    elif stem == "rmsprop":
        out |= {"alpha": betas[0], "momentum": 0.0, "centered": False}
    elif stem == "adagrad":
        out["lr_decay"] = 0.0
    elif stem == "ademamix":
        out |= {name: group.get(name) for name in ("alpha", "t_alpha", "t_beta3")}
    return out


def to_bitsandbytes(opt: Composed) -> dict[str, Any]:
    """The state of `opt` as a state dict of the bitsandbytes class of the same rule.

    States that are coded here become uint8 codes with bitsandbytes' map, blocks of 256 of the flattened tensor: the
    same bytes where they are dynamic8 in blocks of 256 and the rows are whole blocks, encoded anew elsewhere (with a
    warning); float32 states stay float32, which bitsandbytes steps too, whatever their size. What lies beside bfloat16
    weights stays behind, with a warning. bitsandbytes on CUDA decays after AdamW's step, `decay_order="after"` here; on
    a CPU before it.

    Raises StateError for a rule, or a setting, that bitsandbytes does not have: amsgrad, nesterov, dampening, centered,
    maximize, Adam with coupled decay.
    """
    call, opt = "to_bitsandbytes", walk.check_composed(opt, "to_bitsandbytes")
    slots = walk.refuse(opt.rule, SLOTS, call, "bitsandbytes")

    def entry(found: walk.Entry, place: walk.Place, losses: Losses) -> dict[str, Any]:
        kept, out = walk.without_bits(found, losses), {"step": found.step}
        for k, roles in enumerate(slots, 1):
            out |= _slot(k, [kept[r] for r in roles], [place.codings[r].form for r in roles], place, losses)
        return out

    return walk.write(opt, call, lambda g, where: _words(g, opt.rule, where), entry)


def _slot(k: int, kept: list[Kept], forms: list[Form], place: walk.Place, losses: Losses) -> dict[str, Any]:
    """The entries of `state1` or `state2`."""
    shape, coding = tuple(place.p.shape), UNSIGNED if k == 2 else SIGNED

    def joined(xs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(xs) if len(xs) > 1 else xs[0]

    if not all(form.scaled for form in forms):
        return {f"state{k}": joined([values(x).reshape(shape) for x in kept])}
    coded = [coded_as(x, coding, shape, losses) for x in kept]
    return {
        f"state{k}": joined([c.codes.reshape(shape) for c in coded]),
        f"qmap{k}": torch.tensor(bitsandbytes_table(k == 1), device=place.p.device),
        f"absmax{k}": joined([c.scales.reshape(-1) for c in coded]),
    }


def _words(group: Mapping[str, Any], rule: Rule, where: str) -> dict[str, Any]:
    """A group of ours in their words."""
    stem = rule.stem
    same = {"betas", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay", "momentum" if stem == "sgd" else "betas"}
    if group.get("decay_order") == "after":  # as bitsandbytes has it on CUDA
        same.add("decay_order")
    walk.plain(group, rule, same | {"initial_accumulator_value"}, where, "bitsandbytes")
    if stem == "sgd" and not group["momentum"]:
        raise StateError(f"{where}: bitsandbytes' SGD has a momentum above 0, here it is {group['momentum']!r}")
    if stem == "adam" and group["weight_decay"]:
        raise StateError(
            f"{where}: weight_decay {group['weight_decay']} is coupled here, bitsandbytes' Adam decays decoupled"
        )
    betas = {"sgd": lambda: (group["momentum"], 0.0), "rmsprop": lambda: (group["alpha"], 0.0)}
    betas |= {"adagrad": lambda: (0.0, 0.0)}
    out = {
        "lr": group["lr"],
        "betas": betas[stem]() if stem in betas else tuple(group["betas"]),
        "eps": group.get("eps", 0.0),
        "weight_decay": group["weight_decay"],
    }
    if len(SLOTS[stem]) == 2:
        mixed = stem == "ademamix"
        out |= {"alpha": group["alpha"] if mixed else 0.0}
        out |= {name: group[name] if mixed else None for name in ("t_alpha", "t_beta3")}
    return out
