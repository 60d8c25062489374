"""Time per update: EP against eager backprop, against depth, interleaved in one process."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from torch.nn import functional as F

import mep
from mep.bench.plot import canvas, styled
from mep.bench.record import Record
from mep.bench.regime import LIMIT, label, measure
from mep.bench.stepping import tanh_net
from mep.bench.table import Table, number
from mep.bench.timing import Findings, interleave, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SpeedConfig", "plot", "run", "table"]

EP, BACKPROP, FUSED = "EP", "backprop", "backprop, fused SGD"
ARMS = (BACKPROP, FUSED, EP, LIMIT)

# At rate 0 an update does all its arithmetic, and every round times the same network.
_LR, _MOMENTUM = 0.0, 0.9


def _relu_net(depth: int, width: int) -> nn.Module:
    model = mep.models.deep_mlp(depth, width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-4 * torch.randn_like(parameter)
    return model


_NETS = {"tanh": tanh_net, "relu": _relu_net}


@dataclass(frozen=True)
class SpeedConfig:
    """What is timed.

    Args:
        depths: numbers of weighted layers, each >= 2.
        activation: ``"tanh"`` with an orthogonal start, or ``"relu"`` with the identity start,
            shaken a little: as after a first update, dead units sit close to their kinks, and
            settling takes a second sweep.
        width: units per hidden layer, >= 1.
        batch: samples per update, >= 1.
        rounds: timed rounds per depth, >= 1.
        warmup: rounds before them, >= 0.
        sweeps: at most this many sweeps per nudged phase, >= 1.
        c: relative nudging strength of `mep.AutoBeta`, > 0.
        device: where.
        seed: of weights and data.

    Raises:
        ValueError: for a value out of range.
    """

    depths: tuple[int, ...] = (3, 10, 100)
    activation: str = "tanh"
    width: int = 128
    batch: int = 128
    rounds: int = 30
    warmup: int = 5
    sweeps: int = 3
    c: float = 0.05
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"width": 1, "batch": 1, "rounds": 1, "warmup": 0, "sweeps": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be >= {low}, got {getattr(self, name)}.")
        if not self.depths or min(self.depths) < 2:
            raise ValueError(f"`depths` must be one or more numbers >= 2, got {self.depths}.")
        if self.activation not in _NETS:
            raise ValueError(
                f"`activation` must be one of {sorted(_NETS)}, got {self.activation!r}."
            )
        if not self.c > 0:
            raise ValueError(f"`c` must be > 0, got {self.c}.")


def run(config: SpeedConfig, command: str) -> Record:
    """Time one update of every arm at every depth.

    The arms are plain ``loss.backward()`` with `torch.optim.SGD` as it comes and with its fused
    kernel (which EP's own rule uses), EP at a finite nudge, and the limit under its own name, each
    with its own copy of one network. Data are random and the
    learning rate is 0, so that the network stays what it is.

    Args:
        config: what is timed.
        command: the command line, for the record.

    Returns:
        The record: a row per depth, round and arm; the summary has, per depth and arm, median and
        quartiles of the time and of the per-round ratio to backprop.
    """
    rows, summary = [], []
    for depth in config.depths:
        timed, regime = _one_depth(config, depth)
        rows += [{"depth": depth, **row} for row in timed]
        summary += [_summary(depth, arm, timed, regime) for arm in ARMS]
    return Record(command, asdict(config), rows, {"arms": summary})


def _one_depth(config: SpeedConfig, depth: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    device = torch.device(config.device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = _NETS[config.activation](depth, config.width).to(device)
        x = torch.randn(config.batch, 1, 28, 28).to(device)
        y = torch.randint(10, (config.batch,)).to(device)
    sweep, nudge = mep.Sweep(max_sweeps=config.sweeps), mep.AutoBeta(c=config.c)
    regime = measure(mep.diagnose(copy.deepcopy(model), x, y, settler=sweep, beta=nudge))
    arms = {
        BACKPROP: _backprop(copy.deepcopy(model), x, y, fused=False),
        FUSED: _backprop(copy.deepcopy(model), x, y, fused=True),
        EP: _ep(copy.deepcopy(model), x, y, settler=sweep, beta=nudge),
        LIMIT: _ep(copy.deepcopy(model), x, y, settler=mep.Limit(), beta=nudge),
    }
    rows = interleave(arms, config.rounds, config.warmup, baseline=BACKPROP, clock=_clock(device))
    return rows, regime


def _backprop(model: nn.Module, x: Tensor, y: Tensor, *, fused: bool) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR, momentum=_MOMENTUM, fused=fused or None)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _ep(model: nn.Module, x: Tensor, y: Tensor, settler: Any, beta: Any) -> Callable[[], Findings]:
    optimizer = mep.EPOptimizer(
        model.parameters(), model=model, settler=settler, beta=beta, lr=_LR, momentum=_MOMENTUM
    )

    def findings() -> Mapping[str, Any]:
        last = optimizer.last
        assert last is not None  # an EP step has just been taken
        return {"residual": last.median, "sweeps": last.sweeps, "status": last.status}

    def step() -> Findings:
        optimizer.step(x=x, target=y)
        return findings

    return step


def _clock(device: torch.device) -> Callable[[], float]:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _summary(
    depth: int, arm: str, rows: Sequence[Mapping[str, Any]], regime: Mapping[str, Any]
) -> dict[str, Any]:
    own = [row for row in rows if row["arm"] == arm]
    summary: dict[str, Any] = {"depth": depth, "arm": arm}
    for key in ("ms", "ratio"):
        middle, low, high = spread([row[key] for row in own])
        summary |= {key: middle, f"{key}_quartiles": [low, high], f"{key}_iqr": high - low}
    if arm == EP:
        summary |= {**regime, "residual": spread([row["residual"] for row in own])[0]}
        summary["statuses"] = sorted({row["status"] for row in own})
    return summary


def table(record: Record) -> Table:
    """One line per depth and arm."""
    config = record.config
    return Table(
        f"time per update, {config['activation']}, width {config['width']}, "
        f"batch {config['batch']}, "
        f"{config['rounds']} interleaved rounds, {record.environment['threads']} threads",
        ["arm", "depth", "ms", "x backprop", "residual", "c"],
        [_line(entry) for entry in record.summary["arms"]],
        "ms: median time of one update. x backprop: median over rounds, and quartiles, of the time "
        "relative to plain loss.backward() and SGD in the same round. residual: median over the "
        "batch.",
    )


def _line(entry: Mapping[str, Any]) -> list[str]:
    low, high = entry["ratio_quartiles"]
    return [
        _label([entry]),
        str(entry["depth"]),
        f"{entry['ms']:.2f}",
        f"{entry['ratio']:.2f} [{low:.2f}, {high:.2f}]",
        number(entry.get("residual")),
        number(entry.get("c"), ".2g"),
    ]


def _label(entries: Sequence[Mapping[str, Any]]) -> str:
    return label(entries[0]["arm"], [entry["regime"] for entry in entries if "regime" in entry])


@styled()
def plot(record: Record) -> Figure:
    """Time per update and its ratio to backprop against depth, with quartiles."""
    figure, axes = canvas(2, table(record).title)
    panels = [("ms", "time per update / ms"), ("ratio", "time relative to backprop")]
    for index, arm in enumerate((EP, BACKPROP, LIMIT, FUSED)):
        entries = [entry for entry in record.summary["arms"] if entry["arm"] == arm]
        depths = [entry["depth"] for entry in entries]
        for ax, (key, _) in zip(axes, panels, strict=True):
            low, high = zip(*(entry[f"{key}_quartiles"] for entry in entries), strict=True)
            middle = [entry[key] for entry in entries]
            ax.plot(depths, middle, color=f"C{index}", marker="o", label=_label(entries))
            ax.fill_between(depths, low, high, color=f"C{index}", alpha=0.2, linewidth=0)
    for ax, (_, quantity) in zip(axes, panels, strict=True):
        ax.set(xscale="log", xlabel="weighted layers", ylabel=quantity)
        ax.set_xticks(list(record.config["depths"]), [str(d) for d in record.config["depths"]])
        ax.minorticks_off()
    axes[0].set(yscale="log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(loc="upper left")
    axes[1].set_ylim(bottom=0)
    return figure
