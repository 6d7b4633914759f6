"""Names with a place: bitsandbytes' `Paged` and our others, DeepSpeed's `CPU`.

They differ from the class without the prefix in one default, `place="paged"` or `place="host"`.
"""

from __future__ import annotations

from typing import Any

from refopt_cuda.optim import names, sm3, whole_names

__all__ = [
    "CPUAdagrad",
    "CPUAdamW",
    "CPULion",
    "PagedAdEMAMix",
    "PagedAdEMAMix4bit",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdEMAMixFp8",
    "PagedAdafactor",
    "PagedAdafactor4bit",
    "PagedAdafactor8bit",
    "PagedAdafactor32bit",
    "PagedAdafactorFp8",
    "PagedAdagrad",
    "PagedAdagrad4bit",
    "PagedAdagrad8bit",
    "PagedAdagrad32bit",
    "PagedAdagradFp8",
    "PagedAdam",
    "PagedAdam4bit",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamFp8",
    "PagedAdamMini",
    "PagedAdamMini4bit",
    "PagedAdamMini8bit",
    "PagedAdamMini32bit",
    "PagedAdamMiniFp8",
    "PagedAdamW",
    "PagedAdamW4bit",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedAdamWFp8",
    "PagedCAME",
    "PagedCAME4bit",
    "PagedCAME8bit",
    "PagedCAME32bit",
    "PagedCAMEFp8",
    "PagedLAMB",
    "PagedLAMB4bit",
    "PagedLAMB8bit",
    "PagedLAMB32bit",
    "PagedLAMBFp8",
    "PagedLARS",
    "PagedLARS4bit",
    "PagedLARS8bit",
    "PagedLARS32bit",
    "PagedLARSFp8",
    "PagedLion",
    "PagedLion4bit",
    "PagedLion8bit",
    "PagedLion32bit",
    "PagedLionFp8",
    "PagedRMSprop",
    "PagedRMSprop4bit",
    "PagedRMSprop8bit",
    "PagedRMSprop32bit",
    "PagedRMSpropFp8",
    "PagedSGD",
    "PagedSGD4bit",
    "PagedSGD8bit",
    "PagedSGD32bit",
    "PagedSGDFp8",
    "PagedSM3",
    "PagedSignum",
    "PagedSignum4bit",
    "PagedSignum8bit",
    "PagedSignum32bit",
    "PagedSignumFp8",
]


def _paged(stem: str) -> tuple[Any, ...]:
    """The classes of one rule, and of all ways in which its states are kept, with states in host memory."""
    made = []
    for suffix in ("", *names.KEPT):
        made.append(_streamed(getattr(names, stem + suffix, None) or getattr(whole_names, stem + suffix)))
    return tuple(made)


def _streamed(base: Any) -> Any:
    """The class with states in host memory."""
    doc = f"`{base.__name__}` whose states are in host memory and pass through a ring of pages in every step."
    return type(f"Paged{base.__name__}", (base,), {"usual_place": "paged", "__doc__": doc, "__module__": __name__})


PagedSGD, PagedSGD8bit, PagedSGD4bit, PagedSGDFp8, PagedSGD32bit = _paged("SGD")
PagedAdam, PagedAdam8bit, PagedAdam4bit, PagedAdamFp8, PagedAdam32bit = _paged("Adam")
PagedAdamW, PagedAdamW8bit, PagedAdamW4bit, PagedAdamWFp8, PagedAdamW32bit = _paged("AdamW")
PagedLion, PagedLion8bit, PagedLion4bit, PagedLionFp8, PagedLion32bit = _paged("Lion")
PagedSignum, PagedSignum8bit, PagedSignum4bit, PagedSignumFp8, PagedSignum32bit = _paged("Signum")
PagedRMSprop, PagedRMSprop8bit, PagedRMSprop4bit, PagedRMSpropFp8, PagedRMSprop32bit = _paged("RMSprop")
PagedAdagrad, PagedAdagrad8bit, PagedAdagrad4bit, PagedAdagradFp8, PagedAdagrad32bit = _paged("Adagrad")
PagedAdEMAMix, PagedAdEMAMix8bit, PagedAdEMAMix4bit, PagedAdEMAMixFp8, PagedAdEMAMix32bit = _paged("AdEMAMix")
PagedLAMB, PagedLAMB8bit, PagedLAMB4bit, PagedLAMBFp8, PagedLAMB32bit = _paged("LAMB")
PagedLARS, PagedLARS8bit, PagedLARS4bit, PagedLARSFp8, PagedLARS32bit = _paged("LARS")
PagedAdafactor, PagedAdafactor8bit, PagedAdafactor4bit, PagedAdafactorFp8, PagedAdafactor32bit = _paged("Adafactor")
PagedCAME, PagedCAME8bit, PagedCAME4bit, PagedCAMEFp8, PagedCAME32bit = _paged("CAME")
PagedAdamMini, PagedAdamMini8bit, PagedAdamMini4bit, PagedAdamMiniFp8, PagedAdamMini32bit = _paged("AdamMini")
PagedSM3 = _streamed(sm3.SM3)


def _on_host(base: Any) -> Any:
    doc = (
        f"`{base.__name__}` whose states are in host memory, where the host's threads make the step: gradients and "
        'weights come down, weights go up. codecs={"p": "bf16_rem16"} keeps float32 weights there for bfloat16 ones.'
    )
    return type(f"CPU{base.__name__}", (base,), {"usual_place": "host", "__doc__": doc, "__module__": __name__})


CPUAdamW, CPULion, CPUAdagrad = map(_on_host, (names.AdamW, names.Lion, names.Adagrad))
