"""`init` and `step`: an optimizer step on arrays of NumPy, CuPy, torch or anything with DLPack, without a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refopt.codecs import CODECS as RECORDS
from refopt.codecs import blocks
from refopt.rules import RULES
from refopt.spec import Rule, StateError
from refopt_cuda import arrays, rules
from refopt_cuda.codecs import WEIGHTS, Form, named
from refopt_cuda.quantization import Quantized, _codes_shape
from refopt_cuda.random import step_word

__all__ = ["init", "step"]

_launches: dict[Any, Any] = {}


def init(rule: str, p: Any, codecs: Any = None, **hyper: Any) -> dict[str, Any]:
    """The state of one parameter before its first step: {"t": 0, name: array or `Quantized` ...}, on p's device.

    rule     a stem with a kernel: "adamw", "lion" ...
    p        float32, float16 or bfloat16 (in NumPy and CuPy its uint16 words), row-major
    codecs   a codec for every state, or {role: codec}: names as "dynamic8", "q4:64"; role `p` is a format of
             bfloat16 weights ("bf16_rem16"), whose rest is kept in the state
    hyper    the rule's hyper-parameters where they decide which states there are (momentum, amsgrad)
    """
    record, call = _record(rule, "init"), "init"
    made, checked = arrays.handle(p, call, "p"), record.check(call, hyper)
    first = {name: float(x[0]) for name, x in record.init(np.zeros(1, np.float32), **checked).items()}
    table = codecs if isinstance(codecs, Mapping) else dict.fromkeys(first, codecs or "f32")
    for role in table:
        if role not in {s.name for s in record.states} | {"p"}:
            raise ValueError(f"{call}: {rule} has no role {role!r}; it has {', '.join(first)} and p")
    state: dict[str, Any] = {"t": 0}
    for kept in record.states:
        if kept.name in first:
            state[kept.name] = _zero(table.get(kept.name, "f32"), kept.nonnegative, first[kept.name], made, call)
    if "p" in table:
        state["p"] = _rest(table["p"], made, call)
    return state


def step(rule: str, p: Any, g: Any, state: Any, *, seed: int = 0, maximize: bool = False, **hyper: Any) -> None:
    """One step, in place: p, g and state are arrays and their state, or lists of them; a gradient of None is skipped.

    All tensors of equal formats take one kernel launch on their library's current stream. `seed` is of the random bits
    of weights rounded by chance, `maximize` climbs; `hyper` are the rule's hyper-parameters by the reference's names.
    Raises TypeError, ValueError, ShapeError or StateError that name what is wrong, before anything is written.

    >>> import numpy as np
    >>> import refopt_cuda as rc
    >>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
    >>> state = rc.init("lion", p)
    >>> rc.step("lion", p, g, state, lr=0.1, wd=0.1)
    >>> print(p, state["m"], state["t"])
    [ 0.89 -2.08] [0.005  0.0025] 1
    """
    call, record = "step", _record(rule, "step")
    checked = record.check(call, hyper)
    form = rules.form_of(rule, checked)
    many = isinstance(p, list | tuple)
    ps, gs, states = (p, g, state) if many else ([p], [g], [state])
    if not len(ps) == len(gs) == len(states):
        raise ValueError(f"{call}: {len(ps)} params, {len(gs)} gradients and {len(states)} states: one each is needed")
    work = [_One(k, *one, form, call) for k, one in enumerate(zip(ps, gs, states, strict=True)) if one[1] is not None]
    given = {**checked, "maximize": maximize}
    made = {t: rules.row(rule, t, given) for t in {one.t for one in work}}
    for kind, some in _kinds(work).items():
        if some[0].p.device is None:
            for one in some:
                one.on_host(made[one.t], step_word(seed, one.t))
        else:
            _launch(kind, some, made, {t: step_word(seed, t) for t in made})
    for one in work:
        one.state["t"] = one.t


class _One:
    """One parameter of a step, checked."""

    def __init__(self, k: int, p: Any, g: Any, state: Any, form: rules.Form, call: str) -> None:
        self.p, self.g = arrays.handle(p, call, f"params[{k}]"), arrays.handle(g, call, f"grads[{k}]")
        arrays.like(self.p, self.g, call, f"params[{k}] and grads[{k}]")
        if not isinstance(state, dict) or not isinstance(state.get("t"), int):
            raise StateError(f"{call}: state[{k}] must be what init returned, got {type(state).__name__}")
        self.k, self.state, self.form, self.t = k, state, form, state["t"] + 1
        self.kept = [self._kept(name, call) for name, _ in form.states]
        self.codecs = tuple(form for form, *_ in self.kept)
        self.blocks = tuple(block for _, block, *_ in self.kept)
        beside = state.get("p")
        self.weight: Form | None = named(beside["codec"]) if beside else None
        self.rest = arrays.handle(beside["rest"], call, "rest", numbers=False) if beside and "rest" in beside else None

    def _kept(self, name: str, call: str) -> tuple[Form, int, arrays.Handle, arrays.Handle | None]:
        never = dict(self.form.states)[name]
        x = self.state.get(name)
        if x is None:
            raise StateError(f"{call}: state[{self.k}] has no {name!r}; it was made for another rule or other settings")
        if isinstance(x, Quantized):
            if x.shape != self.p.shape:
                raise StateError(f"{call}: state[{self.k}][{name!r}] has shape {x.shape}, its parameter {self.p.shape}")
            codes, scales = (arrays.handle(a, call, name, numbers=False) for a in (x.codes, x.scales))
            return named(x.codec, never), x.block, codes, scales
        made = arrays.handle(x, call, f"state[{self.k}][{name!r}]")
        arrays.like(self.p, made, call, f"params[{self.k}] and its {name!r}")
        if made.number == "float16":
            raise StateError(f"{call}: state[{self.k}][{name!r}] must be float32 or bfloat16, got float16")
        return named("f32" if made.number == "float32" else "bf16"), 256, made, None

    @property
    def kind(self) -> tuple[Any, ...]:
        weight = self.weight or self.p.number
        return self.p.device, self.form, self.codecs, self.blocks, weight, self.g.number

    def on_host(self, scalars: np.ndarray, word: int) -> None:
        from refopt_cuda.kernels import step_host

        kept = []
        for *_, codes, scales in self.kept:
            kept.append({"codes": codes.words()} | ({} if scales is None else {"scales": scales.words()}))
        more: dict[str, Any] = {"weight": self.weight, "random": (word, self.k)}
        more["rest"] = None if self.rest is None else self.rest.words()
        p, g = self.p.words(), self.g.words()
        step_host.step(self.form, self.codecs, p, g, kept, self.p.shape, self.blocks, scalars, **more)

    def tensor(self) -> Any:
        from refopt_cuda.kernels.step_cuda import Tensor

        pairs = tuple((codes.address, scales.address if scales else 0) for *_, codes, scales in self.kept)
        return Tensor(self.p.address, pairs, self.p.shape, self.rest.address if self.rest else 0, self.k)


def _kinds(work: Sequence[_One]) -> dict[tuple[Any, ...], list[_One]]:
    kinds: dict[tuple[Any, ...], list[_One]] = {}
    for one in work:
        kinds.setdefault(one.kind, []).append(one)
    return kinds


def _launch(kind: tuple[Any, ...], work: list[_One], made: Mapping[int, np.ndarray], words: Mapping[int, int]) -> None:
    """Enqueue one launch for up to 3,072 tensors and eight step counts, as many as are needed for more."""
    from refopt_cuda.kernels import step_cuda

    _, form, codecs, sizes, weight, grad = kind
    near = work[0].p
    launch = _launches.setdefault(kind, None) or _launches.update(
        {kind: step_cuda.Launch(form, codecs, weight, grad, sizes)}
    )
    launch = launch or _launches[kind]
    with near.on_device():
        for k in range(0, len(work), step_cuda.SIZES[-1]):
            some = work[k : k + step_cuda.SIZES[-1]]
            tensors = tuple(one.tensor() for one in some)
            if getattr(launch, "bound", None) != tensors:
                with step_cuda.on_stream(near.stream):
                    launch.bind(tensors)
            steps = sorted({one.t for one in some})
            for r in range(0, len(steps), step_cuda.ROWS):
                rows = steps[r : r + step_cuda.ROWS]
                at = {t: i for i, t in enumerate(rows)}
                pointers = [one.g.address if one.t in at else step_cuda.SKIP for one in some]
                which = [at.get(one.t, 0) for one in some] if len(rows) > 1 else None
                launch.run(pointers, np.stack([made[t] for t in rows]), which, near.stream, [words[t] for t in rows])


def _record(rule: str, call: str) -> Rule:
    if rule not in rules.RULES:
        none = "no kernel for rule" if rule in RULES else "no rule"
        raise ValueError(f"{call}: {none} {rule!r}; there are {', '.join(rules.RULES)}")
    return RULES[rule]


def _zero(text: str, nonnegative: bool, first: float, p: arrays.Handle, call: str) -> Any:
    name, _, own = text.partition(":")
    try:
        form = named(name, nonnegative)
    except ValueError as error:
        raise ValueError(f"{call}: {error}") from None
    if not form.scaled:
        x = arrays.empty(p.shape, "bfloat16" if form.stem == "bf16" else np.dtype(np.float32), p)
        x[...] = int(np.float32(first).view(np.uint32) >> 16) if str(x.dtype) == "uint16" else first
        return x
    block = int(own) if own else RECORDS[form.stem].block or 256
    filled = RECORDS[form.stem](**form.options, block=block).encode(np.full(2, first, np.float32))
    codes = arrays.empty(_codes_shape(form, p.shape, block), form.module.dtype(**form.options), p)
    scales = arrays.empty(blocks.grid(p.shape, block), form.module.scale_dtype(**form.options), p)
    codes[...] = filled.codes.reshape(-1)[0].item()
    scales[...] = filled.scales.reshape(-1)[0].item()
    return Quantized(
        ".".join([form.stem, *map(str, _words(form))]), p.shape, "float32", block, {"codes": codes, "scales": scales}
    )


def _words(form: Form) -> list[str]:
    return [
        c if isinstance(c, str) else f"{'' if c else 'un'}{n}"
        for n, c in form.options.items()
        if isinstance(c, bool | str)
    ]


def _rest(text: str, p: arrays.Handle, call: str) -> dict[str, Any]:
    if text.partition(".")[0] not in WEIGHTS or p.number != "bfloat16":
        raise ValueError(f"{call}: codecs['p'] = {text!r} must be one of {', '.join(WEIGHTS)}, of bfloat16 weights")
    form = named(text)
    dtype = form.module.rest_dtype(**form.options)
    if dtype is None:
        return {"codec": text}
    rest = arrays.empty(p.shape, dtype, p)
    rest[...] = 0
    return {"codec": text, "rest": rest}
