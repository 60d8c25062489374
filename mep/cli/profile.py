"""``mep profile``: where the time of a step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import mep
from mep.bench import profiling as benchmark
from mep.cli import choices, options

__all__ = ["profile"]


def profile(
    context: typer.Context,
    dataset: options.DatasetName = "digits",
    model: options.Model = "deep-mlp",
    depth: options.Depth = None,
    readout: options.Readout = None,
    coupling: options.Coupling = None,
    steps: Annotated[int, typer.Option(min=1, help="Profiled steps.")] = 20,
    mode: Annotated[str, typer.Option(metavar="ep|backprop", help="What takes the steps.")] = "ep",
    batch: options.Batch = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial weights.")] = 0,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/profile"),
    device: options.Device = "cpu",
) -> None:
    """Profile steps on one batch: settling, contrast and update, and the operations of each."""
    with choices.usage():
        choices.prepare(out, device)
        choices.pick("--mode", mode, ("ep", "backprop"))
        data = choices.load(dataset, data_dir, batch)
        make_model, sizes = choices.network(model, data, depth, readout, coupling)
        torch.manual_seed(seed)
        net = make_model().to(device)
        cost = choices.cost(None, model)
        optimizer = mep.EPOptimizer(
            net.parameters(), model=net, mode=mode, cost=cost, lr=0.0, momentum=0.9
        )
        x, y = data.x_train[:batch].to(device), data.y_train[:batch].to(device)
        name = choices.described(model, sizes)
        config = {
            "dataset": dataset, **sizes, "label": f"{mode}, {name}, {dataset}",
            "steps": steps, "mode": mode, "batch": len(x), "seed": seed, "device": device,
        }  # fmt: skip
    with choices.running():
        record = benchmark.run(
            lambda: optimizer.step(x=x, target=y), steps, config, choices.command_line(context)
        )
    choices.show(benchmark, record, out, "profile.png")
