"""The options that several subcommands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mep.cli.names import COSTS, DEFAULTS, MODELS, SETTLERS, STENCILS

__all__ = [
    "Batch", "Beta", "C", "Cost", "Coupling", "DataDir", "DatasetName", "Depth", "Device",
    "MaxSamples", "Model", "Omega", "Out", "Readout", "SettleSteps", "Settler", "Stencil", "Sweeps",
    "Tol",
]  # fmt: skip


def _of(names) -> str:
    return "|".join(names)


DatasetName = Annotated[
    str, typer.Argument(metavar=f"[{_of(DEFAULTS)}]", help="Data set.", show_default=True)
]
Model = Annotated[str, typer.Option(metavar=_of(MODELS), help="Architecture.")]
Depth = Annotated[
    int | None, typer.Option(min=2, help="Weighted layers of deep-mlp.", show_default="10")
]
Readout = Annotated[
    bool | None,
    typer.Option("--readout", help="Read the output out of the last activity of a Hopfield model "
                 "instead of settling it with the rest (the usual cost stays mse)."),
]  # fmt: skip
Coupling = Annotated[
    float | None,
    typer.Option(help="Factor on the inner convolutions of a hopfield-cnn, for which --readout "
                 "makes good: how strong feedback is.", show_default="1"),
]  # fmt: skip
Settler = Annotated[
    str | None,
    typer.Option(metavar=_of(SETTLERS), help="How EP settles.",
                 show_default="fixed-point for models with an equilibrium, else sweep"),
]  # fmt: skip
Cost = Annotated[
    str | None,
    typer.Option(metavar=_of(COSTS), help="What the nudge pulls down.",
                 show_default="mse for Hopfield models, else cross_entropy"),
]  # fmt: skip
Sweeps = Annotated[
    int | None,
    typer.Option(min=1, help="Most sweeps or rounds per phase (sweep, anderson, fixed-point)."),
]
SettleSteps = Annotated[
    int | None, typer.Option(min=1, help="Most steps per nudged phase (descent).")
]
Tol = Annotated[float | None, typer.Option(help="Median residual at which settling stops.")]
Omega = Annotated[
    float | None,
    typer.Option(help="Share of its way that a unit goes in a round, in (0, 2) (fixed-point).",
                 show_default="1"),
]  # fmt: skip
Stencil = Annotated[
    str | None,
    typer.Option(metavar=_of(STENCILS), help="Nodes in beta.", show_default="one-sided"),
]
Beta = Annotated[
    str | None,
    typer.Option(metavar="auto|FLOAT", help="Nudging strength; auto scales it by depth.",
                 show_default="auto"),
]  # fmt: skip
C = Annotated[
    float | None,
    typer.Option("--c", help="Relative strength of the automatic nudge.", show_default="0.05"),
]
Batch = Annotated[int, typer.Option(min=1, help="Samples in the batch.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the data files, searched before a download.")
]
MaxSamples = Annotated[
    int | None, typer.Option(min=1, help="Use at most this many training and test samples.")
]
Device = Annotated[str, typer.Option(help="Device, such as cpu or cuda.")]
Out = Annotated[Path, typer.Option(help="Folder for record, table and plot.")]
