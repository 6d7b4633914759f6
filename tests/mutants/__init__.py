"""Deliberately wrong packages, and the laws that must notice. `python -m tests.mutants` lists them with their fate."""

from tests.mutants import codecs, codecs_more, element_rules, matrix_rules, memory, placing, qlora, rules, steps

MUTANTS = [
    *rules.MUTANTS,
    *matrix_rules.MUTANTS,
    *element_rules.MUTANTS,
    *codecs.MUTANTS,
    *codecs_more.MUTANTS,
    *steps.MUTANTS,
    *placing.MUTANTS,
    *memory.MUTANTS,
    *qlora.MUTANTS,
]
