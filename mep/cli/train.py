"""``mep train``: train by EP, and beside it by backprop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import mep
from mep.bench import train as contest
from mep.cli import choices, options
from mep.cli.names import DEFAULTS
from mep.training import SCHEDULES, Observer, ProgressBar, TensorBoard, TrainingConfig

__all__ = ["train"]


def train(
    context: typer.Context,
    dataset: options.DatasetName = "digits",
    model: options.Model = "mlp",
    depth: options.Depth = None,
    readout: options.Readout = None,
    coupling: options.Coupling = None,
    optimizer: Annotated[str, typer.Option(metavar="ep|backprop", help="What trains.")] = "ep",
    compare: Annotated[
        str | None,
        typer.Option(metavar="backprop", help="Train this beside it, batch by batch."),
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
    memory_budget: Annotated[
        str | None,
        typer.Option(help="What an EP step may take besides parameters and momentum, as 4MB."),
    ] = None,
    spectral: Annotated[
        float | None,
        typer.Option(help="Largest spectral norm of every weight but the first and the last."),
    ] = None,
    clip: Annotated[
        bool | None,
        typer.Option(
            "--clip",
            help="Cut off singular values beyond --spectral, instead of scaling the whole weight.",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data.", show_default="by data set")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per update.", show_default="by data set")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate.", show_default="by data set")
    ] = None,
    momentum: Annotated[
        float | None, typer.Option(help="Momentum.", show_default="by data set")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay.", show_default="by data set")
    ] = None,
    schedule: Annotated[
        str, typer.Option(metavar="|".join(SCHEDULES), help="Course of the learning rate.")
    ] = "one-cycle",
    shift: Annotated[
        int, typer.Option(min=0, help="Pixels by which training images are moved at random.")
    ] = 0,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of them.")] = False,
    seeds: Annotated[str, typer.Option(help="One run per seed, such as 0,1,2.")] = "0",
    data_dir: options.DataDir = None,
    out: options.Out = Path("runs/train"),
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from the checkpoints in --out.")
    ] = True,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log to the folder tensorboard in --out.")
    ] = False,
    max_samples: options.MaxSamples = None,
    device: options.Device = "cpu",
) -> None:
    """Train a network by Equilibrium Propagation, by backprop, or by both in lock-step."""
    with choices.usage():
        choices.prepare(out, device)
        data = choices.load(dataset, data_dir, max_samples)
        make_model, sizes = choices.network(model, data, depth, readout, coupling)
        if optimizer == "backprop":
            choices.refuse({"memory_budget": memory_budget}, "--optimizer backprop")
        if memory_budget is not None and settler is None and sweeps is None:
            sweeps = 1  # the only sweep there is within a budget
        cost = choices.cost(cost, model)
        way = _way(optimizer, model, settler, sweeps, settle_steps, tol, omega, stencil, beta, c)
        rule = _given(dataset, lr=lr, momentum=momentum, weight_decay=weight_decay)
        common: dict[str, Any] = {"cost": cost}
        if spectral is not None:
            common["constraint"] = mep.SpectralNorm(spectral, ends=False, clip=bool(clip))
        else:
            choices.refuse({"clip": clip}, "no --spectral")
        course = {**_given(dataset, epochs=epochs, batch_size=batch_size), "schedule": schedule}
        course |= {"shift": shift, "flip": flip}
        run = contest.Contest(
            data=data,
            model=make_model,
            arms=_arms(way, common, memory_budget, compare, rule, deep="depth" in sizes),
            training=TrainingConfig(**course),
            seeds=choices.integers("--seeds", seeds),
            config={
                "dataset": dataset,
                **sizes,
                "cost": cost,
                "optimizer": optimizer,
                "compare": compare,
                **(way.config if way else {}),
                **({"memory_budget": memory_budget} if memory_budget else {}),
                **({"spectral": spectral, "clip": bool(clip)} if spectral is not None else {}),
                **rule,
                "depth_scale": "depth" in sizes,  # lr / depth for the hidden layers, in both arms
                **course,
                "seeds": choices.integers("--seeds", seeds),
                "max_samples": max_samples,
                "device": device,
            },
            diagnose=partial(mep.diagnose, cost=cost, **way.arguments) if way else None,
            device=device,
        )
        for make in run.arms.values():
            make(make_model())  # what the optimizer refuses, it refuses before anything is written
        observe = _observers(out, tensorboard)
    with choices.running():
        record = contest.run(
            run, out, choices.command_line(context), resume=resume, observe=observe
        )
    choices.show(contest, record, out, "curves.png")


def _way(name: str, model: str, *estimator_options: Any) -> choices.Estimator | None:
    """How EP takes its gradient, or None for backprop, which takes none of these options."""
    if choices.pick("--optimizer", name, ("ep", "backprop")) == "ep":
        return choices.estimator(model, *estimator_options)
    names = [*inspect.signature(choices.estimator).parameters][1:]
    given = zip(names, estimator_options, strict=True)
    choices.refuse(dict(given), "--optimizer backprop")
    return None


def _given(dataset: str, **options_: Any) -> dict[str, Any]:
    """Each option as given, or the data set's default."""
    default = DEFAULTS[dataset]
    return {k: getattr(default, k) if v is None else v for k, v in options_.items()}


def _arms(
    way: choices.Estimator | None,
    common: Mapping[str, Any],
    memory_budget: str | None,
    compare: str | None,
    rule: dict[str, float],
    deep: bool,
) -> dict[str, Callable[[nn.Module], mep.EPOptimizer]]:
    arms = {}
    if way is not None:
        arguments = {**way.arguments, **common, "memory_budget": memory_budget}
        arms[way.label] = partial(_optimizer, arguments, rule, deep)
    if compare is not None:
        choices.pick("--compare", compare, (contest.BACKPROP,))
        if way is None:
            choices.refuse({"compare": compare}, "--optimizer backprop")
    if way is None or compare:
        arms[contest.BACKPROP] = partial(_optimizer, {"mode": "backprop", **common}, rule, deep)
    return arms


def _optimizer(
    arguments: Mapping[str, Any], rule: Mapping[str, float], depth_scale: bool, model: nn.Module
) -> mep.EPOptimizer:
    groups = mep.param_groups(model, rule["lr"], depth_scale=depth_scale)
    return mep.EPOptimizer(groups, model=model, **rule, **arguments)


def _observers(out: Path, tensorboard: bool) -> Callable[[int], Sequence[Observer]]:
    def observe(seed: int) -> Sequence[Observer]:
        bar = ProgressBar(f"seed {seed}")
        return [bar, TensorBoard(out / "tensorboard" / f"seed{seed}")] if tensorboard else [bar]

    if tensorboard:
        TensorBoard(out)  # a missing package is noticed now, not after the checkpoints are read
    return observe
