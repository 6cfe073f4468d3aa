"""Tables in Markdown, aligned so that they can be read in a terminal too."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from lcogeom.diagnosis.page.text import figure as plain_figure


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; columns that begin with a number stand to the right."""
    cells = [[_cell(text) for text in row] for row in [head, *rows]]
    wide = [max(3, *(_width(row[place]) for row in cells)) for place in range(len(head))]
    right = [place > 0 and all(_is_number(row[place]) for row in cells[1:]) for place in range(len(head))]
    lines = []
    for row in cells:
        padded = [
            " " * (size - _width(text)) + text if end else text + " " * (size - _width(text))
            for text, size, end in zip(row, wide, right, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * (size - 1) + ":" if end else "-" * size for size, end in zip(wide, right, strict=True)]
    return [lines[0], f"| {' | '.join(rule)} |", *lines[1:]]


def figure(value: object, *, signed: bool = False) -> str:
    """A number to four digits; `signed` puts a + before what is above 0."""
    plus = signed and isinstance(value, (int, float)) and value > 0
    return ("+" if plus else "") + plain_figure(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _is_number(text: str) -> bool:
    return not text or text[0] in "0123456789−+–∞"


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
