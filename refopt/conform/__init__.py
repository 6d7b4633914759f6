"""The differential suite, for any optimizer: what it computes, beside what the reference says, and in whose dialect.

Levels: L0 smoke, L1 the rule (teacher-forced, in ulps), L2 a free run, L3 codes, L4 places, L5 checkpoints, L6 special
values, L7 memory. What differs is compared with every documented dialect, and with mistakes that have been made before,
before it is called different.

>>> from refopt import conform
>>> report = conform.run("refopt.conform.broken:adamw_swaps_its_betas", "adamw", only=["L1"])
>>> report.ids
{'betas-swapped'}
"""

from refopt.conform.engine import run
from refopt.conform.optax_target import OptaxTarget
from refopt.conform.report import Finding, Report
from refopt.conform.target import Coded, FunctionalTarget, Target
from refopt.conform.torch_target import TorchTarget

__all__ = ["Coded", "Finding", "FunctionalTarget", "OptaxTarget", "Report", "Target", "TorchTarget", "run"]
