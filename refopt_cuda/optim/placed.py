"""Names with a place: bitsandbytes' `Paged` and our others, DeepSpeed's `CPU`.

They differ from the class without the prefix in one default, `place="paged"` or `place="host"`.
"""

from __future__ import annotations

from typing import Any

from refopt_cuda.optim import names

__all__ = [
    "CPUAdagrad",
    "CPUAdamW",
    "CPULion",
    "PagedAdEMAMix",
    "PagedAdEMAMix4bit",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdEMAMixFp8",
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
    "PagedAdamW",
    "PagedAdamW4bit",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedAdamWFp8",
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
        base = getattr(names, stem + suffix)
        doc = f"`{base.__name__}` whose states are in host memory and pass through a ring of pages in every step."
        made.append(
            type(f"Paged{base.__name__}", (base,), {"usual_place": "paged", "__doc__": doc, "__module__": __name__})
        )
    return tuple(made)


PagedSGD, PagedSGD8bit, PagedSGD4bit, PagedSGDFp8, PagedSGD32bit = _paged("SGD")
PagedAdam, PagedAdam8bit, PagedAdam4bit, PagedAdamFp8, PagedAdam32bit = _paged("Adam")
PagedAdamW, PagedAdamW8bit, PagedAdamW4bit, PagedAdamWFp8, PagedAdamW32bit = _paged("AdamW")
PagedLion, PagedLion8bit, PagedLion4bit, PagedLionFp8, PagedLion32bit = _paged("Lion")
PagedSignum, PagedSignum8bit, PagedSignum4bit, PagedSignumFp8, PagedSignum32bit = _paged("Signum")
PagedRMSprop, PagedRMSprop8bit, PagedRMSprop4bit, PagedRMSpropFp8, PagedRMSprop32bit = _paged("RMSprop")
PagedAdagrad, PagedAdagrad8bit, PagedAdagrad4bit, PagedAdagradFp8, PagedAdagrad32bit = _paged("Adagrad")
PagedAdEMAMix, PagedAdEMAMix8bit, PagedAdEMAMix4bit, PagedAdEMAMixFp8, PagedAdEMAMix32bit = _paged("AdEMAMix")


def _on_host(base: Any) -> Any:
    doc = (
        f"`{base.__name__}` whose states are in host memory, where the host's threads make the step: gradients and "
        'weights come down, weights go up. codecs={"p": "bf16_rem16"} keeps float32 weights there for bfloat16 ones.'
    )
    return type(f"CPU{base.__name__}", (base,), {"usual_place": "host", "__doc__": doc, "__module__": __name__})


CPUAdamW, CPULion, CPUAdagrad = map(_on_host, (names.AdamW, names.Lion, names.Adagrad))
