"""Update rules: one file a rule, one record a file. `RULES` lists them by stem."""

from refopt.rules.adafactor import rule as adafactor
from refopt.rules.adagrad import rule as adagrad
from refopt.rules.adam import rule as adam
from refopt.rules.adam_mini import rule as adam_mini
from refopt.rules.adamw import rule as adamw
from refopt.rules.ademamix import rule as ademamix
from refopt.rules.apollo import rule as apollo
from refopt.rules.came import rule as came
from refopt.rules.galore import rule as galore
from refopt.rules.lamb import rule as lamb
from refopt.rules.lars import rule as lars
from refopt.rules.lion import rule as lion
from refopt.rules.muon import rule as muon
from refopt.rules.rmsprop import rule as rmsprop
from refopt.rules.schedule_free import rule as schedule_free
from refopt.rules.sgd import rule as sgd
from refopt.rules.signum import rule as signum
from refopt.rules.sm3 import rule as sm3

RULES = {
    r.stem: r
    for r in (
        sgd,
        adam,
        adamw,
        lion,
        rmsprop,
        adafactor,
        adagrad,
        sm3,
        signum,
        came,
        ademamix,
        adam_mini,
        muon,
        lars,
        lamb,
        schedule_free,
        galore,
        apollo,
    )
}

__all__ = [
    "RULES",
    "adafactor",
    "adagrad",
    "adam",
    "adam_mini",
    "adamw",
    "ademamix",
    "apollo",
    "came",
    "galore",
    "lamb",
    "lars",
    "lion",
    "muon",
    "rmsprop",
    "schedule_free",
    "sgd",
    "signum",
    "sm3",
]
