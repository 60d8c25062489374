"""Memory and time of a recurrent equilibrium net against its hidden size, by EP and by backprop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track as progress
from torch import Tensor

import mep
from mep.bench.plot import canvas, styled
from mep.bench.record import Record
from mep.bench.table import Table, number
from mep.bench.timing import interleave, spread
from mep.data import Dataset
from mep.memory import label, show, track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LoopedConfig", "plot", "run", "table"]

TIME, RECURRENT = "backprop through time", "recurrent backprop"
HEBBIAN, DIFFERENCE = "EP, Hebbian", "EP, energy difference"
ARMS = (TIME, RECURRENT, HEBBIAN, DIFFERENCE)
_MOMENTUM = 0.9
_MB = 2**20


@dataclass(frozen=True)
class LoopedConfig:
    """What is measured.

    Args:
        hidden: numbers of recurrent units, each >= 1.
        batch: samples per step, >= 1.
        beta: nudging strength, > 0.
        rounds: timed rounds, >= 1.
        seed: of weights and batch.

    Raises:
        ValueError: for a value out of range.
    """

    hidden: tuple[int, ...] = (64, 128, 256, 512, 1024)
    batch: int = 32
    beta: float = 0.2
    rounds: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"`hidden` must be one or more numbers >= 1, got {self.hidden}.")
        for name in ("batch", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")


def run(config: LoopedConfig, data: Dataset, command: str) -> Record:
    """Measure a step of every arm at every size, then time them in turns.

    All arms settle to the same residual and take the same rule, SGD with momentum.

    Args:
        config: what is measured.
        data: where the batch comes from.
        command: the command line, for the record.

    Returns:
        The record: a row per size and arm, and per timed round.
    """
    # Copies: a view would be weighed with all that it is a view of.
    x, y = data.x_train[: config.batch].clone(), data.y_train[: config.batch].clone()
    rows: list[dict[str, Any]] = []
    summary: list[dict[str, Any]] = []
    for hidden in progress(config.hidden, "looped", transient=True):
        steppers = {arm: _Stepper(arm, config, hidden, x, y) for arm in ARMS}
        found = {arm: stepper.measured() for arm, stepper in steppers.items()}
        arms = {arm: stepper.step for arm, stepper in steppers.items()}
        timed = interleave(arms, config.rounds, 2, baseline=TIME)
        rows += [{"hidden": hidden, **row} for row in timed]
        for arm, one in found.items():
            ratio = spread([row["ratio"] for row in timed if row["arm"] == arm])[0]
            share = one["extra"] / found[TIME]["extra"]
            entry = {"hidden": hidden, "arm": arm, **one, "share": share, "ratio": ratio}
            summary.append(entry)
    kept = {**asdict(config), "dataset": data.name}
    return Record(command, kept, rows, {"arms": summary})


class _Stepper:
    """A net, a batch and a way to take a step that leaves the weights as they are."""

    def __init__(self, arm: str, config: LoopedConfig, hidden: int, x: Tensor, y: Tensor) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            backward = "through time" if arm == TIME else "recurrent"
            settler = mep.FixedPoint(max_steps=100, tol=1e-4)
            self.model = mep.models.LoopedMLP(
                x[0].numel(), hidden, 10, settler=settler, backward=backward
            )
        options: dict[str, Any] = {"mode": "backprop"}
        if arm in (HEBBIAN, DIFFERENCE):
            method = "analytic" if arm == HEBBIAN else "autograd"
            options = {"beta": config.beta, "stencil": mep.centered, "gradient_method": method}
        self.optimizer = mep.EPOptimizer(
            self.model.parameters(), model=self.model, lr=0.0, momentum=_MOMENTUM, **options
        )
        self.step: Callable[[], None] = lambda: self.optimizer.step(x=x, target=y) and None

    def measured(self) -> dict[str, Any]:
        """Returns the peak of a step besides parameters and momentum, and how it has settled."""
        self.step()  # makes the momentum
        with track(self.model, self.optimizer) as usage:
            for state in self.optimizer.state.values():
                label(state["momentum_buffer"], "optimizer state")
            self.step()
        last = self.optimizer.last
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "extra": usage.extra, "kinds": usage.peak,
            "residual": last and last.median, "steps": last and last.sweeps,
        }  # fmt: skip


def table(record: Record) -> Table:
    """One line per size and arm."""
    config = record.config
    return Table(
        f"LoopedMLP on {config['dataset']}, batch {config['batch']}",
        ["arm", "hidden", "parameters", "extra", "x through time", "time", "residual", "steps"],
        [
            [
                entry["arm"], str(entry["hidden"]), f"{entry['parameters']:,}",
                show(entry["extra"]), f"{entry['share']:.2f}", f"{entry['ratio']:.2f}",
                number(entry["residual"]), number(entry["steps"], "d"),
            ]
            for entry in record.summary["arms"]
        ],
        "extra: peak of live tensors besides parameters and momentum. x through time: relative to "
        "that of backprop through time. time: relative to it too, median over interleaved rounds. "
        "residual, steps: the worst over the phases. MB = 2^20 bytes.",
    )  # fmt: skip


@styled()
def plot(record: Record) -> Figure:
    """Extra memory and time against hidden size."""
    figure, (memory, time) = canvas(2, table(record).title)
    for arm in ARMS:
        own = [entry for entry in record.summary["arms"] if entry["arm"] == arm]
        sizes = [entry["hidden"] for entry in own]
        memory.plot(sizes, [entry["extra"] / _MB for entry in own], marker="o", label=arm)
        time.plot(sizes, [entry["ratio"] for entry in own], marker="o", label=arm)
    for axes, quantity in ((memory, "extra memory / MB"), (time, f"time relative to {TIME}")):
        axes.set(xscale="log", xlabel="hidden units", ylabel=quantity)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    memory.set_yscale("log")
    memory.legend(loc="upper left", fontsize=8)
    time.set_ylim(bottom=0)
    return figure
