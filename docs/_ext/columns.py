"""The arguments of a docstring stand in two columns, name and text; on a page they are a definition list."""

import re
from typing import Any

ROW = re.compile(r"(\S+(?: \S+)*) {2,}(\S.*)")


def rows(paragraph: list[str]) -> list[tuple[str, str]] | None:
    """Names and texts, a text's further lines joined to it; None where the paragraph isn't in two columns."""
    first = ROW.fullmatch(paragraph[0])
    if not first or paragraph[0].startswith((">>>", "=")):
        return None
    column, found = first.start(2), []
    for line in paragraph:
        row = ROW.fullmatch(line)
        if row and row.start(2) == column:
            found.append((row[1], row[2]))
        elif not line[:column].strip():
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        else:
            return None
    return found


def rewritten(lines: list[str]) -> list[str]:
    text, paragraph = [], []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        table = rows(paragraph) if paragraph else None
        text += [part for name, said in table for part in (f"`{name}`", f"    {said}")] if table else paragraph
        text.append("")
        paragraph = []
    return text


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", lambda *of: of[-1].__setitem__(slice(None), rewritten(of[-1])))
    return {"parallel_read_safe": True}
