"""What the planner prints, on a page.

`{overview} NAME`    a table of `refopt.planner.overview`, and the command that prints it
`{plan} ARGUMENTS`   what `refopt plan` says to these arguments
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from refopt.planner import command, overview


class Overview(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.note_dependency(overview.__file__)
        lines = [*overview.markdown(overview.TABLES[name]()), "", f"`python -m refopt.planner.overview {name}`", ""]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source=self.env.docname), 0, node)
        return node.children


class Planned(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(command.__file__)
        with redirect_stdout(StringIO()) as out:
            command.main(self.arguments[0].split())
        text = f"$ refopt plan {self.arguments[0]}\n{out.getvalue()}"
        return [nodes.literal_block(text, text, language="none", classes=["printed"])]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("overview", Overview)
    app.add_directive("plan", Planned)
    return {"parallel_read_safe": True}
