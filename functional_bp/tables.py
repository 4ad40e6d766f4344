"""Numbers and tables as text."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = Sequence[str]


def columns(rows: Sequence[Row]) -> str:
    """Rows of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def fitted(head: Row, rows: Sequence[Row]) -> str:
    """A table no wider than the terminal. Where rich is installed it folds the first column; else
    lines are cut."""
    width = shutil.get_terminal_size().columns
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        lines = columns([head, *rows]).splitlines()
        return "\n".join(line if len(line) <= width else f"{line[: width - 2]} …" for line in lines)
    table = Table(*head, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def numbers(values: Any) -> str:
    """Numbers with three digits."""
    return " ".join(f"{float(value):.3g}" for value in np.ravel(values))
