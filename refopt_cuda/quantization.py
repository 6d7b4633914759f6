"""`quantize` and `dequantize`: any codec on arrays of NumPy, CuPy or torch, without an optimizer.

The bits are those of `refopt.codecs`. Arrays on a GPU take the CUDA kernels on their library's current stream, without
synchronisation; arrays in host memory take Numba loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refopt.codecs import CODECS as RECORDS
from refopt.codecs import blocks
from refopt_cuda import arrays
from refopt_cuda.codecs import FROZEN, STATES, Form, named

__all__ = ["Quantized", "dequantize", "quantize"]

SECOND = "dynamic8"
GROUP = 256


@dataclass(frozen=True)
class Quantized:
    """An array as a codec stores it: `codes` and `scales` in the library of the array that it was made of.

    codec    its name: "dynamic8", "nf4", "double" ...
    shape    of the array, and `dtype`, the name of its format
    block    elements that share a scale
    arrays   codes, scales; for double quantization scales2 and offset as well
    """

    codec: str
    shape: tuple[int, ...]
    dtype: str
    block: int
    arrays: dict[str, Any] = field(repr=False)

    @property
    def codes(self) -> Any:
        return self.arrays["codes"]

    @property
    def scales(self) -> Any:
        return self.arrays["scales"]

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in self.arrays.values())

    def dequantize(self, dtype: str | None = None, out: Any = None) -> Any:
        """The array that this stands for."""
        return dequantize(self, dtype, out)


def quantize(x: Any, codec: str = "dynamic8", *, block: int | None = None) -> Quantized:
    """Store an array in fewer bits; float32, float16 or bfloat16 (uint16 words in NumPy and CuPy), row-major.

    codec    "int8_linear", "dynamic8", "fp8.e5m2", "q4", "compand8", each with ".unsigned" for what is never negative
             where it has such a table; "nf4", "fp4"; "double" or "double.fp4": their scales in 8 bits as well
    block    elements that share a scale; each codec's own by default (256; q4 128, nf4 and fp4 64, compand8 32)

    Blocks run along rows, as `refopt.codecs` cuts them; nf4 and fp4 cut the flattened array, as checkpoints do. NaN and
    Inf make their block NaN. Raises TypeError or ValueError that name the argument.

    >>> import numpy as np
    >>> import refopt_cuda as rc
    >>> q = rc.quantize(np.float32([0.3, -1.7, 0.001, 0, 1.2, -0.0004]), "nf4")
    >>> print([f"{b:02x}" for b in q.codes], rc.dequantize(q).round(3))
    ['90', '77', 'e7'] [ 0.274 -1.7    0.     0.     1.229  0.   ]
    """
    call = "quantize"
    form, double = _form(codec, call)
    size = _block(form, block, call)
    made = arrays.handle(x, call, "x")
    shape = _cut(form, made.shape)
    codes = arrays.empty(_codes_shape(form, shape, size), form.module.dtype(**form.options), made)
    scales = arrays.empty(blocks.grid(shape, size, _layout(form)), form.module.scale_dtype(**form.options), made)
    _store(form, made, shape, size, codes, scales)
    if not double:
        return Quantized(codec, made.shape, made.dtype, size, {"codes": codes, "scales": scales})
    kept = {"codes": codes} | _second(scales, made)
    return Quantized(codec, made.shape, made.dtype, size, kept)


def dequantize(q: Quantized, dtype: str | None = None, out: Any = None) -> Any:
    """The array that `q` stands for, rounded once to `dtype` ("float32", "float16", "bfloat16"; by default that of the
    array it was made of), or written into `out`."""
    call = "dequantize"
    if not isinstance(q, Quantized):
        raise TypeError(f"{call}: q must be what quantize returned, got {type(q).__name__}")
    form, double = _form(q.codec, call)
    codes = arrays.handle(q.codes, call, "q.codes", numbers=False)
    name = dtype or q.dtype
    if name not in arrays.NUMBERS:
        raise ValueError(f"{call}: dtype must be float32, float16 or bfloat16, got {dtype!r}")
    if out is None:
        out = arrays.empty(q.shape, "bfloat16" if arrays.NUMBERS[name] == "bfloat16" else name, codes)
    target = arrays.handle(out, call, "out")
    if target.shape != q.shape or target.device != codes.device:
        raise ValueError(
            f"{call}: out must be of shape {q.shape} on {codes.device}, got {target.shape} on {target.device}"
        )
    if not _at_once(form, q, double, codes, target):
        _load(form, q, _scales(q, codes) if double else q.scales, target)
    return out


def _form(codec: str, call: str) -> tuple[Form, bool]:
    """The codec's form, and whether its scales are coded too."""
    known = f"there are {', '.join(name for name in (*STATES, *FROZEN, 'double') if name not in ('f32', 'bf16'))}"
    if not isinstance(codec, str):
        raise TypeError(f"{call}: codec must be a name, got {codec!r}; {known}")
    stem, _, base = codec.partition(".")
    if stem == "double":
        if base not in ("", *FROZEN):
            raise ValueError(f"{call}: codec {codec!r}: double quantization is of nf4 or fp4")
        return named(base or "nf4"), True
    try:
        form = named(codec)
    except ValueError:
        raise ValueError(f"{call}: no codec {codec!r}; {known}") from None
    if not form.scaled:
        raise ValueError(f"{call}: {codec} is a number format: convert the array instead; {known}")
    return form, False


def _block(form: Form, block: int | None, call: str) -> int:
    size = RECORDS[form.stem].block if block is None else block
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or (form.module.BITS == 4 and size % 2):
        even = "even " if form.module.BITS == 4 else ""
        raise ValueError(f"{call}: block must be a whole {even}number >= 1, got {block!r}")
    return size


def _layout(form: Form) -> str | None:
    return "flat" if form.stem in FROZEN else None


def _cut(form: Form, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that decides the blocks: the flattened array's for weights that checkpoints hold."""
    return (math.prod(shape),) if form.stem in FROZEN else shape


def _codes_shape(form: Form, shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    if form.module.BITS == 8:
        return shape
    rows = blocks.layout_of(shape, _layout(form)) == "rows"
    row = shape[-1] if rows else math.prod(shape)
    count = row // block * -(-block // 2) + -(-(row % block) // 2)
    return (*shape[:-1], count) if rows else (count,)


def _store(form: Form, x: arrays.Handle, shape: tuple[int, ...], block: int, codes: Any, scales: Any) -> None:
    if x.device is None:
        from refopt_cuda.kernels import quantize_host

        bounds = blocks.bounds(shape, block, _layout(form))
        quantize_host.quantize(form, x.words(), bounds, _host(codes), _host(scales))
        return
    from refopt_cuda.kernels import quantize_cuda

    with x.on_device():
        quantize_cuda.quantize(form, x.address, x.number, shape, block, (_at(codes), _at(scales)), x.stream)


def _load(form: Form, q: Quantized, scales: Any, out: arrays.Handle) -> None:
    shape = _cut(form, q.shape)
    if out.device is None:
        from refopt_cuda.kernels import quantize_host

        bounds = blocks.bounds(shape, q.block, _layout(form))
        quantize_host.dequantize(form, _host(q.codes), _host(scales), bounds, out.words())
        return
    from refopt_cuda.kernels import quantize_cuda

    with out.on_device():
        at = _at(q.codes), _at(scales)
        quantize_cuda.dequantize(form, at, shape, q.block, out.address, out.number, out.stream)


def _at_once(form: Form, q: Quantized, double: bool, codes: arrays.Handle, out: arrays.Handle) -> bool:
    """Enqueue the one launch that decodes weights with their scales; False where there is none for such an array."""
    if out.device is None or form.stem not in FROZEN or codes.address % 4 or out.address % 16:
        return False
    from refopt_cuda.kernels import nf4

    if not nf4.fits(q.block):
        return False
    kernel = nf4.Kernel(form.stem, double, q.block, out.number)
    beside = (_at(q.arrays["scales2"]), _at(q.arrays["offset"])) if double else (0, 0)
    with out.on_device():
        nf4.decode(kernel, (codes.address, _at(q.scales), *beside), out.address, out.size, out.stream)
    return True


def _host(a: Any) -> np.ndarray:
    return arrays.handle(a, "quantize", "array", numbers=False).words()


def _at(a: Any) -> int:
    return arrays.handle(a, "quantize", "array", numbers=False).address


def _second(scales: Any, near: arrays.Handle) -> dict[str, Any]:
    """The scales less their mean, in 8 bits, and the mean."""
    offset = arrays.empty((1,), np.dtype(np.float32), near)
    if scales.shape[0] == 0:
        offset[:] = 0
    elif near.device is None:
        offset[:] = float(_mean(_host(scales)))
    else:
        from refopt_cuda.kernels import quantize_cuda

        with near.on_device():
            quantize_cuda.mean(_at(scales), scales.shape[0], _at(offset), near.stream)
    coded = quantize(scales - offset, SECOND, block=GROUP)
    return {"scales": coded.codes, "scales2": coded.scales, "offset": offset}


def _mean(a: np.ndarray) -> np.float32:
    """R / n in float64, rounded once: chunks of 65536, in each of them 256 lanes and a tree."""
    parts, n = a.astype(np.float64), a.size
    while True:
        chunks = [_tree(parts[k : k + 65536]) for k in range(0, parts.size, 65536)]
        parts = np.array(chunks)
        if parts.size == 1:
            return np.float32(parts[0] / n)


def _tree(x: np.ndarray) -> float:
    lane = np.zeros(256)
    for k in range(0, x.size, 256):
        part = x[k : k + 256]
        lane[: part.size] += part
    for w in (128, 64, 32, 16, 8, 4, 2, 1):
        lane[:w] += lane[w : 2 * w]
    return float(lane[0])


def _scales(q: Quantized, codes: arrays.Handle) -> Any:
    """The scales that double quantization coded."""
    shape = (q.arrays["scales"].shape[0],)
    second = Quantized(SECOND, shape, "float32", GROUP, {"codes": q.arrays["scales"], "scales": q.arrays["scales2"]})
    return dequantize(second) + q.arrays["offset"]
