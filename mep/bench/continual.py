"""Learning tasks one after another: what is kept of the first when the last has been learned."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import mep
from mep.bench.plot import canvas, styled, whole_numbers
from mep.bench.record import Record
from mep.bench.sequence import Learner, learn
from mep.bench.table import Table, number, percent
from mep.continual import Penalty
from mep.data import Dataset, Tasks, permuted, split
from mep.training import atomic_write
from mep.updates import Rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARMS", "SCENARIOS", "ContinualConfig", "plot", "run", "table"]

SCENARIOS = ("permuted", "split-domain", "split-task", "split-class")
_MOMENTUM = 0.9
_RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
# The seed of held-out permutations, and one training sample in so many that is judged on.
_HELD_OUT, _SHARE = 1_000_000, 6


@dataclass(frozen=True)
class Arm:
    """One way to learn.

    Attributes:
        label: for tables.
        mode: ``"ep"`` or ``"backprop"``.
        penalty: strength -> penalty, if it has one.
        strengths: that are tried.
        rule: the update rule.
        replay: whether samples are kept.
        joint: whether all tasks are mixed.
    """

    label: str
    mode: str = "ep"
    penalty: Callable[[float], Penalty] | None = None
    strengths: tuple[float, ...] = ()
    rule: Callable[[], Rule] = mep.SGD
    replay: bool = False
    joint: bool = False

    @property
    def grid(self) -> list[tuple[float, float | None]]:
        """Learning rates and strengths: six points for every arm."""
        if self.penalty is None:
            return [(rate, None) for rate in _RATES]
        return [(rate, lam) for rate in _RATES[3:5] for lam in self.strengths]


_factors = partial(mep.EWC, curvature="kronecker")
_diagonal = partial(mep.EWC, curvature="diagonal")
_FACTORS, _DIAGONAL = (3.0, 10.0, 30.0), (10.0, 30.0, 100.0)
_IMPORTANCE = (3.0, 10.0, 30.0)
_online = partial(mep.EWC, curvature="diagonal", mode="online")
_feedback = partial(mep.ErrorFeedback, mep.TopK(0.1))

ARMS = {
    "backprop": Arm("backprop", "backprop"),
    "ep": Arm("EP"),
    "ep-feedback": Arm("EP, error feedback (top 10 %)", rule=_feedback),
    "backprop-ewc": Arm("backprop, EWC (Kronecker)", "backprop", _factors, _FACTORS),
    "ep-ewc": Arm("EP, EWC (Kronecker)", "ep", _factors, _FACTORS),
    "backprop-diagonal": Arm("backprop, EWC (diagonal)", "backprop", _diagonal, _DIAGONAL),
    "ep-diagonal": Arm("EP, EWC (diagonal)", "ep", _diagonal, _DIAGONAL),
    "ep-online": Arm("EP, EWC (diagonal, online)", "ep", _online, _DIAGONAL),
    "ep-si": Arm("EP, synaptic intelligence", "ep", mep.SynapticIntelligence, _IMPORTANCE),
    "ep-replay": Arm("EP, replay", replay=True),
    "joint": Arm("backprop, all tasks at once", "backprop", joint=True),
}


@dataclass(frozen=True)
class ContinualConfig:
    """What is learned.

    Args:
        scenario: one of ``SCENARIOS``.
        arms: some of ``ARMS``.
        tasks: number of tasks, >= 2.
        seeds: complete runs per arm: of weights, permutations and data order.
        epochs: passes over every task's training samples, >= 1.
        width: units in each of two hidden layers, >= 1.
        batch: samples per update, >= 1.
        curvature: training samples from which a task's curvature is taken, >= 1.
        kept: samples that replay keeps of every task, >= 1.
        search: held-out permutations on which rate and strength are chosen, in ``epochs`` passes
            over each, by accuracy on training samples that are held out, too; a split has its own
            tasks only. 0 takes one rate and the middle strength for all.

    Raises:
        ValueError: for a value out of range.
    """

    scenario: str = "permuted"
    arms: tuple[str, ...] = ("ep", "ep-ewc", "backprop-ewc")
    tasks: int = 10
    seeds: tuple[int, ...] = (0,)
    epochs: int = 3
    width: int = 400
    batch: int = 128
    curvature: int = 2000
    kept: int = 200
    search: int = 3

    def __post_init__(self) -> None:
        lowest = {"tasks": 2, "epochs": 1, "width": 1, "batch": 1, "curvature": 1, "kept": 1,
                  "search": 0}  # fmt: skip
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be >= {low}, got {getattr(self, name)}.")
        if self.scenario not in SCENARIOS:
            raise ValueError(f"`scenario` must be one of {SCENARIOS}, got {self.scenario!r}.")
        if not self.arms or not {*self.arms} <= {*ARMS}:
            raise ValueError(f"`arms` must be some of {tuple(ARMS)}, got {self.arms}.")
        for name in ("arms", "seeds"):
            values = getattr(self, name)
            if not values or len({*values}) < len(values):
                raise ValueError(f"`{name}` must be one or more, each once, got {values}.")


def run(config: ContinualConfig, data: Dataset, out: str | Path, command: str) -> Record:
    """Choose every arm's rate and strength on held-out tasks, then learn the sequences.

    All arms of a seed start from the same weights, meet the same tasks and, but for replay and the
    mixture, the same batches in the same order, at rates that fall to zero in a line within every
    task; SGD with momentum 0.9. Finished parts are kept in ``out`` and not done again.

    Args:
        config: what is learned.
        data: the data set.
        out: folder for checkpoints and finished parts.
        command: the command line, for the record.

    Returns:
        The record: a row per point of the grids and per run and task; the summary has accuracy
        matrices and a line per arm.
    """
    rows: list[dict[str, Any]] = []
    for arm in config.arms:
        rate, lam = _chosen(config, data, arm, Path(out), rows)
        for seed in config.seeds:
            tasks = _tasks(config, data, config.tasks, seed)
            found = _part(config, tasks, arm, seed, rate, lam, Path(out))
            shared = {"kind": "run", "arm": arm, "seed": seed, "lr": rate, "lam": lam}
            rows += [{**shared, **row} for row in found]
    kept = {**asdict(config), "data": data.name}
    return Record(command, kept, rows, {"arms": [_summary(arm, rows) for arm in config.arms]})


def _chosen(
    config: ContinualConfig, data: Dataset, arm: str, out: Path, rows: list[dict[str, Any]]
) -> tuple[float, float | None]:
    """Returns rate and strength that do best on held-out tasks; notes the search."""
    grid = ARMS[arm].grid
    if not config.search:
        strengths = ARMS[arm].strengths
        return _RATES[4], strengths[len(strengths) // 2] if strengths else None
    count = config.search if config.scenario == "permuted" else config.tasks
    seed, reached = _HELD_OUT, []
    tasks = _tasks(config, _without_test(data), count, seed)
    for rate, lam in grid:
        found = _part(config, tasks, arm, seed, rate, lam, out)
        reached.append(mean(found[-1]["accuracies"]))
        rows.append({"kind": "search", "arm": arm, "seed": seed, "lr": rate, "lam": lam,
                     "accuracy": reached[-1], "skipped": found[-1]["skipped"]})  # fmt: skip
    return grid[reached.index(max(reached))]


def _without_test(data: Dataset) -> Dataset:
    """The data set that choices are made on: no test sample has a say in them."""
    count = max(1, len(data.x_train) // _SHARE)
    x, y = data.x_train, data.y_train
    return Dataset(data.name, x[count:], y[count:], x[:count], y[:count], data.classes)


def _tasks(config: ContinualConfig, data: Dataset, count: int, seed: int) -> Tasks:
    if config.scenario == "permuted":
        return permuted(data, count, seed)
    return split(data, count, config.scenario.removeprefix("split-"))


def _part(
    config: ContinualConfig, tasks: Tasks, arm: str, seed: int, rate: float, lam: float | None,
    out: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    settings = {key: value for key, value in asdict(config).items()
                if key not in ("arms", "seeds", "search", "tasks")}  # fmt: skip
    samples = sum(tasks.size(t) for t in range(len(tasks)))
    identity = settings | {"name": tasks.name, "tasks": len(tasks), "samples": samples, "arm": arm,
                           "seed": seed, "lr": rate, "lam": lam}  # fmt: skip
    strength = f"-lam{lam}" if lam is not None else ""
    name = f"{arm}-seed{seed}-lr{rate}{strength}-x{len(tasks)}"
    part, folder = out / f"part-{name}.pt", out / f"checkpoint-{name}"
    if part.exists():
        known = torch.load(part, weights_only=True)
        if known["identity"] == identity:
            return known["rows"]
    folder.mkdir(parents=True, exist_ok=True)
    found = learn(_learner(config, tasks, identity), tasks, folder)
    atomic_write(part, partial(torch.save, {"identity": identity, "rows": found}))
    shutil.rmtree(folder)
    return found


def _learner(config: ContinualConfig, tasks: Tasks, identity: dict[str, Any]) -> Learner:
    arm, seed, rate, lam = (identity[key] for key in ("arm", "seed", "lr", "lam"))
    how = ARMS[arm]
    pixels = tasks.test(0)[0][0].numel()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mep.models.mlp(pixels, [config.width] * 2, tasks.outputs, nn.ReLU)
    groups = [{"params": [*model.parameters()], "initial_lr": rate}]
    optimizer = mep.EPOptimizer(
        groups, model=model, mode=how.mode, lr=rate, momentum=_MOMENTUM,
        update=how.rule(), penalty=how.penalty(lam) if how.penalty and lam is not None else None,
        max_skipped=10**9,  # a run that diverges is a result
    )  # fmt: skip
    size = mean(tasks.size(t) for t in range(len(tasks)))
    updates = max(1, round(config.epochs * size / config.batch))
    strength = "" if lam is None else f", strength {lam}"
    return Learner(
        f"{how.label}, seed {seed}, rate {rate}{strength}", identity, model, optimizer, updates,
        config.batch, seed, config.curvature, config.kept if how.replay else 0, how.joint,
    )  # fmt: skip


def _summary(arm: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [row for row in rows if row["kind"] == "run" and row["arm"] == arm]
    seeds = sorted({row["seed"] for row in own})
    runs = [[row for row in own if row["seed"] == seed] for seed in seeds]
    entry: dict[str, Any] = {"arm": arm, "seeds": seeds, "lr": own[0]["lr"], "lam": own[0]["lam"]}
    for key, measure in _METRICS.items():
        values = [measure(run) for run in runs]
        known = [value for value in values if value is not None]
        entry[key] = mean(known) if known else None
        entry[f"{key}_spread"] = stdev(known) if len(known) > 1 else None
    learned = [[row["accuracies"] for row in run if row["task"] >= 0] for run in runs]
    entry["matrix"] = [
        [mean(cell) for cell in zip(*rows, strict=True)] for rows in zip(*learned, strict=True)
    ]
    for key in ("residual", "aggregate", "settled", "c", "ms"):
        values = [row[key] for row in own if row.get(key) is not None]
        entry |= {key: mean(values)} if values else {}
    entry["skipped"] = sum(run[-1]["skipped"] for run in runs)
    return entry


_Run = Sequence[Mapping[str, Any]]


def _average(run: _Run) -> float:
    """Mean accuracy on all tasks, after the last."""
    return mean(run[-1]["accuracies"])


def _after(run: _Run) -> list[list[float]]:
    return [row["accuracies"] for row in run if row["task"] >= 0]


def _forgetting(run: _Run) -> float | None:
    """Mean over all tasks but the last: the best accuracy it ever had, minus that at the end."""
    after = _after(run)
    if len(after) < 2:  # jointly
        return None
    last = after[-1]
    best = [max(row[u] for row in after[u:]) for u in range(len(after) - 1)]
    return mean(b - r for b, r in zip(best, last, strict=False))


def _backward(run: _Run) -> float | None:
    """Backward transfer: accuracy at the end, minus that when the task had just been learned."""
    after = _after(run)
    if len(after) < 2:
        return None
    return mean(after[-1][u] - after[u][u] for u in range(len(after) - 1))


def _forward(run: _Run) -> float | None:
    """Forward transfer: accuracy on a task before it is learned, minus that of the first weights.

    The first weights' is measured on the second task.
    """
    after = _after(run)
    if len(after) < 2:
        return None
    chance = run[0]["accuracies"][-1]
    return mean(after[u - 1][u] - chance for u in range(1, len(after)))


_METRICS = {"accuracy": _average, "forgetting": _forgetting, "backward": _backward,
            "forward": _forward}  # fmt: skip


def table(record: Record) -> Table:
    """One line per arm."""
    config = record.config
    return Table(
        f"{config['scenario']}, {config['data']}, {config['tasks']} tasks, {config['epochs']} "
        f"epochs each, seeds {', '.join(map(str, config['seeds']))}",
        ["arm", "rate", "strength", "average accuracy", "forgetting", "backward", "forward", "ms",
         "residual", "c", "skipped"],
        [_line(entry) for entry in record.summary["arms"]],
        "average accuracy: over all tasks, after the last. forgetting: best accuracy a task ever "
        "had minus that at the end. backward: that at the end minus that when it had just been "
        "learned. forward: accuracy on the next task before it is learned, minus that of the first "
        "weights. Points, mean and spread over seeds. residual: median over a batch, mean over all "
        "updates. skipped: updates, of all seeds, whose loss or gradients were not finite: that "
        "run has diverged, and stays where it was. Strengths of different penalties are not "
        "comparable.",
    )  # fmt: skip


def _line(entry: Mapping[str, Any]) -> list[str]:
    def points(key: str) -> str:
        if entry[key] is None:
            return "-"
        return percent(entry[key], entry[f"{key}_spread"])

    return [
        ARMS[entry["arm"]].label, number(entry["lr"], ".3g"), number(entry["lam"], ".3g"),
        points("accuracy"), points("forgetting"), points("backward"), points("forward"),
        number(entry.get("ms"), ".1f"), number(entry.get("residual")),
        number(entry.get("c"), ".2g"), str(entry["skipped"]),
    ]  # fmt: skip


@styled()
def plot(record: Record) -> Figure:
    """Accuracy on the tasks so far, as tasks are added; and the matrix of EP's first EWC arm."""
    figure, (curves, grid) = canvas(2, table(record).title)
    for k, entry in enumerate(record.summary["arms"]):
        matrix = entry["matrix"]
        if len(matrix) > 1:
            reached = [100 * mean(row[: t + 1]) for t, row in enumerate(matrix)]
            style = f"C{k % 5}{'--' if ARMS[entry['arm']].mode == 'backprop' else '-'}"
            curves.plot(range(1, len(reached) + 1), reached, style, marker="os"[k // 5 % 2],
                        label=ARMS[entry["arm"]].label)  # fmt: skip
        else:
            level = 100 * entry["accuracy"]
            curves.axhline(level, color="0.4", ls=":", label=ARMS[entry["arm"]].label)
    curves.set(xlabel="tasks learned", ylabel="average accuracy so far / %")
    whole_numbers(curves)
    rows = -(-len(record.summary["arms"]) // 3)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    with_memory = [e for e in record.summary["arms"] if e["lam"] is not None]
    ours = [e for e in with_memory if ARMS[e["arm"]].mode != "backprop"]
    shown = (ours or with_memory or record.summary["arms"])[0]
    count = record.config["tasks"]
    image = torch.full((count, count), torch.nan)
    for t, row in enumerate(shown["matrix"]):
        image[t, : len(row)] = 100 * torch.tensor(row)
    edges = (0.5, count + 0.5, count + 0.5, 0.5)  # tasks count from 1
    seen = grid.imshow(image.numpy(), cmap="viridis", vmax=100, extent=edges)
    grid.set(xlabel="accuracy on task", ylabel="after task", title=ARMS[shown["arm"]].label)
    grid.grid(False)
    figure.colorbar(seen, ax=grid, label="%")
    return figure
