"""A preset out of the box, from shallow to very deep: nothing is tuned."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

import mep
from mep.bench.deep import Training, train
from mep.bench.plot import canvas, styled
from mep.bench.record import Record
from mep.bench.table import Table, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mep.data import Dataset

__all__ = ["PresetsConfig", "plot", "run", "table"]

PRESETS = ("smep", "smep_fast", "sdmep", "local_ep", "natural_ep")
_LOOK = 25  # steps between looks at accuracy


@dataclass(frozen=True)
class PresetsConfig:
    """What is trained.

    Args:
        preset: one of ``PRESETS``, as it comes.
        depths: numbers of weighted layers, each >= 2.
        steps: updates, >= 1.
        width: units per hidden layer, >= 1.
        batch: samples per update, >= 1.
        seed: of weights and data order.

    Raises:
        ValueError: for a value out of range.
    """

    preset: str = "smep"
    depths: tuple[int, ...] = (3, 30, 300, 1000)
    steps: int = 300
    width: int = 128
    batch: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {PRESETS}, got {self.preset!r}.")
        for name in ("steps", "width", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if not self.depths or min(self.depths) < 2:
            raise ValueError(f"`depths` must be one or more numbers >= 2, got {self.depths}.")


def run(config: PresetsConfig, data: Dataset, out: str | Path, command: str) -> Record:
    """Train a net of every depth by one preset, and go on where a killed run has stopped.

    Args:
        config: what is trained.
        data: the data set.
        out: folder for one checkpoint per depth.
        command: the command line, for the record.

    Returns:
        The record: a row per depth and look.
    """
    rows: list[dict[str, Any]] = []
    for depth in config.depths:
        training = _training(config, data, depth)
        looks, facts = train(training, data, Path(out) / f"checkpoint-depth{depth}.pt")
        rows += [{"depth": depth, **facts, **look} for look in looks]
    return Record(command, asdict(config), rows, {"depths": _summary(config, rows)})


def _training(config: PresetsConfig, data: Dataset, depth: int) -> Training:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        inputs = data.x_train[0].numel()
        model = mep.models.deep_mlp(depth, config.width, inputs, data.classes)
    identity = {key: value for key, value in asdict(config).items() if key != "depths"}
    return Training(
        f"depth {depth}", {**identity, "depth": depth}, model,
        getattr(mep.presets, config.preset)(model.parameters(), model=model),
        config.steps, config.batch, config.seed, _LOOK,
    )  # fmt: skip


def _summary(config: PresetsConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for depth in config.depths:
        own = [row for row in rows if row["depth"] == depth]
        found.append(
            {
                "depth": depth, "accuracy": own[-1]["accuracy"],
                "first_move": own[0]["first_move"],
                "residual": mean(row["residual"] for row in own),
                "settled": mean(row["settled"] for row in own[1:] or own),
                "c": own[-1]["c"],
                "ms": median(row["ms"] for row in own if row["ms"] is not None),
                "skipped": own[-1]["skipped"],
            }
        )  # fmt: skip
    return found


def table(record: Record) -> Table:
    """One line per depth."""
    rows = [
        [
            str(entry["depth"]), percent(entry["accuracy"]), number(entry["first_move"], ".2f"),
            number(entry["residual"]), percent(entry["settled"]), number(entry["c"], ".2g"),
            f"{entry['ms']:.0f}", str(entry["skipped"]),
        ]
        for entry in record.summary["depths"]
    ]  # fmt: skip
    config = record.config
    return Table(
        f"{config['preset']} as it comes, {config['steps']} steps of {config['batch']}, "
        f"width {config['width']}",
        ["layers", "test accuracy", "first move", "residual", "settled", "c", "ms", "skipped"],
        rows,
        "first move: relative change of the outputs by the first update. residual: mean over steps "
        "of the batch median. settled: share of updates whose median residual met the tolerance.",
    )


@styled()
def plot(record: Record) -> Figure:
    """Test accuracy against steps, one line per depth."""
    figure, (ax,) = canvas(1, table(record).title)
    for depth in record.config["depths"]:
        own = [row for row in record.rows if row["depth"] == depth]
        steps, reached = [row["step"] for row in own], [100 * row["accuracy"] for row in own]
        ax.plot(steps, reached, marker="o", label=f"{depth} layers")
    ax.axhline(90, color="#888888", linestyle=":", linewidth=1)
    ax.set(xlabel="steps", ylabel="test accuracy / %", ylim=(0, 100))
    ax.legend(loc="lower right")
    return figure
