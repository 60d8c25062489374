"""From a record to the three files every benchmark leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mep.bench.plot import save
from mep.bench.record import Record
from mep.bench.table import Table
from mep.training import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["publish"]


def publish(out: str | Path, record: Record, table: Table, figure: Figure, name: str) -> None:
    """Write ``record.json``, ``table.txt`` and the figure into a folder.

    Args:
        out: the folder, created if it is not there.
        record: the run.
        table: its table.
        figure: its plot.
        name: file name of the figure, ending in ``.png``.
    """
    out = Path(out)
    record.write(out)
    atomic_write(out / "table.txt", lambda file: file.write(table.text().encode()))
    save(figure, out / name)
