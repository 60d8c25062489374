"""``mep diagnose``: one EP gradient against backprop, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import mep
from mep.bench import diagnose as benchmark
from mep.bench.train import BACKPROP
from mep.cli import choices, options
from mep.training import load_checkpoint

__all__ = ["diagnose"]


def diagnose(
    context: typer.Context,
    dataset: options.DatasetName = "digits",
    model: options.Model = "mlp",
    depth: options.Depth = None,
    readout: options.Readout = None,
    coupling: options.Coupling = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint of mep train with the same model.")
    ] = None,
    settler: options.Settler = None,
    sweeps: options.Sweeps = None,
    settle_steps: options.SettleSteps = None,
    tol: options.Tol = None,
    omega: options.Omega = None,
    stencil: options.Stencil = None,
    beta: options.Beta = None,
    c: options.C = None,
    cost: options.Cost = None,
    batch: options.Batch = 512,
    autocast: Annotated[
        bool, typer.Option("--autocast", help="Settle in bfloat16, by copies of the weights.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial weights.")] = 0,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/diagnose"),
    device: options.Device = "cpu",
) -> None:
    """Compare the EP gradient of one test batch with backprop's: regime, residual, cosine."""
    with choices.usage():
        choices.prepare(out, device)
        data = choices.load(dataset, data_dir, batch)
        make_model, sizes = choices.network(model, data, depth, readout, coupling)
        cost = choices.cost(cost, model)
        way = choices.estimator(model, settler, sweeps, settle_steps, tol, omega, stencil, beta, c)
        torch.manual_seed(seed)
        net = make_model()
        if checkpoint is not None:
            _take_weights(net, sizes, checkpoint)
        net = net.to(device).eval()
        x, y = data.x_test.to(device), data.y_test.to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            diagnosis = mep.diagnose(net, x, y, cost=cost, **way.arguments)
    config = {
        "dataset": dataset, **sizes, "cost": cost, **way.config, "batch": len(x), "seed": seed,
        "trained": checkpoint is not None, "autocast": autocast, "device": device,
    }  # fmt: skip
    record = benchmark.run(diagnosis, way.label, config, choices.command_line(context))
    choices.show(benchmark, record, out, "diagnosis.png")


def _take_weights(model: nn.Module, sizes: Mapping[str, Any], path: Path) -> None:
    """The weights of a checkpoint's EP arm (its only one, if it has no other)."""
    checkpoint = load_checkpoint(path)
    trained, arms = checkpoint["identity"].get("settings", {}), checkpoint["arms"]
    for name in ("readout", "coupling"):  # which no parameter's shape tells
        if trained.get(name, sizes.get(name)) != sizes.get(name):
            raise ValueError(
                f"The checkpoint {path} holds another model: it was trained with {name} "
                f"{trained[name]}, and here it is {sizes.get(name)}"
            )
    name = next((name for name in arms if name != BACKPROP), BACKPROP)
    try:
        model.load_state_dict(arms[name]["model"])
    except RuntimeError as error:
        raise ValueError(f"The checkpoint {path} holds another model: {error}") from error
