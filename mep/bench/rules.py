"""Update rules against each other: presets by EP, torch's optimizers by backprop."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn

import mep
from mep.bench.competitors import ARMS, BASELINE, scheduled
from mep.bench.plot import canvas, styled
from mep.bench.record import Record
from mep.bench.regime import measure, pool
from mep.bench.table import Table, number
from mep.training import accuracy, atomic_write, batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mep.data import Dataset

__all__ = ["ARMS", "RulesConfig", "plot", "run", "table"]

TARGET = 0.95
TEST_BATCH = 512  # samples on which a trained net is diagnosed
_LOOK = 25  # steps between looks at accuracy and spectra
_HELD_OUT = 12  # one training sample in so many is kept for choosing learning rates


@dataclass(frozen=True)
class RulesConfig:
    """What is compared.

    Args:
        depths: numbers of weighted layers, each >= 2.
        epochs: passes over the training set, >= 1.
        seeds: complete runs per arm and depth.
        factors: the grid: every arm's own learning rate times each of these.
        tuning_steps: updates per point of the grid, >= 1, judged on held-out training samples.
        width: units per hidden layer, >= 1.
        batch: samples per update, >= 1.

    Raises:
        ValueError: for a value out of range.
    """

    depths: tuple[int, ...] = (3, 30)
    epochs: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    factors: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    tuning_steps: int = 400
    width: int = 128
    batch: int = 128

    def __post_init__(self) -> None:
        for name in ("epochs", "tuning_steps", "width", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if not self.depths or min(self.depths) < 2:
            raise ValueError(f"`depths` must be one or more numbers >= 2, got {self.depths}.")
        if not self.seeds or not self.factors or min(self.factors) <= 0:
            raise ValueError("`seeds` and `factors` must not be empty, factors must be > 0.")


def run(config: RulesConfig, data: Dataset, out: str | Path, command: str) -> Record:
    """Tune every arm's learning rate, then train all of them in lock-step.

    Every arm starts from a copy of one network per seed and meets the same batches in the same
    order, at a rate that falls to zero as a cosine. Hidden layers step by ``lr / L`` in all arms.
    Finished parts are kept in ``out`` and not done again.

    Args:
        config: what is compared.
        data: the data set.
        out: folder for the parts.
        command: the command line, for the record.

    Returns:
        The record: rows of the grid and of the runs; the summary has a line per depth and arm.
    """
    rows: list[dict[str, Any]] = []
    for depth in config.depths:
        settings = {**asdict(config), "depths": [depth], "data": data.name}
        part = Path(out) / f"part-depth{depth}.pt"
        known = torch.load(part, weights_only=True) if part.exists() else None
        if known is None or known["settings"] != _plain(settings):
            known = {"settings": _plain(settings), "rows": _one_depth(config, data, depth)}
            atomic_write(part, partial(torch.save, known))
        rows += known["rows"]
    settings = {**asdict(config), "data": data.name}
    return Record(command, settings, rows, {"arms": _summary(config, rows)})


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}


def _one_depth(config: RulesConfig, data: Dataset, depth: int) -> list[dict[str, Any]]:
    tuned = list(_tune(config, data, depth))
    rates = {
        arm: max((row for row in tuned if row["arm"] == arm), key=lambda row: row["accuracy"])["lr"]
        for arm in ARMS
    }
    steps = config.epochs * (len(data.x_train) // config.batch)
    rows = tuned
    for seed in config.seeds:
        rows += _race(config, data, depth, seed, rates, steps)
    return rows


def _tune(config: RulesConfig, data: Dataset, depth: int) -> Iterator[dict[str, Any]]:
    """Every point of every grid, for few steps, on a seed that no run uses."""
    count = len(data.x_train) // _HELD_OUT
    kept = replace(data, x_train=data.x_train[:-count], y_train=data.y_train[:-count])
    held = data.x_train[-count:], data.y_train[-count:]
    seed = max(config.seeds) + 1
    points = [(arm, factor) for arm in ARMS for factor in config.factors]
    for arm, factor in track(points, f"tuning, depth {depth}", transient=True):
        make, middle = ARMS[arm]
        lr = middle * factor
        model = _network(config, data, depth, seed)
        step = scheduled(make(model, lr), config.tuning_steps)
        for x, y in batches(kept, config.batch, seed, config.tuning_steps):
            step(x, y)
        found = accuracy(model, *held)
        yield {"part": "grid", "depth": depth, "arm": arm, "lr": lr, "accuracy": found}


def _race(
    config: RulesConfig,
    data: Dataset,
    depth: int,
    seed: int,
    rates: Mapping[str, float],
    steps: int,
) -> list[dict[str, Any]]:
    """All arms in lock-step on one seed."""
    start = _network(config, data, depth, seed)
    lanes = {arm: _Lane(arm, copy.deepcopy(start), rates[arm], steps) for arm in ARMS}
    stream = batches(data, config.batch, seed, steps)
    name, looks = f"depth {depth}, seed {seed}", []
    for k, (x, y) in enumerate(track(stream, name, total=steps, transient=True)):
        names = list(ARMS)
        for arm in names[k % len(names) :] + names[: k % len(names)]:
            lanes[arm].advance(x, y)
        if (k + 1) % _LOOK == 0 or k + 1 == steps:
            looks.append(k + 1)
            for lane in lanes.values():
                lane.look(data)
    base = lanes[BASELINE].seconds
    shared = {"part": "run", "depth": depth, "seed": seed, "looks": looks}
    return [{**shared, **lane.row(looks, base, data)} for lane in lanes.values()]


class _Lane:
    """One arm under way."""

    def __init__(self, arm: str, model: nn.Module, lr: float, steps: int) -> None:
        self.arm, self.model, self.lr = arm, model, lr
        made = ARMS[arm][0](model, lr)
        self.ep = made if isinstance(made, mep.EPOptimizer) else None
        self.step = scheduled(made, steps)
        self.seconds: list[float] = []
        self.course: list[float] = []
        self.statuses: list[str] = []
        self.widest = 0.0

    def advance(self, x: Tensor, y: Tensor) -> None:
        started = time.perf_counter()
        self.step(x, y)
        self.seconds.append(time.perf_counter() - started)
        if self.ep is not None and self.ep.last is not None:
            self.statuses.append(self.ep.last.status)

    def look(self, data: Dataset) -> None:
        self.course.append(accuracy(self.model, data.x_test, data.y_test, 2000))
        self.widest = max(self.widest, _widest(self.model))

    def row(self, looks: Sequence[int], base: Sequence[float], data: Dataset) -> dict[str, Any]:
        row = {
            "arm": self.arm, "lr": self.lr, "accuracy": self.course[-1], "course": self.course,
            "steps_to_target": _first(looks, self.course), "ms": 1e3 * median(self.seconds),
            "ratio": median(a / b for a, b in zip(self.seconds, base, strict=True)),
            "max_sigma": self.widest,
        }  # fmt: skip
        if self.ep is None:
            return row
        how, x, y = self.ep.how, data.x_test[:TEST_BATCH], data.y_test[:TEST_BATCH]
        found = mep.diagnose(
            self.model, x, y, beta=how.beta, settler=how.settler, stencil=how.stencil
        )
        settled = self.statuses.count("converged") / len(self.statuses)
        return {**row, **measure(found), "settled": settled, "skipped": self.ep.skipped}


def _network(config: RulesConfig, data: Dataset, depth: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inputs = data.x_train[0].numel()
        return mep.models.deep_mlp(depth, config.width, inputs, data.classes)


@torch.no_grad()
def _widest(model: nn.Module) -> float:
    """Largest spectral norm of any weight."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for p in model.parameters():
        if p.dim() == 2:
            shapes.setdefault(p.shape, []).append(p)
    norms = [torch.linalg.matrix_norm(torch.stack(batch), 2).max() for batch in shapes.values()]
    return float(torch.stack(norms).max())


def _first(looks: Sequence[int], course: Sequence[float]) -> int | None:
    return next((n for n, value in zip(looks, course, strict=True) if value >= TARGET), None)


def _summary(config: RulesConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for depth in config.depths:
        for arm in ARMS:
            own = [r for r in rows if (r["part"], r["depth"], r["arm"]) == ("run", depth, arm)]
            reached = [row["steps_to_target"] for row in own]
            found.append(
                {
                    "depth": depth, "arm": arm, "lr": own[0]["lr"],
                    "accuracy": mean(row["accuracy"] for row in own),
                    "accuracy_spread": stdev([r["accuracy"] for r in own]) if len(own) > 1 else 0.0,
                    "steps_to_target": None if None in reached else mean(reached),
                    "ratio": median(row["ratio"] for row in own),
                    "max_sigma": max(row["max_sigma"] for row in own),
                    **_of_ep(own),
                }
            )  # fmt: skip
    return found


def _of_ep(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if "regime" not in own[0]:
        return {}
    settled, skipped = mean(row["settled"] for row in own), sum(row["skipped"] for row in own)
    return {**pool(own), "settled": settled, "skipped": skipped}


def table(record: Record) -> Table:
    """One line per depth and arm."""
    config = record.config
    rows = [
        [
            entry["arm"], str(entry["depth"]), number(entry["lr"], ".2g"),
            f"{100 * entry['accuracy']:.2f}±{100 * entry['accuracy_spread']:.2f}",
            number(entry["steps_to_target"], ".0f"), f"{entry['ratio']:.2f}",
            f"{entry['max_sigma']:.2f}", entry.get("regime", "-"), number(entry.get("residual")),
            number(entry.get("residual_aggregate")), number(entry.get("cosine"), ".4f"),
            number(entry.get("settled"), ".2f"),
        ]
        for entry in record.summary["arms"]
    ]  # fmt: skip
    return Table(
        f"update rules, {config['data']}, width {config['width']}, {config['epochs']} epoch(s), "
        f"{len(config['seeds'])} seeds",
        [
            "arm",
            "depth",
            "lr",
            "accuracy / %",
            "to 95 %",
            "x SGD",
            "sigma",
            "regime",
            "residual",
            "aggregate",
            "cosine",
            "settled",
        ],
        rows,
        "bp: gradients by backprop, as for muon_backprop; the others by EP, c = 0.05 unless said. "
        "lr: chosen on held-out training samples from a grid of the same size for every arm. "
        "to 95 %: steps, - if a seed did not get there. sigma: largest spectral norm seen. "
        "regime, residual (median and aggregate) and cosine to backprop: of the trained nets on "
        f"{TEST_BATCH} test samples; settled: share of the updates whose median residual met the "
        "tolerance. "
        "x SGD: median time of a step relative to backprop with torch's SGD in the same round.",
    )


@styled()
def plot(record: Record) -> Figure:
    """Accuracy against steps, one panel per depth, mean over seeds."""
    depths = record.config["depths"]
    figure, axes = canvas(len(depths), table(record).title)
    lines = ["-", "--", ":"]
    for ax, depth in zip(axes, depths, strict=True):
        for k, arm in enumerate(ARMS):
            runs = (row for row in record.rows if row["part"] == "run")
            own = [row for row in runs if (row["depth"], row["arm"]) == (depth, arm)]
            course = [100 * mean(v) for v in zip(*(row["course"] for row in own), strict=True)]
            ax.plot(
                own[0]["looks"], course, color=f"C{k % 5}", linestyle=lines[k // 5 % 3], label=arm
            )
        ax.set(xlabel="steps", ylabel="test accuracy / %", ylim=(80, 100), title=f"depth {depth}")
    axes[-1].legend(loc="lower right", fontsize=8, ncols=2)
    return figure
