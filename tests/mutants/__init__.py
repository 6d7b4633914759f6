"""Deliberately wrong packages, and the laws that must notice. `python -m tests.mutants` lists them with their fate."""

from tests.mutants import codecs, placing, rules, steps

MUTANTS = [*rules.MUTANTS, *codecs.MUTANTS, *steps.MUTANTS, *placing.MUTANTS]
