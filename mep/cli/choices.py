"""From words to objects, with every contradiction refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import typer
from rich.console import Console
from torch import nn

import mep
from mep.bench import Record, Table, publish
from mep.bench.regime import LIMIT
from mep.cli.names import COSTS, DEFAULTS, MODELS, SETTLERS, SQUARED, STENCILS, SYMMETRIC
from mep.data import DataError, Dataset
from mep.training import CheckpointError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Estimator", "command_line", "cost", "described", "estimator", "integers", "load", "network",
    "nudging", "pick", "prepare", "refuse", "running", "show", "usage",
]  # fmt: skip


Maker = Callable[[], nn.Module]

_BAD_INPUT = (ValueError, TypeError, ImportError, OSError, DataError, CheckpointError)


@contextmanager
def usage() -> Iterator[None]:
    """Turn an error about what was asked for into a message and exit code 2."""
    with _reported(_BAD_INPUT, 2):
        yield


@contextmanager
def running() -> Iterator[None]:
    """The same for what only the run can know; one that fails (diverges, say) has exit code 1."""
    with _reported((RuntimeError,), 1), _reported((CheckpointError, ValueError), 2):
        yield


@contextmanager
def _reported(errors: tuple[type[Exception], ...], code: int) -> Iterator[None]:
    try:
        yield
    except typer.Exit:  # itself a RuntimeError
        raise
    except errors as error:
        typer.secho(f"Error: {error}", err=True, fg="red")
        raise typer.Exit(code) from error


def pick(option: str, name: str, known: Collection[str]) -> str:
    """A word that must be one of a few."""
    if name not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}; got {name!r}.")
    return name


def integers(option: str, text: str) -> tuple[int, ...]:
    """A comma-separated list of different numbers, none of them negative."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers such as 0,1,2; got {text!r}.") from None
    if min(values) < 0 or len(set(values)) < len(values):
        raise ValueError(f"{option} must be different numbers >= 0; got {text!r}.")
    return values


def refuse(given: Mapping[str, Any], because: str) -> None:
    """Options that would have no effect are errors, not ignored."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect with {because}.")


def load(name: str, data_dir: Path | None, max_samples: int | None) -> Dataset:
    """A data set, or the first part of it."""
    data = mep.data.load(pick("DATASET", name, DEFAULTS), data_dir=data_dir)
    if max_samples is None:
        return data
    kept = slice(max_samples)
    return replace(
        data,
        x_train=data.x_train[kept],
        y_train=data.y_train[kept],
        x_test=data.x_test[kept],
        y_test=data.y_test[kept],
    )


def network(
    name: str, data: Dataset, depth: int | None, readout: bool | None, coupling: float | None
) -> tuple[Maker, dict[str, Any]]:
    """What makes a freshly initialised network for a data set, and its settings."""
    make, sizes = MODELS[pick("--model", name, MODELS)]
    if name in ("mlp", "hopfield-mlp"):
        sizes = {**sizes, "hidden": DEFAULTS[data.name].hidden}
    given = {"depth": depth, "readout": readout, "coupling": coupling}
    refuse({k: v for k, v in given.items() if k not in sizes}, f"--model {name}")
    sizes = sizes | {k: v for k, v in given.items() if v is not None}
    return partial(make, data, **sizes), {"model": name, **sizes}


def described(model: str, sizes: Mapping[str, Any]) -> str:
    """A model in words, for a plot."""
    layers = f", {sizes['depth']} layers" if "depth" in sizes else ""
    coupling = f", coupling {sizes['coupling']:g}" if sizes.get("coupling", 1) != 1 else ""
    return model + layers + coupling + (", read out" if sizes.get("readout") else "")


@dataclass(frozen=True)
class Estimator:
    """How EP takes its gradient, as arguments of the library, as settings, and by name."""

    arguments: Mapping[str, Any]
    config: Mapping[str, Any]
    label: str


def cost(name: str | None, model: str) -> str:
    """The cost that was named, or the model's own."""
    if name is None:
        return "mse" if model in SQUARED else "cross_entropy"
    return pick("--cost", name, COSTS)


def estimator(
    model: str,
    settler: str | None,
    sweeps: int | None,
    settle_steps: int | None,
    tol: float | None,
    omega: float | None,
    stencil: str | None,
    beta: str | None,
    c: float | None,
) -> Estimator:
    """The estimator that the options describe; None stands for an option not given."""
    usual = "fixed-point" if model in SYMMETRIC else "sweep"
    settler = pick("--settler", settler or usual, SETTLERS)
    limits = {"sweeps": sweeps, "settle_steps": settle_steps, "tol": tol, "omega": omega}
    solver, config = _settler(settler, limits)
    if settler == "limit":
        refuse({"stencil": stencil, "beta": beta, "c": c}, "--settler limit: beta cancels")
        return Estimator({"settler": solver}, config, LIMIT)
    stencil = pick("--stencil", stencil or "one-sided", STENCILS)
    strength, nudge = nudging(beta, c)
    arguments = {"settler": solver, "stencil": STENCILS[stencil], "beta": strength}
    return Estimator(arguments, config | {"stencil": stencil} | nudge, "EP")


def _settler(name: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    make, fields = SETTLERS[name]
    refuse({key: v for key, v in options.items() if key not in fields}, f"--settler {name}")
    given = {fields[key]: v for key, v in options.items() if v is not None}
    solver = make(**given)
    return solver, {"settler": name} | {key: getattr(solver, fields[key]) for key in fields}


def nudging(beta: str | None, c: float | None) -> tuple[Any, dict[str, Any]]:
    """The nudging strength as an argument and as settings."""
    if beta in (None, "auto"):
        automatic = mep.AutoBeta() if c is None else mep.AutoBeta(c=c)
        return automatic, {"beta": "auto", "c": automatic.c}
    refuse({"c": c}, "an explicit --beta")
    try:
        return float(beta), {"beta": float(beta)}
    except ValueError:
        raise ValueError(f"--beta must be auto or a number; got {beta!r}.") from None


def prepare(out: Path, device: str) -> None:
    """The output folder and the device exist."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from error


def command_line(context: typer.Context) -> str:
    """The command as it was given, without paths that mean something on one machine only."""
    words = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        source = context.get_parameter_source(parameter.name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if isinstance(value, Path) and value.is_absolute():
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [parameter.opts[0], str(value)]
    return " ".join(words)


class Benchmark(Protocol):
    """A module of `mep.bench`: what makes of a record a table and a plot."""

    def table(self, record: Record) -> Table:
        """The record's table."""
        ...

    def plot(self, record: Record) -> Figure:
        """The record's figure."""
        ...


def show(benchmark: Benchmark, record: Record, out: Path, figure: str) -> None:
    """Write record, table and plot into a folder, and print the table with its sentence."""
    table = benchmark.table(record)
    publish(out, record, table, benchmark.plot(record), figure)
    console = Console()
    console.print(table.title, style="bold", highlight=False)
    console.print(table.rich())
    console.print(table.note, highlight=False)
