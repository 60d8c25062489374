"""The training comparison: EP against backprop, same start, same batches, same rule."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mep.bench.plot import canvas, styled, whole_numbers
from mep.bench.record import Record
from mep.bench.regime import describe, label, measure, pool
from mep.bench.table import Table, number, percent
from mep.bench.timing import spread
from mep.training import (
    Arm,
    Checkpointing,
    Observer,
    TrainingConfig,
    annotate,
    fit,
    load_checkpoint,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mep.data import Dataset
    from mep.diagnostics import Diagnosis
    from mep.optim import EPOptimizer

__all__ = ["BACKPROP", "Contest", "checkpoint_path", "plot", "run", "sentence", "table"]

BACKPROP = "backprop"
"""The name of the baseline's arm."""

TEST_BATCH = 512
"""Samples of the fixed test batch on which every trained net is diagnosed."""


@dataclass(frozen=True)
class Contest:
    """What is to be compared.

    Args:
        data: the data set.
        model: makes a freshly initialised network.
        arms: name -> optimizer of a given network; the first is the subject of the summary, one
            named ``"backprop"`` beside it is the baseline.
        training: what the arms share; its seed is replaced by each of ``seeds``.
        seeds: one complete run each, >= 1.
        config: every setting, for the record and for recognising a checkpoint.
        diagnose: ``(model, x, y) -> Diagnosis`` of a trained net; None if the subject is backprop.
            Asked once: what it finds is kept with the run, as its rows are, until it trains on.
        device: where the networks train.
    """

    data: Dataset
    model: Callable[[], nn.Module]
    arms: Mapping[str, Callable[[nn.Module], EPOptimizer]]
    training: TrainingConfig
    seeds: tuple[int, ...]
    config: Mapping[str, Any]
    diagnose: Callable[..., Diagnosis] | None = None
    device: str = "cpu"

    @property
    def subject(self) -> str:
        """Name of the arm the summary is about."""
        return next(iter(self.arms))


def checkpoint_path(out: str | Path, seed: int) -> Path:
    """Where the run of one seed is kept, under way and finished."""
    return Path(out) / f"checkpoint-seed{seed}.pt"


def run(
    contest: Contest,
    out: str | Path,
    command: str,
    *,
    resume: bool = True,
    every: float = 60.0,
    observe: Callable[[int], Sequence[Observer]] = lambda seed: (),
) -> Record:
    """Train every arm on every seed and diagnose what came out.

    Args:
        contest: what is compared.
        out: folder for one checkpoint per seed.
        command: the command line, for the record.
        resume: whether to go on from the checkpoints in ``out``.
        every: seconds between checkpoints.
        observe: seed -> observers of its run.

    Returns:
        The record: a row per seed, arm and epoch.

    Raises:
        CheckpointError: if a checkpoint in ``out`` cannot be resumed from.
    """
    rows, diagnoses = [], []
    # Which other seeds there are is no matter of one: more may join a finished run.
    identity = {name: value for name, value in contest.config.items() if name != "seeds"}
    for seed in contest.seeds:
        arms = _arms(contest, seed)
        saving = Checkpointing(checkpoint_path(out, seed), every, resume, identity)
        training = replace(contest.training, seed=seed)
        rows += fit(arms, contest.data, training, checkpointing=saving, observers=observe(seed))
        if contest.diagnose is not None:
            found = _diagnosis(contest.diagnose, arms[0].model, _test_batch(contest), saving.path)
            diagnoses.append({"seed": seed, **found})
    summary = _summary(contest, rows) | pool(diagnoses) | {"diagnoses": diagnoses}
    return Record(command, dict(contest.config), rows, summary)


def _diagnosis(
    diagnose: Callable[..., Diagnosis],
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    checkpoint: str | Path,
) -> dict[str, Any]:
    """What is found on a trained net; its checkpoint keeps it, for it may take many minutes."""
    notes = load_checkpoint(checkpoint).get("notes", {})
    if "diagnosis" not in notes:
        notes = {"diagnosis": measure(diagnose(model.eval(), *batch))}
        annotate(checkpoint, **notes)
    return notes["diagnosis"]


def _arms(contest: Contest, seed: int) -> list[Arm]:
    """The competitors, every one with a copy of the same initial network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = contest.model().to(contest.device)
    models = {name: copy.deepcopy(start) for name in contest.arms}
    return [Arm(name, models[name], make(models[name])) for name, make in contest.arms.items()]


def _test_batch(contest: Contest) -> tuple[Tensor, Tensor]:
    x, y = contest.data.x_test[:TEST_BATCH], contest.data.y_test[:TEST_BATCH]
    return x.to(contest.device), y.to(contest.device)


def _summary(contest: Contest, rows: list[dict[str, Any]]) -> dict[str, Any]:
    last = [row for row in rows if row["epoch"] == contest.training.epochs]
    subject = [row for row in last if row["arm"] == contest.subject]
    residuals = [row["residual"] for row in subject if row["residual"] is not None]
    summary = {
        "subject": contest.subject,
        "seeds": len(contest.seeds),
        "dtype": str(contest.data.x_train.dtype).removeprefix("torch."),
        **_accuracy(subject, ""),
        "step_ms": _step_ms(rows, contest.subject),
        "training_residual": statistics.median(residuals) if residuals else None,
        "skipped": sum(row["skipped"] for row in rows if row["arm"] == contest.subject),
    }
    if len(contest.arms) == 1:
        return summary
    summary |= _accuracy([row for row in last if row["arm"] == BACKPROP], "backprop_")
    ratios = [
        ours["step_ms"] / theirs["step_ms"]
        for ours, theirs in zip(
            (row for row in rows if row["arm"] == contest.subject),
            (row for row in rows if row["arm"] == BACKPROP),
            strict=True,
        )
    ]
    middle, low, high = spread(ratios)
    return summary | {
        "backprop_step_ms": _step_ms(rows, BACKPROP),
        "accuracy_difference": summary["test_accuracy"] - summary["backprop_test_accuracy"],
        "step_time_ratio": middle,
        "step_time_ratio_quartiles": [low, high],
    }


def _accuracy(last: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Mean and sample standard deviation over seeds (0 for a single one)."""
    scores = [row["test_accuracy"] for row in last]
    return {
        f"{prefix}test_accuracy": statistics.fmean(scores),
        f"{prefix}test_accuracy_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        f"{prefix}train_loss": statistics.fmean(row["train_loss"] for row in last),
    }


def _step_ms(rows: list[dict[str, Any]], arm: str) -> float:
    return statistics.median(row["step_ms"] for row in rows if row["arm"] == arm)


def table(record: Record) -> Table:
    """One column per arm: accuracy, loss, time, and what makes an EP figure an EP figure."""
    summary = record.summary
    columns = [_column(summary, "")]
    if "backprop_test_accuracy" in summary:
        columns.append(_column(summary, "backprop_"))
    seeds = "1 seed" if summary["seeds"] == 1 else f"{summary['seeds']} seeds"
    return Table(
        f"{record.config['dataset']}, {record.config['model']}, {seeds}, {summary['dtype']}",
        ["", summary["subject"], BACKPROP][: 1 + len(columns)],
        list(zip(_LINES, *columns, strict=True)),
        sentence(record),
    )


_LINES = (
    "test accuracy",
    "training loss",
    "time per step",
    "regime",
    "c",
    "residual, median",
    "residual, aggregate",
    "cosine to backprop",
    "skipped updates",
)


def _column(summary: Mapping[str, Any], prefix: str) -> list[str]:
    deviation = summary[f"{prefix}test_accuracy_std"] if summary["seeds"] > 1 else None
    settled = {} if prefix else summary  # backprop does not settle
    return [
        percent(summary[f"{prefix}test_accuracy"], deviation),
        number(summary[f"{prefix}train_loss"], ".4f"),
        number(summary[f"{prefix}step_ms"], ".2f") + " ms",
        settled.get("regime", "-"),
        number(settled.get("c"), ".2g"),
        number(settled.get("residual")),
        number(settled.get("residual_aggregate")),
        number(settled.get("cosine"), ".4f"),
        number(settled.get("skipped"), "d"),
    ]


def sentence(record: Record) -> str:
    """The result in one plain sentence."""
    summary = record.summary
    ours = f"{describe(summary)} {percent(summary['test_accuracy'])}"
    if "backprop_test_accuracy" not in summary:
        text = f"{ours} test accuracy."
    else:
        name = "EP" if summary["subject"] == "EP" else "the limit"
        text = (
            f"{ours}, backprop {percent(summary['backprop_test_accuracy'])}; "
            f"{name} takes {summary['step_time_ratio']:.2f} x backprop's time per step."
        )
    if summary["skipped"]:
        text += f" {summary['skipped']} updates were skipped because settling diverged."
    return text


@styled()
def plot(record: Record) -> Figure:
    """Training loss and test accuracy against epochs; one thin line per seed, the mean in bold."""
    figure, axes = canvas(2, f"{table(record).title}: {describe(record.summary)}")
    arms = list(dict.fromkeys(row["arm"] for row in record.rows))
    for index, arm in enumerate(arms):
        rows = [row for row in record.rows if row["arm"] == arm]
        regime = [record.summary["regime"]] if not index and "regime" in record.summary else []
        _curve(axes[0], rows, "train_loss", 1, index, label(arm, regime))
        _curve(axes[1], rows, "test_accuracy", 100, index, label(arm, regime))
    axes[0].set(yscale="log", xlabel="epoch", ylabel="training loss")
    axes[1].set(xlabel="epoch", ylabel="test accuracy / %")
    for ax in axes:
        whole_numbers(ax)
    axes[1].legend(loc="lower right")
    return figure


def _curve(
    ax: Axes, rows: list[dict[str, Any]], key: str, scale: float, index: int, name: str
) -> None:
    """Seeds thin, their mean bold; the second arm dashed, so that equal curves both show."""
    seeds = sorted({row["seed"] for row in rows})
    curves = [[scale * row[key] for row in rows if row["seed"] == seed] for seed in seeds]
    epochs = range(1, len(curves[0]) + 1)
    if len(curves) > 1:
        for curve in curves:
            ax.plot(epochs, curve, color=f"C{index}", linewidth=0.6, alpha=0.5)
    mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    ax.plot(epochs, mean, color=f"C{index}", linestyle=("-", "--")[index], marker="o", label=name)
