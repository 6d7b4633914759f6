"""One combination of rule, codecs and formats against the oracle, word for word:

    python -m tests.twins.check adamw --codec m=q4 --codec v=dynamic8 --weight bf16_rem16 --grad float16 --block 128

Prints the arrays that it compared and how many words differ; exits 1 if any does. `--on` chooses what is compared:

host        the compiled loops of the CPU (default)
simulator   the readable kernel in Numba's CUDA simulator, with --shape 2x75 by default: it is slow
functors    the `.cuh` functors of rule, codecs and weights, which g++ builds for the host
numba       the readable kernel on a GPU
cuda        the raw kernel on a GPU
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refopt_cuda.rules import RULES
from tests.kernels.covering import CODECS, WEIGHT_FORMATS
from tests.kernels.gpu_step import TO_WORDS
from tests.twins.common import HYPERS, Case, Compared, arrays_of, beside, compared, log_uniform, numbers, viewed

PLACES = ("host", "simulator", "functors", "numba", "cuda")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 where every word is the oracle's."""
    given = parser().parse_args(argv)
    if given.on == "simulator" and os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
        again = [sys.executable, "-m", "tests.twins.check", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(again, env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}).returncode
    warnings.simplefilter("ignore")
    try:
        case = case_of(given)
        shape = given.shape or ((2, 75) if given.on == "simulator" else (5, 300))
        print(f"{case} on {given.on}, shape {shape}, {given.steps} steps")
        wrong = sum(report(one) for one in on(given.on, case, shape, given.steps, given.seed))
    except (ValueError, TypeError, ImportError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    print("equal" if not wrong else f"{wrong} words differ")
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tests.twins.check", description=__doc__.split("\n")[0])
    p.add_argument("rule", choices=RULES)
    p.add_argument("--codec", action="append", default=[], metavar="[STATE=]CODEC",
                   help=f"of one state, or of all; default f32; {', '.join(CODECS)}")  # fmt: skip
    p.add_argument("--weight", default="float32", choices=[*WEIGHT_FORMATS, "bf16_ecc"])
    p.add_argument("--grad", default="float32", choices=[*TO_WORDS])
    p.add_argument("--block", default=(128,), type=lengths, metavar="N[,N]", help="one for all states, or one a state")
    p.add_argument("--hyper", action="append", default=[], metavar="NAME=VALUE", help="such as amsgrad=True")
    p.add_argument("--on", default="host", choices=PLACES)
    p.add_argument("--shape", type=lambda text: tuple(int(n) for n in text.split("x")), metavar="NxN")
    p.add_argument("--steps", default=3, type=int)
    p.add_argument("--seed", default=0, type=int, help="of the numbers")
    return p


def lengths(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def case_of(given: argparse.Namespace) -> Case:
    """The combination that the command line names."""
    hyper = HYPERS[given.rule] | dict(_hyper(text) for text in given.hyper)
    bare = Case(given.rule, (), given.weight, given.grad, 1, hyper)
    chosen = dict.fromkeys((name for name, _ in bare.form.states), "f32")
    for text in given.codec:
        name, _, codec = text.rpartition("=")
        if name and name not in chosen:
            raise ValueError(f"{bare.form.name} keeps no {name!r}; it keeps {', '.join(chosen) or 'nothing'}")
        chosen.update({name: codec} if name else dict.fromkeys(chosen, codec))
    block = given.block[0] if len(given.block) == 1 else given.block
    return bare._replace(codecs=tuple(chosen.values()), block=block)


def _hyper(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def on(place: str, case: Case, shape: tuple[int, ...], steps: int, seed: int) -> Iterator[Compared]:
    """Every array of every step, a twin's and the oracle's."""
    rng = np.random.default_rng(seed)
    p, *gradients = (log_uniform(rng, shape) for _ in range(1 + steps))
    if place == "cuda":
        yield from on_gpu(case, p, gradients)
        return
    yield from compared(case, stepper(place), p, gradients)


def stepper(place: str) -> Callable:
    """What takes the arguments of `step_host.step`."""
    if place == "host":
        from refopt_cuda.kernels import step_host

        return step_host.step
    if place == "functors":
        from tests.twins import functors

        return functors.step
    if not hasattr(np, "row_stack"):  # Numba-CUDA names it while it is imported; NumPy 2.5 has it no more
        np.row_stack = np.vstack
    from refopt_cuda.kernels import step_numba

    return step_numba.step


def on_gpu(case: Case, p: np.ndarray, gradients: list[np.ndarray]) -> Iterator[Compared]:
    """The raw kernel, which keeps its states on the device from step to step: one that differs is not mended."""
    from tests.kernels.gpu_step import Pair

    pair = Pair(case.stem, case.codecs, case.weight, case.grad, case.hypers, case.block)
    pair.start([p])
    for t, g in enumerate(gradients, 1):
        with contextlib.suppress(AssertionError):  # what it would say is counted here
            pair.step([g])
        (state,), (stored,), (rest,) = pair.state, pair.s, pair.rest
        yield Compared(f"step {t}: p", numbers(pair.p[0].get(), case.visible), numbers(pair.words[0], case.visible))
        if rest is not None:
            yield Compared(f"step {t}: beside p", rest.get(), beside(state))
        for name, codec, (codes, scales) in zip(pair.names, case.codecs, stored, strict=True):
            have = {"codes": codes, "scales": scales}
            for key, want in arrays_of(state[name]).items():
                view = viewed(codec, key, want)
                yield Compared(f"step {t}: {name}.{key}", have[key].get().view(view), want.view(view))


def report(one: Compared) -> int:
    differ = one.differ
    print(f"  {one.what:<24} {one.want.size:>7} words  {f'{differ} differ' if differ else 'equal'}")
    return differ


if __name__ == "__main__":
    sys.exit(main())
