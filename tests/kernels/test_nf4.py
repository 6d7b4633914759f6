"""The kernel that decodes 4-bit weights: the oracle's bits on the host and on a device, and that it compiles lean."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refopt import codecs
from refopt_cuda import dequantize, quantize
from refopt_cuda.kernels import build, nf4
from tests.bits import same_bits
from tests.strategies import log_uniform

EMULATOR = Path(__file__).with_name("nf4_emulator.cpp")
SIZES = [(1, 1), (1, 7), (1, 64), (3, 65), (2, 8192), (9, 8193)]
"""A lone weight, a tail, one block, tails of rows, one warp's stretch and more than one, with a tail."""
KERNELS = [nf4.Kernel("nf4", True, 64, "float32"), nf4.Kernel("fp4", False, 32, "bfloat16")]
KERNELS += [nf4.Kernel("nf4", True, 4096, "bfloat16")]


def weights(shape: tuple[int, int]) -> np.ndarray:
    """Of all magnitudes, with a block of zeros and a negative zero."""
    w = log_uniform(np.random.default_rng(shape[1]), shape, -3, 1)
    w.reshape(-1)[:: max(1, w.size // 7)] = -0.0
    if w.size > 500:
        w.reshape(-1)[64:128] = 0
    return w


def box(kernel: nf4.Kernel, w: np.ndarray) -> Any:
    if kernel.nested:
        return codecs.double.encode(w, base=kernel.stem, block=kernel.block)
    return codecs.CODECS[kernel.stem].encode(w, block=kernel.block)


def wanted(kernel: nf4.Kernel, b: Any) -> np.ndarray:
    return b.decode() if kernel.number == "float32" else codecs.bf16.encode(b.decode()).codes.reshape(b.shape)


@pytest.mark.gxx
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_kernel_on_the_host_has_the_oracles_bits(kernel: nf4.Kernel, gxx: str, tmp_path: Path) -> None:
    """With as many blocks as there are stretches, and with one that finds nothing to do."""
    (tmp_path / "defines.inc").write_text(nf4.defines(kernel))
    command = [gxx, "-O1", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", str(EMULATOR)]
    done = subprocess.run(
        [*command, f"-I{build.ROOT}", f"-I{tmp_path}", "-o", str(tmp_path / "nf4.so")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compiled = ctypes.CDLL(str(tmp_path / "nf4.so"))
    for shape, more in product(SIZES, (0, 1)):
        blocks = -(-math.prod(shape) // nf4.PER_BLOCK) + more
        b = box(kernel, weights(shape))
        out = np.full(shape, 77, np.float32 if kernel.number == "float32" else np.uint16)
        kept = [
            b.codes,
            b.scales,
            getattr(b, "scales2", None),
            getattr(b, "offset", None),
            nf4.tables(kernel.stem),
            out,
        ]
        kept = [None if a is None else np.ascontiguousarray(a) for a in kept[:-1]] + [out]
        at = [ctypes.c_void_p(None if a is None else a.ctypes.data) for a in kept]
        compiled.decode(ctypes.c_uint32(blocks), *at, ctypes.c_uint64(out.size))
        same_bits(out, wanted(kernel, b), f"{shape} in {blocks}")


@pytest.mark.gpu
@pytest.mark.parametrize("number", build.NUMBERS)
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("codec", ["nf4", "fp4", "double", "double.fp4"])
def test_the_kernel_on_a_device_has_the_oracles_bits(codec: str, block: int, number: str) -> None:
    import torch

    for shape in [*SIZES, (300, 1111)]:
        w = weights(shape)
        q = quantize(torch.from_numpy(w).cuda(), codec, block=block)
        stem, _, base = codec.partition(".")
        options = {"base": base} if base else {}
        b = codecs.CODECS[stem].encode(w, block=block, **options)
        for name, array in b.arrays.items():
            same_bits(q.arrays[name].cpu().numpy().reshape(array.shape), array, name)
        got = dequantize(q, number).cpu()
        want = torch.from_numpy(b.decode()).to(getattr(torch, number))
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (shape, codec, block, number)


def test_the_kernel_compiles_without_spills_and_fills_a_multiprocessor() -> None:
    """For every number format, scales coded or not: the blocks that it shall hold share 65,536 registers."""
    from tests.kernels.test_nvrtc import ARCHITECTURES, compile_text

    for k, (number, nested) in enumerate(product(build.NUMBERS, (True, False))):
        architecture = ARCHITECTURES[k % len(ARCHITECTURES)]
        made = compile_text(nf4.source(nf4.Kernel("nf4", nested, 64, number)), architecture)
        assert re.search(r" 0 bytes spill stores, 0 bytes spill loads", made.log), made.log
        (registers,) = map(int, re.findall(r"Used (\d+) registers", made.log))
        held = nf4.RESIDENT
        assert registers * 256 * held <= 65536, (number, nested, architecture, registers)
        assert "fma" not in made.ptx


def test_a_block_that_no_shift_finds_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two, 8 or more, got 48"):
        nf4.Kernel("nf4", True, 48, "float32")
    with pytest.raises(ValueError, match="2\\^35"):
        nf4.decode(KERNELS[0], (0, 0, 0, 0), 0, 2**35, 0)
