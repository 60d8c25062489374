"""How well one EP gradient agrees with backprop, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mep.bench.plot import canvas, styled, whole_numbers
from mep.bench.record import Record
from mep.bench.regime import describe, measure
from mep.bench.table import Table, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mep.diagnostics import Diagnosis

__all__ = ["plot", "run", "table"]


def run(diagnosis: Diagnosis, subject: str, config: Mapping[str, Any], command: str) -> Record:
    """Put a diagnosis on record.

    Args:
        diagnosis: from `mep.diagnose`.
        subject: name of the arm.
        config: every setting.
        command: the command line.

    Returns:
        The record: a row per layer with ``layer, cosine, norm_ratio``; the summary has the rest.
    """
    rows = [
        {"layer": layer.name, "cosine": layer.cosine, "norm_ratio": layer.norm_ratio}
        for layer in diagnosis.layers
    ]
    summary = {"subject": subject, **measure(diagnosis), "layers": len(rows)}
    return Record(command, dict(config), rows, summary)


def table(record: Record) -> Table:
    """One line per layer."""
    summary = record.summary
    return Table(
        f"{describe(summary)} against backprop, {record.config['dataset']}, "
        f"{record.config['model']}, {summary['dtype']}",
        ["layer", "cosine", "|EP| / |backprop|"],
        [
            [row["layer"], number(row["cosine"], ".6f"), number(row["norm_ratio"], ".4f")]
            for row in record.rows
        ],
        f"Whole gradient: cosine {number(summary['cosine'], '.6f')}; "
        f"{summary['layers_with_gradient']} of {summary['layers']} layers have a gradient; "
        f"residual median {number(summary['residual'])}, 95 % {number(summary['residual_q95'])}, "
        f"aggregate {number(summary['residual_aggregate'])} after {summary['sweeps']} steps; "
        f"output moved by {number(summary['displacement'], '.2g')} of its norm.",
    )


@styled()
def plot(record: Record) -> Figure:
    """Cosine and ratio of norms, layer by layer from the input."""
    figure, axes = canvas(2, table(record).title)
    depth = range(1, len(record.rows) + 1)
    panels = [("cosine", "cosine to backprop"), ("norm_ratio", "|EP| / |backprop|")]
    for index, (ax, (key, label)) in enumerate(zip(axes, panels, strict=True)):
        values = [float("nan") if row[key] is None else row[key] for row in record.rows]
        ax.axhline(1, color="#888888", linestyle=":", linewidth=1)
        ax.plot(depth, values, color=f"C{index}", marker="o")
        ax.set(xlabel="layer, from the input", ylabel=label)
        ax.ticklabel_format(axis="y", useOffset=False)
        whole_numbers(ax)
    return figure
