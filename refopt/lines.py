"""A rule's `update` as a generator: its own lines, stopping after every assignment.

The function is read from its file and rewritten, with file name and line numbers kept, so no equation exists twice
and a debugger steps through the rule itself. Whoever runs the generator sees each value, and may send others back.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Generator
from functools import cache
from typing import Any

Stops = Generator[tuple[tuple[str, ...], tuple[Any, ...]], tuple[Any, ...] | None, Any]
"""Yields (names, (line number, *values)); what is sent back, if anything, takes the values' place."""


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
