"""What a fine-tuning does, from the options and the machine; refused where it cannot be done."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from refopt_cuda import optim
from refopt_cuda.train.errors import InputError

METHODS = ("qlora", "lora", "full")
OPTIMIZER = "PagedAdamW"
RATES = {"qlora": 2e-4, "lora": 2e-4, "full": 2e-5}
"""Learning rates of the papers; --lr is taken for all methods."""
PLAIN = ("Composed", "Muon", "GaLoreAdamW", "GaLoreAdamW8bit", "APOLLOAdamW")
"""Drop-ins that need arguments of their own, or matrices alone."""


@dataclass(frozen=True)
class Plan:
    """All that the result depends on besides the model and the text."""

    model: str
    text: tuple[str, ...] = ()
    chat: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("qlora",)
    seeds: tuple[int, ...] = (0,)
    steps: int = 100
    batch: int = 4
    context: int = 256
    lr: float | None = None
    optimizer: str = OPTIMIZER
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    quant_type: str = "nf4"
    clip: float = 0.3
    checkpointing: bool = True
    device: str = "cpu"
    sha256: str = ""
    """Of the data, once they have been read."""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Plan:
        """What `dataclasses.asdict` gave, through JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return cls(**values)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(method, seed) of every run, in order."""
        return [(method, seed) for seed in self.seeds for method in self.methods]

    def rate(self, method: str) -> float:
        return RATES[method] if self.lr is None else self.lr

    @property
    def dtype(self) -> torch.dtype:
        """What products are taken in."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def optimizers() -> list[str]:
    """Classes of refopt_cuda.optim that take nothing but parameters and lr."""
    made = (n for n in dir(optim) if isinstance(getattr(optim, n), type) and n not in PLAIN)
    return sorted(n for n in made if issubclass(getattr(optim, n), torch.optim.Optimizer))


def make(given: dict[str, Any]) -> Plan:
    """The usual plan with what the user asked for. Raises InputError that names the option at fault."""
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here")
    if not given.get("model"):
        raise InputError("name MODEL, a folder of transformers, or go on with --resume")
    plan = replace(Plan(given["model"]), **{k: v for k, v in given.items() if v is not None} | {"device": device})
    check(plan)
    return plan


def check(plan: Plan) -> None:
    """Raises InputError that names the option at fault."""
    for name in ("steps", "batch", "rank"):
        if getattr(plan, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(plan, name)}")
    if plan.context < 8:
        raise InputError(f"--context must be at least 8 tokens, got {plan.context}")
    if plan.lr is not None and not 0 < plan.lr < math.inf:
        raise InputError(f"--lr must be a positive number, got {plan.lr}")
    if not math.isfinite(plan.alpha):
        raise InputError(f"--alpha must be a finite number, got {plan.alpha}")
    if not 0 <= plan.dropout < 1:
        raise InputError(f"--dropout must be at least 0 and below 1, got {plan.dropout}")
    if plan.quant_type not in ("nf4", "fp4"):
        raise InputError(f"--quant-type must be nf4 or fp4, got {plan.quant_type!r}")
    if bool(plan.text) == bool(plan.chat):
        raise InputError("name the data: --text FILE ... (UTF-8) or --chat FILE ... (JSON lines), one of the two")
    _check_optimizer(plan.optimizer)
    _check_model(plan)


def _check_optimizer(name: str) -> None:
    known = optimizers()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"--optimizer: no optimizer {name!r}{hint}; there are {', '.join(known)}")


def _check_model(plan: Plan) -> None:
    """A folder with a configuration and weights, and a rank that its layers can have."""
    folder = Path(plan.model)
    if not folder.is_dir():
        raise InputError(f"MODEL {folder}: is no folder; nothing is downloaded")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except OSError as error:
        raise InputError(f"MODEL {folder}: config.json: {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        raise InputError(f"MODEL {folder}: config.json is not JSON: {error}") from None
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"MODEL {folder}: holds no *.safetensors")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f"MODEL {folder}: holds no tokenizer.json")
    widest = config.get("hidden_size") or config.get("n_embd")
    if isinstance(widest, int) and plan.rank > widest and plan.methods != ("full",):
        raise InputError(f"--rank must be at most {widest}, the model's width, got {plan.rank}")
    if "quantization_config" in config and plan.methods != ("qlora",):
        raise InputError(f"MODEL {folder}: is quantized; only --qlora trains beside such weights")
