"""Time per update: EP beside backprop in its fastest forms, interleaved in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

import mep
from mep.bench.plot import canvas, styled
from mep.bench.record import Record
from mep.bench.regime import LIMIT, label, measure
from mep.bench.steps import ARMS, EAGER, EP, FLOOR, NETS, Case, arms_of, case_of
from mep.bench.table import Table, number
from mep.bench.timing import interleave, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARMS", "NETS", "SpeedConfig", "plot", "run", "table"]

_Row = Mapping[str, Any]

# Colours follow this order, whatever is shown.
_ORDER = (
    "ep",
    "backprop",
    "limit",
    "fused",
    "foreach",
    "compiled",
    "settle10",
    "settle30",
    "floor",
    "autograd10",
)


@dataclass(frozen=True)
class SpeedConfig:
    """What is timed: every net at every depth, width and batch size.

    Args:
        nets: some of ``NETS``: ``"tanh"`` is plain with an orthogonal start; ``"relu"`` has the
            identity start, shaken a little: as after a first update, dead units sit close to their
            kinks, and settling takes a second sweep.
        depths: numbers of weighted layers (or of a transformer's blocks), each >= 2.
        widths: units per hidden layer, or channels, each >= 1.
        batches: samples per update, each >= 1.
        arms: some of ``ARMS``, one of backprop's eager ones among them.
        rounds: timed rounds per case, >= 1.
        warmup: rounds before them, >= 0.
        sweeps: at most this many sweeps per nudged phase, >= 1.
        c: relative nudging strength of `mep.AutoBeta`, > 0.
        device: where.
        seed: of weights and data.

    Raises:
        ValueError: for a value out of range.
    """

    nets: tuple[str, ...] = ("tanh",)
    depths: tuple[int, ...] = (3, 10, 100)
    widths: tuple[int, ...] = (128,)
    batches: tuple[int, ...] = (128,)
    arms: tuple[str, ...] = ("backprop", "foreach", "fused", "ep", "limit")
    rounds: int = 30
    warmup: int = 5
    sweeps: int = 3
    c: float = 0.05
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {"rounds": 1, "warmup": 0, "sweeps": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be >= {low}, got {getattr(self, name)}.")
        for name, low in {"depths": 2, "widths": 1, "batches": 1}.items():
            values = getattr(self, name)
            if not values or min(values) < low:
                raise ValueError(f"`{name}` must be one or more numbers >= {low}, got {values}.")
        for name, known in {"nets": NETS, "arms": ARMS}.items():
            values = getattr(self, name)
            if not values or not {*values} <= {*known}:
                raise ValueError(f"`{name}` must be some of {tuple(known)}, got {values}.")
        if not {*self.arms} & {*EAGER}:
            raise ValueError(f"`arms` must have one of {EAGER} to compare with, got {self.arms}.")
        if "floor" in self.arms and not {*self.nets} <= {"tanh", "relu"}:
            raise ValueError("`arms`: the floor of bare products is that of plain nets alone.")
        if not self.c > 0:
            raise ValueError(f"`c` must be > 0, got {self.c}.")


def run(config: SpeedConfig, command: str) -> Record:
    """Time one update by every method at every case.

    Each method has its own copy of one network. Data are random and the learning rate is 0, so that
    the network stays what it is. Ratios are to the fastest eager backprop of the case: the one of
    the default, the foreach and the fused SGD with the smallest median, in the same round.

    Args:
        config: what is timed.
        command: the command line, for the record.

    Returns:
        The record: a row per case, round and arm; the summary has, per case and arm, median and
        quartiles of the time and of the per-round ratio.
    """
    rows, summary = [], []
    for case in _cases(config):
        timed, regime = _one_case(config, case)
        rows += [{**case.name, **row} for row in timed]
        summary += [{**case.name, **_summary(ARMS[key], timed, regime)} for key in config.arms]
    return Record(command, asdict(config), rows, {"arms": summary})


def _cases(config: SpeedConfig) -> Iterator[Case]:
    device = torch.device(config.device)
    for net, depth, width, batch in product(
        config.nets, config.depths, config.widths, config.batches
    ):
        yield case_of(net, depth, width, batch, config.seed, device)


def _one_case(config: SpeedConfig, case: Case) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    sweep, nudge = mep.Sweep(max_sweeps=config.sweeps), mep.AutoBeta(c=config.c)
    regime = measure(mep.diagnose(case.make(), case.x, case.y, settler=sweep, beta=nudge))
    arms = arms_of(case, config.arms, sweeps=config.sweeps, c=config.c)
    rivals = [ARMS[key] for key in config.arms if key in EAGER]
    timed = interleave(
        arms, config.rounds, config.warmup, baseline=rivals[0],
        clock=_clock(torch.device(config.device)),
    )  # fmt: skip
    fastest = min(rivals, key=lambda arm: median(r["ms"] for r in timed if r["arm"] == arm))
    times = {(row["round"], row["arm"]): row["ms"] for row in timed}
    for row in timed:
        row["baseline"] = fastest
        row["ratio"] = row["ms"] / times[row["round"], fastest]
        if (row["round"], FLOOR) in times:
            row["floors"] = row["ms"] / times[row["round"], FLOOR]
    return timed, regime


def _clock(device: torch.device) -> Callable[[], float]:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _summary(arm: str, rows: Sequence[_Row], regime: _Row) -> dict[str, Any]:
    own = [row for row in rows if row["arm"] == arm]
    summary: dict[str, Any] = {"arm": arm, "baseline": own[0]["baseline"]}
    for key in ("ms", "ratio", "floors"):
        if key in own[0]:
            middle, low, high = spread([row[key] for row in own])
            summary |= {key: middle, f"{key}_quartiles": [low, high], f"{key}_iqr": high - low}
    if "residual" in own[0]:
        summary["residual"] = spread([row["residual"] for row in own])[0]
        summary["statuses"] = sorted({row["status"] for row in own})
    return {**summary, **regime} if arm == EP else summary


def _settled(entry: _Row) -> float | None:
    """The residual, where something settles."""
    return None if entry["arm"] == LIMIT else entry.get("residual")


def table(record: Record) -> Table:
    """One line per case and arm."""
    config = record.config
    return Table(
        f"time per update, {config['rounds']} interleaved rounds, "
        f"{record.environment['threads']} threads",
        ["arm", "net", "depth", "width", "batch", "ms", "x backprop", "x floor", "residual", "c"],
        [_line(entry) for entry in record.summary["arms"]],
        "ms: median time of one update. x backprop: median over rounds, and quartiles, of the time "
        "relative to the fastest eager backprop of the same round: torch.optim.SGD as it comes, "
        "foreach or fused. x floor: relative to the bare matrix products. residual: median over "
        "the batch.",
    )


def _line(entry: _Row) -> list[str]:
    low, high = entry["ratio_quartiles"]
    return [
        _label([entry]), entry["net"], str(entry["depth"]), str(entry["width"]),
        str(entry["batch"]), f"{entry['ms']:.2f}", f"{entry['ratio']:.2f} [{low:.2f}, {high:.2f}]",
        number(entry.get("floors"), ".2f"), number(_settled(entry)),
        number(entry.get("c"), ".2g"),
    ]  # fmt: skip


def _label(entries: Sequence[_Row]) -> str:
    """An arm, and how far what has to settle has settled."""
    found: list[str] = []
    for entry in entries:
        found += [entry["regime"]] if "regime" in entry else entry.get("statuses", [])
    return label(entries[0]["arm"], [] if entries[0]["arm"] == LIMIT else found)


@styled()
def plot(record: Record) -> Figure:
    """Time per update and its ratio to backprop, case by case, with quartiles."""
    figure, axes = canvas(2, table(record).title)
    panels = [("ms", "time per update / ms"), ("ratio", "time relative to the fastest backprop")]
    cases = list(dict.fromkeys(_case(entry) for entry in record.summary["arms"]))
    apart = len(record.config["nets"]) > 1
    for index, key in enumerate(sorted(record.config["arms"], key=_ORDER.index)):
        entries = [entry for entry in record.summary["arms"] if entry["arm"] == ARMS[key]]
        # Nothing lies between two nets; beside each other their arms can be told apart.
        shift = 0.05 * (index - len(record.config["arms"]) / 2) if apart else 0.0
        places = [cases.index(_case(entry)) + shift for entry in entries]
        for ax, (quantity, _) in zip(axes, panels, strict=True):
            low, high = zip(*(entry[f"{quantity}_quartiles"] for entry in entries), strict=True)
            middle = [entry[quantity] for entry in entries]
            colour = "0.3" if key == "floor" else f"C{index % 5}"
            style = "-" if index < 5 else "--"
            if apart:
                style = "none"
                ax.vlines(places, low, high, color=colour, alpha=0.5)
            else:
                ax.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.plot(places, middle, ls=style, color=colour, marker="o", label=_label(entries))
    for ax, (_, quantity) in zip(axes, panels, strict=True):
        ax.set(ylabel=quantity, xlabel=_differing(record.summary["arms"]))
        ax.set_xticks(range(len(cases)), [_short(case, cases) for case in cases])
    axes[0].set(yscale="log")
    axes[0].legend(loc="best", fontsize=8, handlelength=3)
    axes[1].set_ylim(bottom=0)
    return figure


_CASE = ("net", "depth", "width", "batch")


def _case(entry: _Row) -> tuple[Any, ...]:
    return tuple(entry[key] for key in _CASE)


def _differing(entries: Sequence[_Row]) -> str:
    """What differs between the cases, for an axis."""
    found = [key for key in _CASE if len({entry[key] for entry in entries}) > 1]
    return ", ".join("weighted layers" if key == "depth" else key for key in found or ["depth"])


def _short(case: tuple[Any, ...], cases: Sequence[tuple[Any, ...]]) -> str:
    columns = [k for k in range(len(_CASE)) if len({other[k] for other in cases}) > 1] or [1]
    return "\n".join(str(case[k]) for k in columns)
