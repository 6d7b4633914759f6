"""Optimizers of other libraries that run on a CPU, the rule that each claims, and what the suite must find, untold."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from typing import Any, NamedTuple


class Peer(NamedTuple):
    """`finds` are keys of findings that must be there; `note` is for what a claim cannot say."""

    target: str
    claim: str
    finds: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012  (nobody writes into it)

    @property
    def package(self) -> str:
        return self.target.partition(":")[0].partition(".")[0]


TORCH, BNB, AO, PO = "torch.optim:", "bitsandbytes.optim:", "torchao.optim:", "pytorch_optimizer:"
HALF = "L7/base@bfloat16/state-bf16"

PEERS = [
    Peer(TORCH + "SGD", "sgd"),
    Peer(TORCH + "Adam", "adam", (HALF,)),
    Peer(TORCH + "AdamW", "adamw", ("L1/base/lerp", "L1/base@bfloat16/arithmetic-bf16", HALF)),
    Peer(TORCH + "RMSprop", "rmsprop", ("L1/centered/lerp",)),
    Peer(TORCH + "Adagrad", "adagrad"),
    Peer(TORCH + "Adafactor", "adafactor(variant=torch)", ("L1/base/pass", "L6/base/nan-weight")),
    Peer(TORCH + "Adafactor", "adafactor", ("L1/base/variant-torch",)),
    Peer(TORCH + "Muon", "muon", ("L1/base/lerp",)),
    Peer(BNB + "Adam", "adam", ("L1/base/decay-decoupled", "L1/amsgrad/decay-decoupled+amsgrad-ignored")),
    Peer(BNB + "AdamW", "adamw", ("L1/amsgrad/amsgrad-ignored",)),
    Peer(BNB + "SGD", "sgd", ("L1/dampening/dampening-ignored", "L1/nesterov/nesterov-ignored")),
    Peer(BNB + "Lion", "lion"),
    Peer(BNB + "RMSprop", "rmsprop", ("L1/momentum/momentum-ignored",)),
    Peer(BNB + "Adagrad", "adagrad"),
    Peer(BNB + "AdEMAMix", "ademamix"),
    Peer(BNB + "AdEMAMix32bit", "ademamix", ("L0/base/half-state",)),
    Peer(BNB + "LAMB", "lamb", ("L1/base/variant-clip-bitsandbytes",)),
    Peer(BNB + "LARS", "lars", ("L1/cut/variant-clip-bitsandbytes",)),
    Peer(BNB + "AdamW8bit", "adamw", ("L3/base/codes-not-nearest",)),
    Peer(BNB + "Lion8bit", "lion", ("L3/base/codes-not-nearest",)),
    Peer(BNB + "AdEMAMix8bit", "ademamix", ("L3/base/codes-not-nearest",)),
    Peer(AO + "AdamW8bit", "adamw", ("L1/base/corrections-f32", "L0/amsgrad/amsgrad-raises", HALF)),
    Peer(AO + "AdamW8bit", "adamw", ("L1/base@bfloat16/state-bf16+corrections-f32",)),
    Peer(AO + "AdamW4bit", "adamw", ("L1/base/corrections-f32", HALF)),
    Peer(AO + "AdamWFp8", "adamw", ("L1/base/corrections-f32", HALF)),
    Peer("optimi:AdamW", "adamw", ("L1/base/debiased-states",)),
    Peer("optimi:Adam", "adam", ("L1/base/debiased-states", "L0/base/gradient-changed")),
    Peer("optimi:SGD", "sgd", ("L1/dampening/dampening-is-a-switch+first-step-damped",)),
    Peer("optimi:Lion", "lion", ("L1/base/lerp", "L1/base@bfloat16/arithmetic-bf16")),
    Peer("lion_pytorch:Lion", "lion", (HALF,)),
    Peer(
        "transformers.optimization:Adafactor",
        "adafactor",
        ("L1/base/pass", "L1/fixed/pass", "L5/base@bfloat16/state-changed"),
    ),
    Peer("transformers.optimization:Adafactor", "adafactor(variant=torch)", ("L1/base/variant-transformers",)),
    Peer("schedulefree:AdamWScheduleFree", "schedule_free", ("L1/base/pass",)),
    Peer(PO + "AdamW", "adamw", ("L1/base/lerp",)),
    Peer(PO + "Lion", "lion", ("L1/base/lerp",)),
    Peer(PO + "CAME", "came", ("L1/base/pass",)),
    Peer(PO + "SM3", "sm3(eps=1e-30)", ("L1/base/pass",)),
    Peer(PO + "SGDW", "sgd", ("L1/momentum/decay-decoupled",)),
    Peer(PO + "AdEMAMix", "ademamix", ("L1/base/decay-coupled",)),
]


OX, FLASH = "optax:", "flashoptim:"
PEERS += [
    Peer(OX + "adam", "adam", ("L1/base-without-wd/corrections-f32",)),
    Peer(OX + "adamw", "adamw", ("L1/base/corrections-f32",)),
    Peer(OX + "lion", "lion", ("L1/base/pass", "L6/base/special-nan")),
    Peer(OX + "sgd", "sgd"),
    Peer(OX + "rmsprop", "rmsprop", ("L1/momentum-without-wd/eps-inside+buffer-of-steps",)),
    Peer(OX + "adagrad", "adagrad", ("L1/base-without-wd/eps-inside",)),
    Peer(OX + "lamb", "lamb", ("L1/base/corrections-f32",)),
    Peer(OX + "lars", "lars", ("L1/base/variant-optax+buffer-of-steps",)),
    Peer("optax.contrib:ademamix", "ademamix", ("L1/base/corrections-f32",)),
    Peer("optax.contrib:schedule_free_adamw", "schedule_free", ("L1/base/corrections-f32",)),
]
"""JAX is no dependency of the tests: these run where optax is installed."""

PURE = {"master_weight_bits": None}
"""FlashOptim's own masters are for weights of 16 bits alone; without them all formats are asked."""

ON_GPU = [
    Peer(TORCH + "AdamW", "adamw"),
    *(Peer(BNB + name, name.lower()) for name in ("Adam", "AdamW", "SGD", "Lion", "RMSprop", "Adagrad", "AdEMAMix")),
    *(Peer(BNB + name, name.lower()) for name in ("LAMB", "LARS")),
    *(Peer(BNB + name + "8bit", name.lower()) for name in ("AdamW", "SGD", "Lion", "RMSprop", "Adagrad", "AdEMAMix")),
    *(Peer(BNB + name + "8bit", name.lower()) for name in ("LAMB", "LARS")),
    Peer(BNB + "AdEMAMix32bit", "ademamix"),
    *(Peer(AO + name, "adamw") for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")),
    Peer(FLASH + "FlashAdamW", "adamw", options=PURE),
    Peer(FLASH + "FlashAdam", "adam", options=PURE),
    Peer(FLASH + "FlashLion", "lion", options=PURE),
    Peer(FLASH + "FlashSGD", "sgd", options=PURE),
]
"""What `tests.conform.field_gpu` asks; the first is torch's own, to know the machine by."""


def importable(package: str) -> str:
    """ "" if a package can be imported, else why not; what it prints on the way is kept."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(package)
    except Exception as error:
        return f"{package} cannot be imported here: {error}"
    finally:
        logging.disable(logging.NOTSET)
    return ""
