"""Which optimizer fits a model on a GPU: bytes, milliseconds, a recommendation and the lines that do it.

>>> from refopt.models import named
>>> from refopt.planner import plan
>>> found = plan(named("llama-2-7b"), "24GiB", sequence=512)
>>> best = found.best
>>> print(best.setup.label, best.peak < found.run.card.usable)
full bf16_sr Lion8bit in backward True
>>> print(found.best_of("qlora").setup.label)
qlora bf16 AdamW
"""

from refopt.planner.cards import CARDS, Card, card
from refopt.planner.setups import Setup
from refopt.planner.table import Plan, Row, Run, plan

__all__ = ["CARDS", "Card", "Plan", "Row", "Run", "Setup", "card", "plan"]
