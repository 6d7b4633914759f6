"""The adapter for optimizers in the style of torch: `opt = Class(params, **words)`, `opt.step()`, `opt.state[p]`.

States are found by the names that torch, bitsandbytes, torchao and transformers give them; words for hyper-parameters
come from the reference's records. torch is imported when a target is made.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from refopt.conform import torch_codes
from refopt.conform.target import Coded, Target, decoded, moved
from refopt.spec import Array, Rule

WORDS: dict[str, tuple[str, ...]] = {
    "wd": ("weight_decay", "wd"),
    "beta1": ("betas[0]", "beta1"),
    "beta2": ("betas[1]", "beta2"),
    "beta3": ("betas[2]", "beta3"),
    "beta": ("momentum", "betas[0]", "beta"),
    "eps": ("eps",),
    "eps1": ("eps[0]", "eps1"),
    "eps2": ("eps[1]", "eps2"),
    "clip": ("clip_threshold", "d", "clip"),
    "decay_rate": ("decay_rate", "beta2_decay"),
    "init_acc": ("initial_accumulator_value", "init_acc"),
    "trust": ("trust_coefficient", "trust"),
    "adjust_lr": ("adjust_lr_fn",),
    "warmup": ("warmup_steps",),
}
"""The words that libraries have for a hyper-parameter; for others, the record's torch word and its own name."""

STATES: dict[str, tuple[str, ...]] = {
    "m": ("exp_avg", "state1", "m"),
    "v": ("exp_avg_sq", "square_avg", "state2", "v", "momentum_buffer"),
    "w": ("max_exp_avg_sq", "w"),
    "m1": ("exp_avg_fast", "exp_avg", "state1", "m1"),
    "m2": ("exp_avg_slow", "m2"),
    "buf": ("momentum_buffer", "state1", "exp_avg", "buf"),
    "a": ("grad_avg",),
    "s": ("sum", "state1"),
    "R": ("exp_avg_sq_row", "row_var"),
    "C": ("exp_avg_sq_col", "col_var"),
    "V": ("exp_avg_sq", "variance"),
    "B": ("momentum_buffer",),
    "z": ("z",),
}
"""The names that libraries give to a state, most usual first."""

FIRST = {("rmsprop", "v"): "state1", ("lars", "v"): "state1"}
"""What bitsandbytes calls `state1` where another state of that name comes first."""


class TorchTarget(Target):
    """A class of torch optimizers. `options` go to its constructor as they are.

    `compiled=True` lets a step compile itself (`torch.compile`), as users have it; without, it runs eagerly, which
    saves a minute a shape.
    """

    dtypes = ("float32", "bfloat16")

    def __init__(
        self, cls: type, name: str = "", *, device: str = "cpu", compiled: bool = False, **options: Any
    ) -> None:
        import torch

        self.torch, self.cls, self.name = torch, cls, name or f"{cls.__module__}:{cls.__name__}"
        self.device, self.compiled, self.options = device, compiled, options
        self.jumps = False
        self.place = options.get("place")

    def refuses(self, rule: Rule, hyper: dict[str, Any]) -> list[str]:
        return [n for n in moved(rule, hyper) if self._word(rule, n) is None]

    def _word(self, rule: Rule, name: str) -> str | None:
        """The constructor's word for a hyper-parameter ("betas[0]"), None if it has none."""
        taken = inspect.signature(self.cls).parameters
        own = next((h.torch for h in rule.hypers if h.name == name), "")
        for word in (own, *WORDS.get(name, ()), name):
            if word and word.partition("[")[0] in taken:
                return word
        return None

    def words(self, rule: Rule, hyper: dict[str, Any]) -> dict[str, Any]:
        """Hyper-parameters under the constructor's names; several of one tuple are put together."""
        out: dict[str, Any] = {}
        tuples: dict[str, dict[int, Any]] = {}
        for name, value in hyper.items():
            word = self._word(rule, name)
            if word is None or (value is None and name != "beta1" and "[" not in word):
                continue
            base, _, index = word.partition("[")
            if index:
                tuples.setdefault(base, {})[int(index.rstrip("]"))] = value
            else:
                out[base] = value
        out |= {base: self._tuple(base, parts) for base, parts in tuples.items()}
        if both := out.keys() & self.options.keys():
            raise ValueError(f"{self.name}: {', '.join(sorted(both))} cannot be an option: the suite sets it itself")
        return out | self.options

    def _tuple(self, base: str, parts: dict[int, Any]) -> tuple[Any, ...]:
        given = inspect.signature(self.cls).parameters[base].default
        whole = list(given) if isinstance(given, tuple | list) else []
        whole += [None] * (max(parts) + 1 - len(whole))
        for index, value in parts.items():
            whole[index] = value if value is not None or whole[index] is None else whole[index]
        return tuple(whole)

    def start(self, rule: Rule, params: Sequence[Array], hyper: dict[str, Any], dtype: str = "float32") -> None:
        self.rule, self.dtype = rule, getattr(self.torch, dtype)
        self.ps = [self.torch.nn.Parameter(self._tensor(p)) for p in params]
        self.opt = self.cls(self.ps, **self.words(rule, hyper))
        if callable(getattr(self.opt, "train", None)):
            self.opt.train()

    def _tensor(self, x: Array) -> Any:
        return self.torch.from_numpy(np.array(x, order="C")).to(self.device, self.dtype)

    @contextlib.contextmanager
    def _eager(self) -> Iterator[None]:
        if self.compiled:
            yield
            return
        with self.torch.compiler.set_stance("force_eager"):
            yield

    def step(self, grads: Sequence[Array]) -> None:
        self.given = [self._tensor(g) for g in grads]
        for p, g in zip(self.ps, self.given, strict=True):
            p.grad = g.clone()
        with self._eager():
            self.opt.step(*self._closure())
        if odd := {p.dtype for p in self.ps} - {self.dtype}:
            raise TypeError(f"weights were {self.dtype} and are {', '.join(map(str, odd))}")

    def _closure(self) -> list[Any]:
        """For a step that will not do without: a closure that leaves the gradients as they are."""
        needed = inspect.signature(self.opt.step).parameters.get("closure")
        without = needed is None or needed.default is not inspect.Parameter.empty
        return [] if without else [lambda: self.torch.zeros(())]

    def params(self) -> list[Array]:
        return [self._array(p) for p in self.ps]

    def changed(self) -> list[str]:
        left: list[Any] = [p.grad for p in self.ps]
        return [] if all(map(self.torch.equal, left, self.given)) else ["g"]

    def _array(self, x: Any) -> Array:
        return torch_codes.opened(x).float().cpu().numpy().copy()

    def stored(self, k: int) -> dict[str, Any]:
        """The tensors that hold states of parameter k, by the reference's names; views where one holds two."""
        have, p = self.opt.state.get(self.ps[k], {}), self.ps[k]
        out: dict[str, str] = {}
        for st in self.rule.states:
            for word in (FIRST.get((self.rule.stem, st.name), ""), *STATES.get(st.name, ()), st.torch, st.name):
                x = torch_codes.tensor(self.torch, have.get(word)) if word else None
                if x is not None and x.numel() == self._size(st, p) and word not in out.values():
                    out[st.name] = word
                    break
        pair = have.get("state1")
        if self.rule.stem == "ademamix" and self.torch.is_tensor(pair) and pair.shape == (2, *p.shape):
            return {"m1": pair[0], "m2": pair[1], "v": have["state2"]}
        return {name: torch_codes.tensor(self.torch, have[word]) for name, word in out.items()}

    def unknown(self, k: int) -> list[str]:
        """Tensors as large as the weights that stand under no known name."""
        held = {x.data_ptr() for x in self.stored(k).values() if self._plain(x)}
        return [
            n
            for n, x in self.opt.state[self.ps[k]].items()
            if self._plain(x) and x.numel() >= self.ps[k].numel() > 1 and x.data_ptr() not in held
        ]

    def _plain(self, x: Any) -> bool:
        """Whether an entry of a state is a tensor of its values."""
        return self.torch.is_tensor(x) and not hasattr(x, "codes")

    def _size(self, st: Any, p: Any) -> int:
        form = st.shape(tuple(p.shape), self.rule.defaults()) if st.shape else tuple(p.shape)
        return -1 if form is None else int(np.prod(form, dtype=int))

    def state(self, k: int) -> dict[str, Array]:
        coded = self.coded(k)
        plain = {n: self._array(x) for n, x in self.stored(k).items() if n not in coded}
        return plain | {n: decoded(c).reshape(self.ps[k].shape) for n, c in coded.items()}

    def force(self, k: int, p: Array, state: dict[str, Array], t: int) -> bool:
        stored = self.stored(k)
        if self.unknown(k):
            return False
        if self.coded(k) or not stored.keys() <= state.keys() or any(x.dtype != self.dtype for x in stored.values()):
            return False
        with self.torch.no_grad():
            self.ps[k].copy_(self._tensor(p))
            for n, x in stored.items():
                x.copy_(self._tensor(state[n]).reshape(x.shape))
        return self._set_t(k, t)

    def _set_t(self, k: int, t: int) -> bool:
        """Set the count of steps where there is one; remembers whether there is."""
        for home in (self.opt.state[self.ps[k]], self.opt.param_groups[0]):
            if "step" in home:
                x, self.jumps = home["step"], True
                home["step"] = self.torch.full_like(x, t) if self.torch.is_tensor(x) else t
        return True

    def coded(self, k: int) -> dict[str, Coded]:
        have, mix = self.opt.state.get(self.ps[k], {}), self.rule.stem == "ademamix"
        found = {n: torch_codes.coded(self.torch, have, n, x, mix) for n, x in self.stored(k).items()}
        return {n: c for n, c in found.items() if c is not None}

    def save(self) -> Any:
        file = io.BytesIO()
        self.torch.save(self.opt.state_dict(), file)
        return file

    def load(self, saved: Any) -> None:
        saved.seek(0)
        self.opt.load_state_dict(self.torch.load(saved, weights_only=False, map_location=self.device))

    def nbytes(self, k: int) -> int | None:
        have = self.opt.state.get(self.ps[k])
        return None if have is None else sum(self._bytes(n, x, self.ps[k].numel()) for n, x in have.items())

    def _bytes(self, name: str, x: Any, size: int) -> int:
        """Bytes of one entry of a state; tables that all parameters share do not count."""
        if "qmap" in name or (self.torch.is_tensor(x) and x.numel() == 1 < size):
            return 0
        return torch_codes.nbytes(self.torch, x)

    def resident(self) -> Target | None:
        if self.place is None:
            return None
        others = {n: x for n, x in self.options.items() if n != "place"}
        return TorchTarget(self.cls, self.name, device=self.device, compiled=self.compiled, **others)
