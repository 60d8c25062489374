"""A preset out of the box, from shallow to very deep: nothing is tuned."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn

import mep
from mep.bench.plot import canvas, styled
from mep.bench.record import Record
from mep.bench.table import Table, number, percent
from mep.training import accuracy, atomic_write, batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mep.data import Dataset

__all__ = ["DepthConfig", "plot", "run", "table"]

PRESETS = ("smep", "smep_fast", "sdmep", "local_ep", "natural_ep")
_LOOK = 25  # steps between looks at accuracy, which are also checkpoints


@dataclass(frozen=True)
class DepthConfig:
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


def run(config: DepthConfig, data: Dataset, out: str | Path, command: str) -> Record:
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
        rows += _train(config, data, depth, Path(out) / f"checkpoint-depth{depth}.pt")
    return Record(command, asdict(config), rows, {"depths": _summary(config, rows)})


def _train(config: DepthConfig, data: Dataset, depth: int, path: Path) -> list[dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        inputs = data.x_train[0].numel()
        model = mep.models.deep_mlp(depth, config.width, inputs, data.classes)
    optimizer = getattr(mep.presets, config.preset)(model.parameters(), model=model)
    rows, start = _resume(config, model, optimizer, path)
    probe = data.x_test[:1000]
    seconds: list[float] = []
    statuses: list[str] = []
    residuals: list[float] = []
    steps = enumerate(batches(data, config.batch, config.seed, config.steps))
    for k, (x, y) in track(steps, f"depth {depth}", total=config.steps, transient=True):
        if k < start:
            continue
        before = _logits(model, probe) if k == 0 else None
        seconds.append(_timed(optimizer, x, y))
        statuses.append(optimizer.last.status)
        residuals.append(optimizer.last.median)
        moved = None if before is None else _moved(before, _logits(model, probe))
        if k == 0 or (k + 1) % _LOOK == 0 or k + 1 == config.steps:
            rows.append(
                {
                    "depth": depth, "step": k + 1, "first_move": moved,
                    "accuracy": accuracy(model, data.x_test, data.y_test, 2000),
                    "ms": 1e3 * median(seconds), "residual": mean(residuals),
                    "settled": statuses.count("converged") / len(statuses),
                    "c": optimizer.how.beta.c, "skipped": optimizer.skipped,
                }
            )  # fmt: skip
            seconds, statuses, residuals = [], [], []
            known = {
                "config": _identity(config), "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "rows": rows, "step": k + 1,
            }  # fmt: skip
            atomic_write(path, partial(torch.save, known))
    return rows


def _resume(
    config: DepthConfig, model: nn.Module, optimizer: mep.EPOptimizer, path: Path
) -> tuple[list[dict[str, Any]], int]:
    if not path.exists():
        return [], 0
    known = torch.load(path, weights_only=True)
    if known["config"] != _identity(config):
        raise ValueError(f"{path.name} is of another run: remove it, or choose another --out")
    model.load_state_dict(known["model"])
    optimizer.load_state_dict(known["optimizer"])
    return known["rows"], known["step"]


def _identity(config: DepthConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key != "depths"}


def _timed(optimizer: mep.EPOptimizer, x: Tensor, y: Tensor) -> float:
    started = time.perf_counter()
    optimizer.step(x=x, target=y)
    return time.perf_counter() - started


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _moved(before: Tensor, after: Tensor) -> float:
    """Relative change of the outputs: the scale of one step."""
    return float((after - before).norm() / before.norm())


def _summary(config: DepthConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for depth in config.depths:
        own = [row for row in rows if row["depth"] == depth]
        found.append(
            {
                "depth": depth, "accuracy": own[-1]["accuracy"],
                "first_move": own[0]["first_move"],
                "residual": mean(row["residual"] for row in own),
                "settled": mean(row["settled"] for row in own[1:] or own),
                "c": own[-1]["c"], "ms": median(row["ms"] for row in own),
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
