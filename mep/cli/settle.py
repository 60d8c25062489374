"""``mep settle``: the course of the residual, for both ways of settling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import mep
from mep.bench import settle as benchmark
from mep.cli import choices, options
from mep.cli.names import SYMMETRIC
from mep.settling import ORDERS

__all__ = ["settle"]


def settle(
    context: typer.Context,
    dataset: options.DatasetName = "digits",
    model: options.Model = "deep-mlp",
    depth: options.Depth = None,
    readout: options.Readout = None,
    coupling: options.Coupling = None,
    sweeps: Annotated[int, typer.Option(min=1, help="Sweeps or rounds to take.")] = 8,
    settle_steps: Annotated[int, typer.Option(min=1, help="Gradient steps to take.")] = 60,
    beta: options.Beta = None,
    c: options.C = None,
    batch: options.Batch = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial weights.")] = 0,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/settle"),
    device: options.Device = "cpu",
) -> None:
    """Settle one test batch by sweeps and by gradient descent, and plot the residuals."""
    with choices.usage():
        choices.prepare(out, device)
        data = choices.load(dataset, data_dir, batch)
        make_model, sizes = choices.network(model, data, depth, readout, coupling)
        strength, nudge = choices.nudging(beta, c)
        torch.manual_seed(seed)
        net = make_model().to(device).eval()
        settlers = {"descent": mep.GradientDescent(max_steps=settle_steps)}
        if model in SYMMETRIC:
            rounds = {order: mep.FixedPoint(sweeps, None, order) for order in ORDERS}
            settlers = rounds | {"anderson": mep.Anderson(sweeps, None)} | settlers
        else:
            settlers = {"sweep": mep.Sweep(max_sweeps=sweeps, tol=None)} | settlers
        name = choices.described(model, sizes)
        config = {
            "dataset": dataset, **sizes, "label": f"{name}, {dataset}", "sweeps": sweeps,
            "settle_steps": settle_steps, **nudge, "batch": len(data.x_test), "seed": seed,
            "device": device,
        }  # fmt: skip
        x, y = data.x_test.to(device), data.y_test.to(device)
        command = choices.command_line(context)
        cost = choices.cost(None, model)
        record = benchmark.run(net, x, y, settlers, strength, config, command, cost)
    choices.show(benchmark, record, out, "settling.png")
