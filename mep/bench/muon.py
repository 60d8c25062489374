"""Time per update of Muon: one batch of matrices against one matrix after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import mep
from mep.bench.plot import canvas, styled
from mep.bench.record import Record
from mep.bench.table import Table
from mep.bench.timing import interleave, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MuonConfig", "plot", "run", "table"]

BATCHED, TORCH = "mep.Muon", "torch.optim.Muon"


@dataclass(frozen=True)
class MuonConfig:
    """What is timed.

    Args:
        layers: number of matrices, >= 1.
        widths: their sizes, each >= 1.
        rounds: timed rounds per width, >= 1.
        warmup: rounds before them, >= 0.
        seed: of weights and gradients.

    Raises:
        ValueError: for a value out of range.
    """

    layers: int = 100
    widths: tuple[int, ...] = (64, 128, 256)
    rounds: int = 20
    warmup: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {"layers": 1, "rounds": 1, "warmup": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be >= {low}, got {getattr(self, name)}.")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"`widths` must be one or more numbers >= 1, got {self.widths}.")


def run(config: MuonConfig, command: str) -> Record:
    """Time one whole update, by the same coefficients, steps and dtype (bfloat16), interleaved.

    Args:
        config: what is timed.
        command: the command line, for the record.

    Returns:
        The record: a row per width, round and arm; the summary has medians and quartiles of the
        time and of the per-round ratio to `torch.optim.Muon`.
    """
    rows, summary = [], []
    for width in config.widths:
        arms = {TORCH: _torch(config, width), BATCHED: _batched(config, width)}
        timed = interleave(arms, config.rounds, config.warmup, baseline=TORCH)
        rows += [{"width": width, **row} for row in timed]
        for arm in arms:
            own = [row for row in timed if row["arm"] == arm]
            entry: dict[str, Any] = {"width": width, "arm": arm}
            for key in ("ms", "ratio"):
                middle, low, high = spread([row[key] for row in own])
                entry |= {key: middle, f"{key}_quartiles": [low, high]}
            summary.append(entry)
    return Record(command, asdict(config), rows, {"arms": summary})


def _matrices(config: MuonConfig, width: int) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(config.seed)
    found = [
        nn.Parameter(torch.randn(width, width, generator=random)) for _ in range(config.layers)
    ]
    for p in found:
        p.grad = torch.randn(width, width, generator=random)
    return found


def _torch(config: MuonConfig, width: int) -> Callable[[], None]:
    optimizer = torch.optim.Muon(_matrices(config, width), lr=1e-3, weight_decay=0.0)
    return lambda: _step(optimizer)


def _batched(config: MuonConfig, width: int) -> Callable[[], None]:
    optimizer = mep.EPOptimizer(
        _matrices(config, width), lr=1e-3, momentum=0.95, nesterov=True, update=mep.Muon()
    )
    return lambda: _step(optimizer)


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def table(record: Record) -> Table:
    """One line per width and arm."""
    rows = [
        [
            entry["arm"], str(entry["width"]), f"{entry['ms']:.1f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(entry["ratio"], *entry["ratio_quartiles"]),
        ]
        for entry in record.summary["arms"]
    ]  # fmt: skip
    config, threads = record.config, record.environment["threads"]
    return Table(
        f"one update of {config['layers']} square matrices, {config['rounds']} rounds, "
        f"{threads} threads",
        ["optimizer", "width", "ms", "x torch"],
        rows,
        "Iterations in bfloat16, rounds interleaved. ms: median. "
        "x torch: median and quartiles of the time relative to torch.optim.Muon in "
        "the same round; momentum and the change of the weights are part of both.",
    )


@styled()
def plot(record: Record) -> Figure:
    """Time per update against width."""
    figure, (ax,) = canvas(1, table(record).title)
    for arm in (BATCHED, TORCH):
        entries = [entry for entry in record.summary["arms"] if entry["arm"] == arm]
        widths, times = [e["width"] for e in entries], [e["ms"] for e in entries]
        ax.plot(widths, times, marker="o", label=arm)
    ax.set(xlabel="width of the matrices", ylabel="time per update / ms")
    ax.set_ylim(bottom=0)
    ax.set_xticks(list(record.config["widths"]))
    ax.legend(loc="upper left")
    return figure
