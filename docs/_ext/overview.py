"""`{overview} NAME`: a table of `refopt.planner.overview`, and the command that prints it."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from refopt.planner import overview


class Overview(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.note_dependency(overview.__file__)
        lines = [*overview.markdown(overview.TABLES[name]()), "", f"`python -m refopt.planner.overview {name}`", ""]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source=self.env.docname), 0, node)
        return node.children


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("overview", Overview)
    return {"parallel_read_safe": True}
