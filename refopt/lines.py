"""A rule's `update` as a generator: its own lines, stopping after every assignment.

The function is read from its file and rewritten, with file name and line numbers kept, so no equation exists twice
and a debugger steps through the rule itself. Whoever runs the generator sees each value, and may send others back.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Stops = Generator[tuple[tuple[str, ...], tuple[Any, ...]], tuple[Any, ...] | None, Any]
"""Yields (names, (line number, *values)); what is sent back, if anything, takes the values' place."""


class Line(NamedTuple):
    """One traced line: the name it sets, the line of source that set it, the value, and where that line stands.

    `cuts` are the ends of the blocks of a coded state, in elements; empty for what is not coded in blocks.
    """

    name: str
    equation: str
    value: Any
    where: str = ""
    cuts: tuple[int, ...] = ()


Lines = Generator[Line, None, Any]
"""Traced lines; what the traced code returns is the generator's return value."""


def traced(function: Callable[..., Any], run: Stops) -> Lines:
    """A Line for every name that the lines of `function` set; `run` is what executes them."""
    path = inspect.getsourcefile(function) or "<rule>"
    text = Path(path).read_text("utf-8").splitlines()
    while True:
        try:
            names, (number, *values) = next(run)
        except StopIteration as stop:
            return stop.value
        equation = text[number - 1].strip()
        for name, value in zip(names, values, strict=True):
            yield Line(name, equation, value, f"{path}:{number}")


class _Yielding(ast.NodeTransformer):
    """`a, b = x` becomes `a, b = x; _sent = yield ...; if _sent: a, b = _sent`."""

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        shown = ast.Tuple([ast.Constant(node.lineno), *(ast.Name(n, ast.Load()) for n in names)], ast.Load())
        label = ast.Tuple([ast.Constant(n) for n in names], ast.Load())
        sent = ast.Name("_sent", ast.Store())
        stop = ast.Assign([sent], ast.Yield(ast.Tuple([label, shown], ast.Load())))
        back = ast.Assign(
            [ast.Tuple([ast.Name(n, ast.Store()) for n in names], ast.Store())], ast.Name("_sent", ast.Load())
        )
        take = ast.If(ast.Name("_sent", ast.Load()), [back], [])
        return [node, ast.copy_location(stop, node), ast.copy_location(take, node)]


@cache
def stepping(update: Callable[..., Any]) -> Callable[..., Stops]:
    """`update` as a generator that yields (names, (line, *values)) after every assignment and returns its result."""
    source, first = inspect.getsourcelines(update)
    tree = ast.parse("".join(source))
    ast.increment_lineno(tree, first - 1)
    ast.fix_missing_locations(_Yielding().visit(tree))
    scope: dict[str, Any] = dict(update.__globals__)
    exec(compile(tree, inspect.getsourcefile(update) or "<rule>", "exec"), scope)
    return scope[update.__name__]
