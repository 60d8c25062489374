"""Tables: one content, shown by rich and written as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["Table", "number", "percent"]


@dataclass(frozen=True)
class Table:
    """A titled table of text cells.

    Args:
        title: one line.
        columns: headings, with units.
        rows: cells; each row as long as ``columns``.
        note: one plain sentence below.

    Raises:
        ValueError: for a row of the wrong length.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"A row of {len(self.columns)} cells was expected, got {row}.")

    def rich(self) -> RichTable:
        """The cells for a terminal; numbers (all columns but the first) flush right."""
        from rich.table import Table as RichTable

        table = RichTable()
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def text(self) -> str:
        """The table as Markdown, padded so that it reads as plain text too.

        Example:
            >>> print(Table("t", ["arm", "ms"], [["EP", "1.5"]]).text())
            t
            <BLANKLINE>
            | arm |  ms |
            |:----|----:|
            | EP  | 1.5 |
            <BLANKLINE>
        """
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
        lines = [_line(self.columns, widths), "|" + "|".join(rule) + "|"]
        lines += [_line(row, widths) for row in self.rows]
        return "\n".join([self.title, "", *lines, "", *([self.note, ""] if self.note else [])])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "| " + " | ".join(padded) + " |"


def percent(mean: float, spread: float | None = None) -> str:
    """A share as per cent, with its spread where there is one.

    Example:
        >>> percent(0.978, 0.0021)
        '97.80 ± 0.21 %'
    """
    between = f" ± {100 * spread:.2f}" if spread is not None else ""
    return f"{100 * mean:.2f}{between} %"


def number(value: float | None, form: str = ".1e") -> str:
    """A number, or a dash where there is none.

    Example:
        >>> number(0.0042), number(None)
        ('4.2e-03', '-')
    """
    return "-" if value is None else format(value, form)
