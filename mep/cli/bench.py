"""``mep bench``: the measured comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mep.bench import continual as continual_benchmark
from mep.bench import depth as depth_benchmark
from mep.bench import equilibrium as equilibrium_benchmark
from mep.bench import fisher as fisher_benchmark
from mep.bench import looped as looped_benchmark
from mep.bench import memory as memory_benchmark
from mep.bench import muon as muon_benchmark
from mep.bench import presets as presets_benchmark
from mep.bench import rules as rules_benchmark
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
    nets: Annotated[
        str, typer.Option(metavar=",".join(speed_benchmark.NETS), help="What is updated.")
    ] = "tanh",
    depths: Annotated[str, typer.Option(help="Numbers of weighted layers.")] = "3,10,100",
    widths: Annotated[str, typer.Option(help="Units per hidden layer, or channels.")] = "128",
    batches: Annotated[str, typer.Option(help="Samples per update.")] = "128",
    arms: Annotated[
        str, typer.Option(metavar=",".join(speed_benchmark.ARMS), help="By what.")
    ] = "backprop,foreach,fused,ep,limit",
    rounds: Annotated[int, typer.Option(help="Timed rounds per case.")] = 30,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 5,
    sweeps: Annotated[int, typer.Option(help="Most sweeps per nudged phase.")] = 3,
    c: Annotated[float, typer.Option("--c", help="Relative strength of the nudge.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data.")] = 0,
    out: options.Out = Path("runs/bench-speed"),
    device: options.Device = "cpu",
) -> None:
    """Time one update of EP, of the limit and of backprop in its fastest forms, interleaved."""
    with choices.usage():
        choices.prepare(out, device)
        config = speed_benchmark.SpeedConfig(
            tuple(nets.split(",")), choices.integers("--depths", depths),
            choices.integers("--widths", widths), choices.integers("--batches", batches),
            tuple(arms.split(",")), rounds, warmup, sweeps, c, device, seed,
        )  # fmt: skip
    with choices.running():
        record = speed_benchmark.run(config, choices.command_line(context))
    choices.show(speed_benchmark, record, out, "speed.png")


@app.command()
def rules(
    context: typer.Context,
    dataset: options.DatasetName = "mnist",
    depths: Annotated[str, typer.Option(help="Numbers of weighted layers.")] = "3,30",
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 1,
    seeds: Annotated[str, typer.Option(help="One complete run each.")] = "0,1,2",
    tuning_steps: Annotated[
        int, typer.Option(help="Updates per point of the learning rate's grid.")
    ] = 400,
    width: Annotated[int, typer.Option(help="Units per hidden layer.")] = 128,
    batch: options.Batch = 128,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/bench-rules"),
) -> None:
    """Train by every preset, and by torch's optimizers with backprop, at tuned learning rates."""
    with choices.usage():
        choices.prepare(out, "cpu")
        data = choices.load(dataset, data_dir, None)
        config = rules_benchmark.RulesConfig(
            depths=choices.integers("--depths", depths), epochs=epochs,
            seeds=choices.integers("--seeds", seeds), tuning_steps=tuning_steps, width=width,
            batch=batch,
        )  # fmt: skip
    with choices.running():
        record = rules_benchmark.run(config, data, out, choices.command_line(context))
    choices.show(rules_benchmark, record, out, "rules.png")


@app.command()
def depth(
    context: typer.Context,
    dataset: options.DatasetName = "mnist",
    arms: Annotated[
        str, typer.Option(metavar=",".join(depth_benchmark.ARMS), help="What is trained.")
    ] = "ep,identity",
    depths: Annotated[str, typer.Option(help="Numbers of weighted layers.")] = "100",
    seeds: Annotated[str, typer.Option(help="One complete run each.")] = "0",
    steps: Annotated[int, typer.Option(help="Updates.")] = 1400,
    width: Annotated[int, typer.Option(help="Units per hidden layer.")] = 128,
    batch: options.Batch = 128,
    lr: Annotated[float, typer.Option(help="Of first and last layer; hidden: by depth.")] = 0.1,
    warmup: Annotated[int, typer.Option(help="Steps over which the rate rises.")] = 100,
    memory: Annotated[str, typer.Option(help="Budget of an EP step, or none.")] = "16MB",
    c: Annotated[float, typer.Option("--c", help="Relative strength of the nudge.")] = 0.05,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/bench-depth"),
) -> None:
    """Train very deep plain nets by EP within a memory budget, beside backprop and controls."""
    with choices.usage():
        choices.prepare(out, "cpu")
        data = choices.load(dataset, data_dir, None)
        config = depth_benchmark.DepthConfig(
            tuple(arms.split(",")), choices.integers("--depths", depths),
            choices.integers("--seeds", seeds), steps, width, batch, lr, warmup,
            None if memory == "none" else memory, c,
        )  # fmt: skip
    with choices.running():
        record = depth_benchmark.run(config, data, out, choices.command_line(context))
    choices.show(depth_benchmark, record, out, "depth.png")


@app.command()
def continual(
    context: typer.Context,
    dataset: options.DatasetName = "mnist",
    scenario: Annotated[
        str, typer.Option(metavar="|".join(continual_benchmark.SCENARIOS), help="The tasks.")
    ] = "permuted",
    arms: Annotated[
        str, typer.Option(metavar=",".join(continual_benchmark.ARMS), help="How it is learned.")
    ] = "ep,ep-ewc,backprop-ewc",
    tasks: Annotated[int, typer.Option(help="Number of tasks.")] = 10,
    seeds: Annotated[str, typer.Option(help="One complete run each.")] = "0",
    epochs: Annotated[int, typer.Option(help="Passes over every task.")] = 3,
    width: Annotated[int, typer.Option(help="Units in each of two hidden layers.")] = 400,
    batch: options.Batch = 128,
    curvature: Annotated[int, typer.Option(help="Samples a task's curvature is taken of.")] = 2000,
    kept: Annotated[int, typer.Option(help="Samples that replay keeps of every task.")] = 200,
    search: Annotated[
        int, typer.Option(help="Held-out tasks to choose rate and strength on; 0: no choice.")
    ] = 3,
    max_samples: options.MaxSamples = None,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/bench-continual"),
) -> None:
    """Learn tasks one after another, with and without a memory of those before."""
    with choices.usage():
        choices.prepare(out, "cpu")
        data = choices.load(dataset, data_dir, max_samples)
        config = continual_benchmark.ContinualConfig(
            scenario, tuple(arms.split(",")), tasks, choices.integers("--seeds", seeds), epochs,
            width, batch, curvature, kept, search,
        )  # fmt: skip
    with choices.running():
        record = continual_benchmark.run(config, data, out, choices.command_line(context))
    choices.show(continual_benchmark, record, out, "continual.png")


@app.command()
def fisher(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(help="Timed rounds per net.")] = 30,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 3,
    batch: options.Batch = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data.")] = 0,
    out: options.Out = Path("runs/bench-fisher"),
) -> None:
    """Time the diagonal Fisher information and Kronecker factors beside one contrast."""
    with choices.usage():
        choices.prepare(out, "cpu")
        config = fisher_benchmark.FisherConfig(rounds, warmup, batch, seed)
    with choices.running():
        record = fisher_benchmark.run(config, choices.command_line(context))
    choices.show(fisher_benchmark, record, out, "fisher.png")


@app.command()
def presets(
    context: typer.Context,
    preset: Annotated[
        str, typer.Option(metavar="|".join(presets_benchmark.PRESETS), help="What trains.")
    ] = "smep",
    dataset: options.DatasetName = "mnist",
    depths: Annotated[str, typer.Option(help="Numbers of weighted layers.")] = "3,30,300,1000",
    steps: Annotated[int, typer.Option(help="Updates.")] = 300,
    width: Annotated[int, typer.Option(help="Units per hidden layer.")] = 128,
    batch: options.Batch = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data order.")] = 0,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/bench-presets"),
) -> None:
    """Train by one preset as it comes, from shallow to very deep."""
    with choices.usage():
        choices.prepare(out, "cpu")
        data = choices.load(dataset, data_dir, None)
        config = presets_benchmark.PresetsConfig(
            preset, choices.integers("--depths", depths), steps, width, batch, seed
        )
    with choices.running():
        record = presets_benchmark.run(config, data, out, choices.command_line(context))
    choices.show(presets_benchmark, record, out, "presets.png")


@app.command()
def memory(
    context: typer.Context,
    depths: Annotated[
        str, typer.Option(help="Numbers of weighted layers.")
    ] = "10,100,500,1000,2000,5000,10000",
    budgets: Annotated[str, typer.Option(help="Of the streamed arms.")] = "1MB,4MB,20MB",
    width: Annotated[int, typer.Option(help="Units per hidden layer.")] = 128,
    batch: options.Batch = 32,
    rounds: Annotated[int, typer.Option(help="Timed rounds per arm and depth; 0 for none.")] = 7,
    capped: Annotated[
        int, typer.Option(help="Depth of the run in limited memory; 0 for none.")
    ] = 5000,
    spare: Annotated[str, typer.Option(help="What that run may take besides.")] = "64MB",
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batch.")] = 0,
    out: options.Out = Path("runs/bench-memory"),
) -> None:
    """Measure what a step takes, by EP within a budget and by backprop, against depth."""
    with choices.usage():
        choices.prepare(out, "cpu")
        config = memory_benchmark.MemoryConfig(
            choices.integers("--depths", depths), tuple(budgets.split(",")), width, batch, rounds,
            capped, spare, seed,
        )  # fmt: skip
    with choices.running():
        record = memory_benchmark.run(config, out, choices.command_line(context))
    choices.show(memory_benchmark, record, out, "memory.png")


@app.command()
def looped(
    context: typer.Context,
    dataset: options.DatasetName = "digits",
    hidden: Annotated[str, typer.Option(help="Recurrent units.")] = "64,128,256,512,1024",
    batch: options.Batch = 32,
    beta: Annotated[float, typer.Option(help="Nudging strength.")] = 0.2,
    rounds: Annotated[int, typer.Option(help="Timed rounds per size.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batch.")] = 0,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/bench-looped"),
) -> None:
    """Measure what a step of a recurrent equilibrium net takes, by EP and by backprop."""
    with choices.usage():
        choices.prepare(out, "cpu")
        data = choices.load(dataset, data_dir, batch)
        config = looped_benchmark.LoopedConfig(
            choices.integers("--hidden", hidden), batch, beta, rounds, seed
        )
    with choices.running():
        record = looped_benchmark.run(config, data, choices.command_line(context))
    choices.show(looped_benchmark, record, out, "looped.png")


@app.command()
def equilibrium(
    context: typer.Context,
    dataset: options.DatasetName = "mnist",
    net: Annotated[
        str, typer.Option(metavar="|".join(equilibrium_benchmark.NETS), help="What settles.")
    ] = "mlp",
    updates: Annotated[int, typer.Option(help="Training before anything is measured.")] = 500,
    batch: options.Batch = 128,
    beta: Annotated[float, typer.Option(help="Nudging strength.")] = 0.2,
    tol: Annotated[float, typer.Option(help="Residual at which phases stop.")] = 1e-2,
    omega: Annotated[float, typer.Option(help="Over-relaxation of settling, 1 for none.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 20,
    samples: Annotated[int, typer.Option(help="Test samples for disturbed nets.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data order.")] = 0,
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/bench-equilibrium"),
) -> None:
    """Measure a net that settles beside backprop: time, memory, gradients, disturbances."""
    with choices.usage():
        choices.prepare(out, "cpu")
        data = choices.load(dataset, data_dir, None)
        config = equilibrium_benchmark.EquilibriumConfig(
            net, updates, batch, beta, tol, omega, rounds, samples, seed
        )
    with choices.running():
        record = equilibrium_benchmark.run(config, data, choices.command_line(context))
    choices.show(equilibrium_benchmark, record, out, "equilibrium.png")


@app.command()
def muon(
    context: typer.Context,
    layers: Annotated[int, typer.Option(help="Number of matrices.")] = 100,
    widths: Annotated[str, typer.Option(help="Their sizes.")] = "64,128,256",
    rounds: Annotated[int, typer.Option(help="Timed rounds per width.")] = 20,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and gradients.")] = 0,
    out: options.Out = Path("runs/bench-muon"),
) -> None:
    """Time one update of Muon beside torch's, interleaved."""
    with choices.usage():
        choices.prepare(out, "cpu")
        config = muon_benchmark.MuonConfig(
            layers, choices.integers("--widths", widths), rounds, warmup, seed
        )
    with choices.running():
        record = muon_benchmark.run(config, choices.command_line(context))
    choices.show(muon_benchmark, record, out, "muon.png")
