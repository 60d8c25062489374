"""The house style of every figure, in one place."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mep.training import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "canvas", "save", "styled", "whole_numbers"]

COLOURS = ("#0b6e99", "#d1495b", "#6a994e", "#8d6a9f", "#bc6c25")
"""Distinct in greyscale order too; the first is EP's, the second backprop's."""

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=COLOURS),
}


@contextmanager
def styled() -> Iterator[None]:
    """The house style, as a context or as the decorator of a function that plots."""
    with matplotlib.rc_context(_STYLE):
        yield


def whole_numbers(ax: Axes) -> None:
    """Let the horizontal axis count: no ticks between whole numbers.

    Args:
        ax: the axes.
    """
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def canvas(columns: int = 1, title: str = "") -> tuple[Figure, list[Axes]]:
    """An empty figure of one row of axes.

    Args:
        columns: number of axes, >= 1.
        title: one line above all of them.

    Returns:
        The figure and its axes. It belongs to no window and no global list of figures.
    """
    figure = Figure(figsize=(5.2 * columns, 3.8), layout="constrained")
    axes = [figure.add_subplot(1, columns, index + 1) for index in range(columns)]
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color="#444444")
    return figure, axes


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, atomically.

    Args:
        figure: from `canvas`.
        path: the file.

    Returns:
        The path.
    """
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=150)
    return atomic_write(path, lambda file: file.write(buffer.getvalue()))
