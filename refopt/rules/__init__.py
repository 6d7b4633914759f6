"""Update rules: one file a rule, one record a file. `RULES` lists them by stem."""

from refopt.rules.adafactor import rule as adafactor
from refopt.rules.adam import rule as adam
from refopt.rules.adamw import rule as adamw
from refopt.rules.lion import rule as lion
from refopt.rules.rmsprop import rule as rmsprop
from refopt.rules.sgd import rule as sgd

RULES = {r.stem: r for r in (sgd, adam, adamw, lion, rmsprop, adafactor)}

__all__ = ["RULES", "adafactor", "adam", "adamw", "lion", "rmsprop", "sgd"]
