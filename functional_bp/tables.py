"""Numbers and tables as text."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = Sequence[str]


def columns(rows: Sequence[Row]) -> str:
    """Rows of cells as text, each column as wide as its widest cell; a row of one cell alone is a
    heading, as wide as it is."""
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if any(row[1:])))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def fitted(head: Row, rows: Sequence[Row]) -> str:
    """A table no wider than the terminal: the first column is folded, and lines are cut."""
    width = shutil.get_terminal_size().columns
    others = sum(max(map(len, column)) + 2 for column in list(zip(head, *rows))[1:])
    folded = [line for row in rows for line in _folded(row, max(width - others, 24))]
    lines = columns([head, *folded]).splitlines()
    return "\n".join(line if len(line) <= width else f"{line[: width - 2]} …" for line in lines)


def rich_table(head: Row, rows: Sequence[Row]) -> Any:
    """The same for rich to print, which makes it fit; what is not indented is a heading."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row), style=None if row[0].startswith(" ") else "bold")
    return table


def _folded(row: Row, width: int) -> list[Row]:
    """A row, the first cell of which may take several lines."""
    first, *others = row
    if not any(others):
        return [row]
    text = first.lstrip()
    indent = " " * (len(first) - len(text))
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=f"{indent}    ")
    lines = lines or [""]
    return [[lines[0], *others], *([line, *[""] * len(others)] for line in lines[1:])]


def numbers(values: Any) -> str:
    """Numbers with three digits."""
    return " ".join(f"{float(value):.3g}" for value in np.ravel(values))
