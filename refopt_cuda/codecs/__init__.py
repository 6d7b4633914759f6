"""The codecs as scalar forms, over an arithmetic that the back end supplies.

An element codec's module holds `DTYPE` and `make(o) -> Element`; a block codec's holds `SIGNED_DTYPE`,
`UNSIGNED_DTYPE` and `make(o, unsigned) -> Block` (`refopt_cuda.codecs.forms`).
"""

from __future__ import annotations

from types import ModuleType

from refopt_cuda.codecs import bf16, dynamic8, f32, int8_linear

__all__ = ["BLOCK", "CODECS", "ELEMENT"]

ELEMENT: dict[str, ModuleType] = {"f32": f32, "bf16": bf16}
BLOCK: dict[str, ModuleType] = {"int8_linear": int8_linear, "dynamic8": dynamic8}
CODECS: dict[str, ModuleType] = {**ELEMENT, **BLOCK}
