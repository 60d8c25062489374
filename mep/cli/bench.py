"""``mep bench``: the measured comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mep.bench import speed as speed_benchmark
from mep.cli import choices, options

__all__ = ["app"]

app = typer.Typer(help="Measured comparisons.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measured comparisons."""


@app.command()
def speed(
    context: typer.Context,
    depths: Annotated[str, typer.Option(help="Numbers of weighted layers.")] = "3,10,100",
    activation: Annotated[
        str, typer.Option(metavar="tanh|relu", help="Orthogonal tanh or identity ReLU net.")
    ] = "tanh",
    width: Annotated[int, typer.Option(help="Units per hidden layer.")] = 128,
    batch: options.Batch = 128,
    rounds: Annotated[int, typer.Option(help="Timed rounds per depth.")] = 30,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 5,
    sweeps: Annotated[int, typer.Option(help="Most sweeps per nudged phase.")] = 3,
    c: Annotated[float, typer.Option("--c", help="Relative strength of the nudge.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data.")] = 0,
    out: options.Out = Path("runs/bench-speed"),
    device: options.Device = "cpu",
) -> None:
    """Time one update of EP, of the limit and of eager backprop, interleaved, against depth."""
    with choices.usage():
        choices.prepare(out, device)
        config = speed_benchmark.SpeedConfig(
            choices.integers("--depths", depths), activation, width, batch, rounds, warmup, sweeps,
            c, device, seed,
        )  # fmt: skip
    with choices.running():
        record = speed_benchmark.run(config, choices.command_line(context))
    choices.show(speed_benchmark, record, out, "speed.png")
