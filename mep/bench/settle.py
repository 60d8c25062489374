"""How fast the two ways of settling reach the same equilibrium."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import mep
from mep.bench.plot import COLOURS, canvas, styled, whole_numbers
from mep.bench.record import Record
from mep.bench.table import Table, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot", "run", "table"]

_SHOWN = (0, 1, 2, 3, 5, 10, 30)


def run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    settlers: Mapping[str, Any],
    beta: Any,
    config: Mapping[str, Any],
    command: str,
    cost: str = "cross_entropy",
) -> Record:
    """Settle one batch by every settler and keep the course of the residual.

    Args:
        model: the network.
        x: inputs ``(B, *units)``.
        y: labels ``(B,)``.
        settlers: name -> settler, such as ``{"sweep": mep.Sweep(max_sweeps=8)}``.
        beta: nudging strength, the same for all.
        config: every setting, for the record.
        command: the command line, for the record.
        cost: of the nudge.

    Returns:
        The record: a row per settler and step with the median residual over the batch; the summary
        has, per settler, the residual reached, its tail, and the verdict.
    """
    rows, summary = [], []
    dtype = str(x.dtype).removeprefix("torch.")
    for name, settler in settlers.items():
        settled = mep.settle(model, x, y, cost=cost, beta=beta, settler=settler)
        history = [float(value) for value in settled.history]
        rows += [{"settler": name, "step": k, "residual": r} for k, r in enumerate(history)]
        summary.append(
            {
                "settler": name,
                "steps": settled.steps,
                "residual": settled.median,
                "residual_q95": settled.q95,
                "residual_aggregate": settled.aggregate,
                "status": settled.status,
            }
        )
    return Record(command, dict(config), rows, {"dtype": dtype, "settlers": summary})


def table(record: Record) -> Table:
    """One column per settler: the median residual after some numbers of steps, and the end."""
    ends = record.summary["settlers"]
    courses = [_course(record, end["settler"]) for end in ends]
    shown = [n for n in _SHOWN if n < max(map(len, courses))]
    rows = [
        [f"after {n}", *(number(course[n]) if n < len(course) else "-" for course in courses)]
        for n in shown
    ]
    rows += [
        ["steps or sweeps taken", *(str(end["steps"]) for end in ends)],
        ["at the end, median", *(number(end["residual"]) for end in ends)],
        ["at the end, 95 %", *(number(end["residual_q95"]) for end in ends)],
        ["at the end, aggregate", *(number(end["residual_aggregate"]) for end in ends)],
        ["verdict", *(end["status"] for end in ends)],
    ]
    return Table(
        f"residual, {record.config['label']}, {record.summary['dtype']}",
        ["median residual", *(end["settler"] for end in ends)],
        rows,
        "One step of gradient settling and one sweep cost about the same: one pass up the chain "
        "and one down.",
    )


def _course(record: Record, settler: str) -> list[float]:
    return [row["residual"] for row in record.rows if row["settler"] == settler]


@styled()
def plot(record: Record) -> Figure:
    """Median residual against steps, on a logarithmic scale."""
    figure, (ax,) = canvas(1, table(record).title)
    for k, entry in enumerate(record.summary["settlers"]):
        course = _course(record, entry["settler"])
        style = "-" if k < len(COLOURS) else "--"  # by then colours come again
        ax.plot(range(len(course)), course, style, marker="o", label=entry["settler"])
    ax.axhline(1e-2, color="#888888", linestyle=":", linewidth=1)
    ax.annotate(
        "settled below", (1, 1e-2), xycoords=("axes fraction", "data"),
        xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8, color="#666666",
    )  # fmt: skip
    ax.set(yscale="log", xlabel="steps or sweeps", ylabel="median of ||dF/ds|| / ||beta dC/ds||")
    whole_numbers(ax)
    ax.legend(loc="best")
    return figure
