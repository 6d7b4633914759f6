"""Codecs: one file a codec, one record a file. `CODECS` lists them by stem."""

from refopt.codecs.bf16 import codec as bf16
from refopt.codecs.bf16_ecc import codec as bf16_ecc
from refopt.codecs.bf16_kahan import codec as bf16_kahan
from refopt.codecs.bf16_rem16 import codec as bf16_rem16
from refopt.codecs.bf16_sr import codec as bf16_sr
from refopt.codecs.compand8 import codec as compand8
from refopt.codecs.double import codec as double
from refopt.codecs.dynamic8 import codec as dynamic8
from refopt.codecs.f32 import codec as f32
from refopt.codecs.fp4 import codec as fp4
from refopt.codecs.fp8 import codec as fp8
from refopt.codecs.fp8_expand import codec as fp8_expand
from refopt.codecs.int8_linear import codec as int8_linear
from refopt.codecs.nf4 import codec as nf4
from refopt.codecs.q4 import codec as q4

CODECS = {
    c.stem: c
    for c in (
        f32,
        bf16,
        int8_linear,
        dynamic8,
        bf16_sr,
        bf16_kahan,
        bf16_rem16,
        bf16_ecc,
        fp8,
        q4,
        compand8,
        nf4,
        fp4,
        double,
        fp8_expand,
    )
}

__all__ = [
    "CODECS",
    "bf16",
    "bf16_ecc",
    "bf16_kahan",
    "bf16_rem16",
    "bf16_sr",
    "compand8",
    "double",
    "dynamic8",
    "f32",
    "fp4",
    "fp8",
    "fp8_expand",
    "int8_linear",
    "nf4",
    "q4",
]
