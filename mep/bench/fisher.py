"""What curvature costs: the diagonal Fisher and Kronecker factors beside one contrast."""

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
from mep.contrast import free_phase, settings
from mep.curvature import Signal, diagonal_fisher, kronecker_factors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FisherConfig", "plot", "run", "table"]

NETS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: mep.models.mlp(784, [512, 512], 10),
    "Conv2d, 3 x 3, stride 1": lambda: mep.models.deep_cnn(6, 16),
    "Conv2d, 5 x 5, stride 2": lambda: mep.models.cnn(),
}
CONTRAST, DIAGONAL, FACTORS = "contrast", "diagonal Fisher", "Kronecker factors"


@dataclass(frozen=True)
class FisherConfig:
    """What is timed.

    Args:
        rounds: timed rounds per net, >= 1.
        warmup: rounds before them, >= 0.
        batch: samples, >= 1.
        seed: of weights and data.

    Raises:
        ValueError: for a value out of range.
    """

    rounds: int = 30
    warmup: int = 3
    batch: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {"rounds": 1, "warmup": 0, "batch": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be >= {low}, got {getattr(self, name)}.")


def run(config: FisherConfig, command: str) -> Record:
    """Time curvature along one direction of the output, and the contrast on the same signals.

    Args:
        config: what is timed.
        command: the command line, for the record.

    Returns:
        The record: a row per net, round and arm; the summary has median and quartiles of the
        per-round ratio to the contrast, which forms every gradient once.
    """
    rows, summary = [], []
    for name, make in NETS.items():
        timed = interleave(_arms(config, make), config.rounds, config.warmup, baseline=CONTRAST)
        rows += [{"net": name, **row} for row in timed]
        for arm in (CONTRAST, DIAGONAL, FACTORS):
            own = [row for row in timed if row["arm"] == arm]
            middle, low, high = spread([row["ratio"] for row in own])
            summary.append({"net": name, "arm": arm, "ms": spread([row["ms"] for row in own])[0],
                            "ratio": middle, "ratio_quartiles": [low, high]})  # fmt: skip
    return Record(command, asdict(config), rows, {"arms": summary})


@torch.no_grad()
def _arms(config: FisherConfig, make: Callable[[], nn.Module]) -> dict[str, Callable[[], None]]:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = make()
        x, y = torch.randn(config.batch, 1, 28, 28), torch.randint(10, (config.batch,))
    free = free_phase(model, x, y, settings())
    errors = free.unit.errors

    def each(what: Callable[[Signal], Any]) -> Callable[[], None]:
        def arm() -> None:
            with torch.no_grad():
                for block, point, e in zip(free.chain, free.points, errors, strict=True):
                    for signal in block.signals(point, e, 1 / config.batch):
                        what(signal)

        return arm

    return {
        CONTRAST: each(lambda signal: signal.form()),
        DIAGONAL: each(lambda signal: diagonal_fisher([signal])),
        FACTORS: each(lambda signal: kronecker_factors([signal])),
    }


def table(record: Record) -> Table:
    """One line per net and arm."""
    return Table(
        f"curvature, batch {record.config['batch']}, {record.config['rounds']} interleaved rounds, "
        f"{record.environment['threads']} threads",
        ["net", "arm", "ms", "x contrast"],
        [
            [entry["net"], entry["arm"], f"{entry['ms']:.2f}", _ratio(entry)]
            for entry in record.summary["arms"]
        ],
        "ms: median time for all parameters, along one direction of the output. x contrast: median "
        "over rounds, and quartiles, of the time relative to forming every gradient once.",
    )


def _ratio(entry: dict[str, Any]) -> str:
    low, high = entry["ratio_quartiles"]
    return f"{entry['ratio']:.2f} [{low:.2f}, {high:.2f}]"


@styled()
def plot(record: Record) -> Figure:
    """Time relative to one contrast, net by net."""
    figure, (ax,) = canvas(1, table(record).title)
    nets = list(NETS)
    for k, arm in enumerate((DIAGONAL, FACTORS)):
        entries = [entry for entry in record.summary["arms"] if entry["arm"] == arm]
        places = [nets.index(entry["net"]) + 0.2 * (2 * k - 1) for entry in entries]
        middle = [entry["ratio"] for entry in entries]
        low, high = zip(*(entry["ratio_quartiles"] for entry in entries), strict=True)
        spans = [[m - a for m, a in zip(middle, low, strict=True)],
                 [b - m for m, b in zip(middle, high, strict=True)]]  # fmt: skip
        ax.bar(places, middle, 0.38, yerr=spans, label=arm)
    ax.axhline(1, color="0.4", linestyle=":", linewidth=1)
    ax.set_xticks(range(len(nets)), nets, fontsize=8)
    ax.set(ylabel="time relative to one contrast")
    ax.legend(loc="upper left")
    return figure
