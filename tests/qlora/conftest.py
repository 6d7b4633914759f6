"""The laws below run on the package itself; `tests/mutants` runs them on wrong ones."""

from tests.subject import ref

__all__ = ["ref"]
