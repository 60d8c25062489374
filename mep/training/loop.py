"""The loop: every batch to every arm in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mep.data.augment import augmented
from mep.training.arm import Arm, Lane
from mep.training.checkpoint import Checkpointing, Position, resume, save
from mep.training.config import TrainingConfig
from mep.training.evaluation import accuracy
from mep.training.observers import Observer

if TYPE_CHECKING:
    from mep.data import Dataset

__all__ = ["batches", "fit", "permutation"]


def permutation(samples: int, seed: int, epoch: int) -> Tensor:
    """Order of the training set in one epoch: a function of its arguments alone.

    Being stateless, it is the same for every arm and after every resume.

    Example:
        >>> bool((permutation(5, 0, 1) == permutation(5, 0, 1)).all())
        True
    """
    return torch.randperm(samples, generator=torch.Generator().manual_seed(_mixed(seed, epoch)))


def _mixed(seed: int, number: int) -> int:
    """64 bits of both: seed + epoch would give seed 1 the orders of seed 0, shifted."""
    return (seed * 0x9E3779B97F4A7C15 + number) % 2**63


def batches(data: Dataset, size: int, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields so many whole training batches, in the order of ``permutation``.

    Args:
        data: the data set.
        size: samples per batch, at most the training set's.
        seed: of the order.
        steps: number of batches, over as many epochs as it takes.

    Raises:
        ValueError: if a batch is larger than the training set.
    """
    per_epoch = len(data.x_train) // size
    if per_epoch == 0:
        raise ValueError(f"`batch` is {size}, but there are {len(data.x_train)} training samples.")
    for step in range(steps):
        epoch, k = divmod(step, per_epoch)
        if k == 0:
            order = permutation(len(data.x_train), seed, epoch)
        index = order[k * size : (k + 1) * size]
        yield data.x_train[index], data.y_train[index]


def fit(
    arms: Sequence[Arm],
    data: Dataset,
    config: TrainingConfig,
    *,
    checkpointing: Checkpointing | None = None,
    observers: Sequence[Observer] = (),
) -> list[dict[str, Any]]:
    """Train one or several arms in lock-step.

    Each batch goes to every arm before the next batch is drawn, and the arm that goes first
    changes from step to step. Data order and interleaved timing are therefore fair by
    construction; give the arms copies of one model and the start is fair too. Each arm draws its
    random numbers (dropout) from a stream of its own, equal at the start. On a CPU a run that was
    killed and resumed equals the unbroken one bit for bit, times excepted.

    Args:
        arms: the competitors, with different names; a single training is a list of one.
        data: has ``x_train (N, *units)``, ``y_train (N,)``, ``x_test``, ``y_test`` and ``name``.
        config: what the arms share.
        checkpointing: where to save and resume; nothing is saved by default.
        observers: told of every step and epoch, after any checkpoint that was due.

    Returns:
        One row per epoch and arm: ``arm, seed, epoch`` (from 1), ``train_loss`` (mean over
        samples), ``test_accuracy`` in [0, 1], ``residual`` and ``residual_aggregate`` (mean over
        steps of the batch's median and aggregate; None for backprop), ``sweeps`` (mean),
        ``skipped`` (updates skipped in this epoch), ``step_ms`` (median).

    Raises:
        ValueError: for no arms, two of one name, or an empty training set.
        CheckpointError: if the file to resume from is damaged or of another configuration; the
            arms are then as they were.
    """
    if not arms or len({arm.name for arm in arms}) < len(arms):
        names = [arm.name for arm in arms]
        raise ValueError(f"`arms` must be one or more arms with different names, got {names}.")
    if len(data.x_train) == 0:
        raise ValueError("`data.x_train` is empty: there is nothing to train on.")
    steps = math.ceil(len(data.x_train) / config.batch_size)
    total = steps * config.epochs
    lanes = [Lane(arm, config, total) for arm in arms]
    saver = _Saver(checkpointing, lanes, _identity(lanes, data, config, checkpointing))
    try:
        at = saver.resume()
        with _watched(observers, total, at.epoch * steps + at.position):
            while at.epoch < config.epochs:
                at = _epoch(lanes, data, config, at, saver, observers)
    finally:
        for lane in lanes:
            lane.close()
    return at.rows


def _epoch(
    lanes: Sequence[Lane],
    data: Dataset,
    config: TrainingConfig,
    at: Position,
    saver: _Saver,
    observers: Sequence[Observer],
) -> Position:
    """The rest of one epoch; returns the start of the next."""
    done = at.epoch * math.ceil(len(data.x_train) / config.batch_size)
    for lane in lanes:
        lane.arm.model.train()
    for x, y in _batches(data, config, at):
        _step(lanes, x, y, done + at.position)
        at.position += 1
        saver.save_if_due(at)
        values = {lane.arm.name: lane.latest() for lane in lanes}
        for observer in observers:
            observer.step(done + at.position, values)
    rows = [_close_epoch(lane, data, config, at.epoch + 1) for lane in lanes]
    following = Position(at.epoch + 1, 0, at.rows + rows)
    saver.save(following)
    for observer in observers:
        observer.epoch(done + at.position, rows)
    return following


def _batches(data: Dataset, config: TrainingConfig, at: Position) -> Iterator[tuple[Tensor, ...]]:
    """The batches of the epoch that are still to come."""
    order = permutation(len(data.x_train), config.seed, at.epoch)
    draw = torch.Generator()
    for number, index in enumerate(order.split(config.batch_size)[at.position :], at.position):
        # Of the batch's own, like the order: the same for every arm and after every resume.
        draw.manual_seed(_mixed(_mixed(config.seed, at.epoch), number))
        x = augmented(data.x_train[index], shift=config.shift, flip=config.flip, generator=draw)
        yield x, data.y_train[index]


def _step(lanes: Sequence[Lane], x: Tensor, y: Tensor, number: int) -> None:
    """One batch to every lane; the lane that goes first rotates, so none profits from its place."""
    first = number % len(lanes)
    for lane in (*lanes[first:], *lanes[:first]):
        lane.step(x, y)


def _close_epoch(lane: Lane, data: Dataset, config: TrainingConfig, epoch: int) -> dict[str, Any]:
    score = accuracy(lane.arm.model, data.x_test, data.y_test, config.eval_batch_size)
    return lane.close_epoch(epoch, score)


def _identity(
    lanes: Sequence[Lane],
    data: Dataset,
    config: TrainingConfig,
    checkpointing: Checkpointing | None,
) -> dict[str, Any]:
    return {
        "training": asdict(config),
        "data": [data.name, list(data.x_train.shape), list(data.x_test.shape)],
        "arms": {lane.arm.name: lane.identity() for lane in lanes},
        "settings": dict(checkpointing.identity) if checkpointing else {},
    }


class _Saver:
    """Decides when the run is written; does nothing without a `Checkpointing`."""

    def __init__(
        self, settings: Checkpointing | None, lanes: Sequence[Lane], identity: dict[str, Any]
    ) -> None:
        self.settings, self.lanes, self.identity = settings, lanes, identity
        self.saved_at = time.monotonic()

    def resume(self) -> Position:
        settings = self.settings
        if settings is None or not settings.resume or not Path(settings.path).exists():
            return Position()
        return resume(settings.path, self.lanes, self.identity)

    def save(self, at: Position) -> None:
        if self.settings is not None:
            save(self.settings.path, at, self.lanes, self.identity)
            self.saved_at = time.monotonic()

    def save_if_due(self, at: Position) -> None:
        if self.settings and time.monotonic() - self.saved_at >= self.settings.every:
            self.save(at)


@contextmanager
def _watched(observers: Sequence[Observer], total: int, done: int) -> Iterator[None]:
    try:
        for observer in observers:
            observer.start(total, done)
        yield
    finally:
        for observer in observers:
            observer.close()
