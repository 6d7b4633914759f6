"""Optimizers of matrices whose coded states are kept in other ways than in 8 bits."""

from __future__ import annotations

from refopt_cuda.optim import names
from refopt_cuda.optim.apollo import APOLLOAdamW
from refopt_cuda.optim.galore import GaLoreAdamW
from refopt_cuda.optim.muon import Muon

__all__ = [
    "APOLLOAdamW4bit",
    "APOLLOAdamW32bit",
    "APOLLOAdamWFp8",
    "GaLoreAdamW4bit",
    "GaLoreAdamW32bit",
    "GaLoreAdamWFp8",
    "Muon4bit",
    "Muon32bit",
    "MuonFp8",
]

_, Muon4bit, MuonFp8, Muon32bit = names.kept(Muon, __name__)
_, GaLoreAdamW4bit, GaLoreAdamWFp8, GaLoreAdamW32bit = names.kept(GaLoreAdamW, __name__)
_, APOLLOAdamW4bit, APOLLOAdamWFp8, APOLLOAdamW32bit = names.kept(APOLLOAdamW, __name__)
