"""How libraries store a state in codes: torchao's tensors, bitsandbytes' pairs, FlashOptim's companded groups.

Nothing of theirs is imported: each is known by the attributes of what it stores.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt.conform.target import Coded

f32 = np.float32
GROUP = 32
"""Elements a scale in FlashOptim."""


def tensor(torch: Any, x: Any) -> Any:
    """The tensor under an entry of a state, None if there is none: a wrapper that holds plain data is opened."""
    if hasattr(x, "materialize") and not x.is_quantized():
        return x.data
    return x if torch.is_tensor(x) or hasattr(x, "materialize") else None


def opened(x: Any) -> Any:
    """The values under codes, as a tensor."""
    x = x.materialize() if hasattr(x, "materialize") else x.detach()
    return x.dequantize() if hasattr(x, "codes") else x


def coded(torch: Any, have: dict[str, Any], name: str, x: Any, of_ademamix: bool) -> Coded | None:
    """State `name`, stored as x beside the other entries of `have`; None if it is stored as it is."""
    if hasattr(x, "materialize"):
        return of_companded(x)
    if hasattr(x, "codes") and hasattr(x, "scale"):
        return of_subclass(torch, x)
    return of_pair(have, name, x, of_ademamix) if x.dtype == torch.uint8 else None


def of_subclass(torch: Any, x: Any) -> Coded:
    """torchao: a tensor with codes, a scale a block and, unless the codes are small floats, their values."""
    codes, scales = x.codes, np.array(x.scale.float().cpu()).reshape(-1)
    if codes.dtype == torch.float8_e4m3fn:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
        flat = np.array(codes.view(torch.uint8).cpu()).reshape(-1)
        return Coded(flat, scales, every, flat.size // scales.size)
    flat, table = np.array(codes.cpu()).reshape(-1), np.array(x.qmap.float().cpu())
    if table.size == 16:
        flat = np.stack([flat >> 4, flat & 15], axis=-1).reshape(-1)
    return Coded(flat, scales, table, flat.size // scales.size)


def of_pair(have: dict[str, Any], name: str, x: Any, of_ademamix: bool) -> Coded:
    """bitsandbytes: codes, and beside them the table and a scale a block."""
    second = name == "v" and "state2" in have
    table, scales = have["qmap2" if second else "qmap1"], have["absmax2" if second else "absmax1"]
    if of_ademamix and not second:
        scales = scales[0 if name == "m1" else 1]
    flat, scales = np.array(x.detach().cpu()).reshape(-1), np.array(scales.cpu()).reshape(-1)
    return Coded(flat, scales, np.array(table.float().cpu()), 256)


def of_companded(x: Any) -> Coded:
    """FlashOptim: int8 of 2x / (1 + |x|), or uint8 of a square root, and a float16 scale a group."""
    scales = x.scales.float().cpu().numpy().reshape(-1)
    flat = x.quantized.cpu().numpy().reshape(-1).astype(np.int16)
    y = np.arange(-128, 128) / 127.0 if x._signed else np.arange(256) / 255.0
    table = y / (2.0 - np.abs(y)) if x._softsign else y
    if x._signed:
        flat, table[0] = flat + 128, np.nan  # -128 stands for nothing
    if x._sqrt:
        table, scales = table**2, scales**2
    return Coded(flat.astype(np.uint8), scales, table.astype(f32), GROUP)


def nbytes(torch: Any, x: Any) -> int:
    """Bytes of one entry of a state, codes with their scales."""
    if hasattr(x, "materialize"):
        parts = [x.quantized, x.scales] if x.is_quantized() else [x.data]
    elif hasattr(x, "codes") and hasattr(x, "scale"):
        parts = [x.codes, x.scale]
    else:
        parts = [x] if torch.is_tensor(x) else []
    return sum(int(part.numel() * part.element_size()) for part in parts)
