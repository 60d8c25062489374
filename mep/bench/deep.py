"""One training that may take hours: looked at on the way, and resumed after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track as progress
from torch import Tensor, nn

import mep
from mep.memory import track
from mep.training import accuracy, atomic_write, batches

if TYPE_CHECKING:
    from mep.data import Dataset

__all__ = ["Training", "train"]

_SAVE = 180.0  # seconds between checkpoints, at least
_SHARE = 0.1  # and of the time that they may take
_PROBE = 1000  # test samples on which the first move is measured
_GLANCE = 2000  # and accuracy on the way


@dataclass
class Training:
    """What is trained.

    Attributes:
        title: for the progress bar.
        identity: what makes it this run; a checkpoint of another is refused.
        model: at its start.
        optimizer: takes a step on a batch, by EP or by backprop.
        steps: updates, >= 1.
        batch: samples per update.
        seed: of the data order.
        look: steps between looks.
        rate: step -> factor on the learning rates; None for constant ones.
        stream: returns the batches, the same every time; None for those of the data set.
    """

    title: str
    identity: dict[str, Any]
    model: nn.Module
    optimizer: mep.EPOptimizer
    steps: int
    batch: int
    seed: int
    look: int
    rate: Callable[[int], float] | None = None
    stream: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None


@dataclass
class _Progress:
    """How far a training has come; what a checkpoint holds besides weights and state."""

    step: int = 0
    rates: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)  # of the steps since the last look


def train(run: Training, data: Dataset, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains, and goes on where a killed run has stopped.

    Args:
        run: what is trained; model and optimizer are at their end afterwards.
        data: the data set.
        path: of the checkpoint.

    Returns:
        One row per look (accuracy on the first test samples, on all at the end; means since the
        look before), and facts: relative change of the outputs by the first step
        (``first_move``), bytes that a step takes besides parameters and optimizer state
        (``extra``) and what the plan had predicted (``planned``).

    Raises:
        ValueError: if the checkpoint is of another run.
    """
    at, saved, pause = _resume(run, path), time.monotonic(), _SAVE
    groups = run.optimizer.param_groups
    at.rates = at.rates or [group["lr"] for group in groups]
    source = run.stream() if run.stream else batches(data, run.batch, run.seed, run.steps)
    steps = enumerate(source)
    for k, (x, y) in progress(steps, run.title, total=run.steps, transient=True):
        if k < at.step:
            continue
        for group, rate in zip(groups, at.rates, strict=True):
            group["lr"] = rate * (run.rate(k) if run.rate else 1.0)
        before = _logits(run.model, data) if k == 0 else None
        at.notes.append(_step(run, x, y, at.facts if k == 1 else None))
        at.step = k + 1
        if before is not None:
            after = _logits(run.model, data)
            at.facts["first_move"] = float((after - before).norm() / before.norm())
        if at.step in (1, run.steps) or at.step % run.look == 0:
            at.rows.append(_look(run, data, at))
            at.notes = []
        started = time.monotonic()
        if at.step == run.steps or started - saved > pause:
            _save(run, path, at)
            saved = time.monotonic()
            pause = max(_SAVE, (saved - started) / _SHARE)
    return at.rows, at.facts


def _step(run: Training, x: Tensor, y: Tensor, facts: dict[str, Any] | None) -> dict[str, Any]:
    """Takes a step; with ``facts`` one that is watched, and so not timed."""
    optimizer, started = run.optimizer, time.perf_counter()
    nudge = optimizer.easing.eased(optimizer.how.beta)
    if facts is None:
        loss = optimizer.step(x=x, target=y)
    else:
        with track(run.model, optimizer, samples=run.batch) as usage:
            loss = optimizer.step(x=x, target=y)
        facts["extra"] = usage.extra
        facts["planned"] = optimizer.plan.peak if optimizer.plan else None
    note = {"loss": float(loss)}
    if facts is None:
        note["ms"] = 1e3 * (time.perf_counter() - started)
    if optimizer.last is not None:
        last = optimizer.last
        note |= {"residual": last.median, "aggregate": last.aggregate}
        note |= {"settled": last.converged, "sweeps": last.sweeps}
        note |= {"c": nudge.c} if isinstance(nudge, mep.AutoBeta) else {}
    return note


def _look(run: Training, data: Dataset, at: _Progress) -> dict[str, Any]:
    some = None if at.step == run.steps else _GLANCE
    row: dict[str, Any] = {
        "step": at.step,
        "accuracy": accuracy(run.model, data.x_test[:some], data.y_test[:some], 2000),
        "skipped": run.optimizer.skipped,
    }
    for key in ("loss", "residual", "aggregate", "settled", "sweeps", "c"):
        values = [note[key] for note in at.notes if key in note]
        row |= {key: mean(values)} if values else {}
    times = [note["ms"] for note in at.notes if "ms" in note]
    row["ms"] = median(times) if times else None
    return row


@torch.no_grad()
def _logits(model: nn.Module, data: Dataset) -> Tensor:
    return model(data.x_test[:_PROBE])


def _resume(run: Training, path: Path) -> _Progress:
    if not path.exists():
        return _Progress()
    known = torch.load(path, weights_only=True)
    if known["identity"] != run.identity:
        raise ValueError(f"{path.name} is of another run: remove it, or choose another --out")
    # `load_state_dict` looks through all names for every layer, which takes hours at 100,000.
    for name, tensor in run.model.state_dict().items():
        tensor.copy_(known["model"][name])
    run.optimizer.load_state_dict(known["optimizer"])
    return _Progress(**known["progress"])


def _save(run: Training, path: Path, at: _Progress) -> None:
    known = {
        "identity": run.identity, "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(), "progress": vars(at),
    }  # fmt: skip
    atomic_write(path, partial(torch.save, known))
