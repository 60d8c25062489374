"""One learner on one sequence of tasks, resumed within a task and between tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mep
from mep.bench.deep import Training, train
from mep.data import Dataset, Tasks
from mep.energies import CrossEntropy
from mep.training import atomic_write

__all__ = ["Learner", "learn"]

_CHUNK = 500  # samples per batch where curvature is taken
_TEST = 2000


@dataclass
class Learner:
    """How a sequence of tasks is learned.

    Attributes:
        title: for the progress bar.
        identity: what makes it this run; a checkpoint of another is refused.
        model: at its start.
        optimizer: takes a step on a batch; its penalty, if any, remembers every task but the last.
            Its groups have an ``"initial_lr"``.
        updates: per task, >= 1.
        batch: samples per update.
        seed: of the data order.
        curvature: training samples from which a penalty takes its curvature, >= 1.
        replay: samples kept of every task, shuffled in with every second update; 0 for none.
        joint: True mixes all tasks from the start: the ceiling. As many updates in all.
    """

    title: str
    identity: dict[str, Any]
    model: nn.Module
    optimizer: mep.EPOptimizer
    updates: int
    batch: int
    seed: int
    curvature: int
    replay: int = 0
    joint: bool = False


def learn(run: Learner, tasks: Tasks, folder: Path) -> list[dict[str, Any]]:
    """Learns the tasks one after another, and goes on where a killed run has stopped.

    Args:
        run: the learner; model and optimizer are at their end afterwards.
        tasks: the tasks.
        folder: for two checkpoints, one within a task and one between tasks.

    Returns:
        One row per task learned (one in all, if jointly): test accuracies on all tasks so far and
        on the next one, and means over the updates.

    Raises:
        ValueError: if a checkpoint is of another run, or a task has no samples.
    """
    _check(tasks)
    between, last = folder / "between.pt", len(tasks) - 1
    rows = _resume(run, between)
    if not rows:
        first = [_accuracy(run.model, tasks, u) for u in range(min(2, len(tasks)))]
        rows.append({"task": -1, "accuracies": first})
    first = last if run.joint else 0
    for t in range(first + len(rows) - 1, last + 1):
        for group in run.optimizer.param_groups:
            group["lr"] = group["initial_lr"]  # which has fallen to zero in the task before
        within = folder / f"within-{t}.pt"
        looks, _ = train(_training(run, tasks, t), _glance(tasks, t), within)
        if run.optimizer.penalty is not None and t < last:
            _consolidate(run, tasks, t)
        reached = [_accuracy(run.model, tasks, u) for u in range(min(t + 2, last + 1))]
        rows.append({"task": t, "accuracies": reached, **_over_all(looks)})
        _save(run, between, rows)
        within.unlink(missing_ok=True)
    return rows


def _check(tasks: Tasks) -> None:
    """Refuses tasks without samples, which could not be learned or judged."""
    empty = [t for t in range(len(tasks)) if not tasks.size(t) or not len(tasks.test(t)[0])]
    if empty:
        raise ValueError(
            f"tasks {', '.join(str(t + 1) for t in empty)} of {tasks.name} have no samples: take "
            "more of them"
        )


def _over_all(looks: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all updates: the first has a look of its own, which is not timed."""
    *before, last = looks
    found = {key: value for key, value in last.items() if key not in ("accuracy", "step")}
    for key in found.keys() - {"ms", "skipped"}:
        if before:
            found[key] = (before[0][key] + (last["step"] - 1) * found[key]) / last["step"]
    return found


def _training(run: Learner, tasks: Tasks, t: int) -> Training:
    steps = run.updates * (len(tasks) if run.joint else 1)
    stream = partial(_mixed if run.joint else _one_task, run, tasks, t, steps)
    return Training(
        f"{run.title}, task {t + 1} of {len(tasks)}", {**run.identity, "task": t}, run.model,
        run.optimizer, steps, run.batch, run.seed, steps, lambda k: 1 - k / steps, stream,
    )  # fmt: skip


def _one_task(run: Learner, tasks: Tasks, t: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one task; every second one of those before, where some of them were kept."""
    draw = torch.Generator().manual_seed(run.seed * 1000 + t)
    order = _order(tasks.size(t), draw)
    for k in range(steps):
        if run.replay and t and k % 2:
            earlier = int(torch.randint(t, (), generator=draw))
            kept = _kept(run, tasks, earlier)
            index = kept[torch.randint(len(kept), (run.batch,), generator=draw)]
            yield _batch(run, tasks, earlier, index)
        else:
            yield _batch(run, tasks, t, _next(order, run.batch))


def _mixed(run: Learner, tasks: Tasks, t: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(run.seed * 1000)
    orders = [_order(tasks.size(u), draw) for u in range(len(tasks))]
    for _ in range(steps):
        u = int(torch.randint(len(tasks), (), generator=draw))
        yield _batch(run, tasks, u, _next(orders[u], run.batch))


def _order(size: int, draw: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(size, generator=draw).tolist()


def _next(order: Iterator[int], count: int) -> Tensor:
    return torch.tensor([next(order) for _ in range(count)])


def _kept(run: Learner, tasks: Tasks, t: int) -> Tensor:
    draw = torch.Generator().manual_seed(run.seed * 1000 + t)
    return torch.randperm(tasks.size(t), generator=draw)[: run.replay]


def _batch(run: Learner, tasks: Tasks, t: int, index: Tensor) -> tuple[Tensor, Tensor]:
    run.optimizer.how = replace(run.optimizer.how, cost=CrossEntropy(tasks.classes(t)))
    return tasks.batch(t, index)


def _consolidate(run: Learner, tasks: Tasks, t: int) -> None:
    if isinstance(run.optimizer.penalty, mep.SynapticIntelligence):
        run.optimizer.consolidate()
        return
    draw = torch.Generator().manual_seed(run.seed * 1000 + t)
    chosen = torch.randperm(tasks.size(t), generator=draw)[: run.curvature]
    run.optimizer.consolidate([_batch(run, tasks, t, index) for index in chosen.split(_CHUNK)])


@torch.no_grad()
def _accuracy(model: nn.Module, tasks: Tasks, t: int) -> float:
    x, y = tasks.test(t)
    logits = torch.cat([model(part) for part in x.split(_TEST)])
    classes = tasks.classes(t)
    if classes is not None:
        others = [k for k in range(logits.shape[1]) if k not in classes]
        logits[:, others] = -torch.inf
    return float((logits.argmax(1) == y).double().mean())


def _glance(tasks: Tasks, t: int) -> Dataset:
    """A task's test samples in the form that training asks for."""
    x, y = tasks.test(t)
    return Dataset(f"task {t}", x[:0], y[:0], x, y, tasks.outputs)


def _resume(run: Learner, path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    known = torch.load(path, weights_only=True)
    if known["identity"] != run.identity:
        raise ValueError(f"{path} is of another run: remove it, or choose another --out")
    run.model.load_state_dict(known["model"])
    run.optimizer.load_state_dict(known["optimizer"])
    return known["rows"]


def _save(run: Learner, path: Path, rows: list[dict[str, Any]]) -> None:
    known = {
        "identity": run.identity, "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(), "rows": rows,
    }  # fmt: skip
    atomic_write(path, partial(torch.save, known))
