"""One competitor of a run, and its state while the run is under way."""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from mep.training.config import TrainingConfig

if TYPE_CHECKING:
    from mep.optim import EPOptimizer

__all__ = ["Arm", "Lane"]


@dataclass
class Arm:
    """A named model and the optimizer that trains it.

    Args:
        name: unique within a run; labels rows, curves and checkpoint entries.
        model: the network, on the device it is to train on.
        optimizer: called as ``step(x=, target=)`` in either mode.
        scheduler: stepped after every batch; by default the one `TrainingConfig.schedule` names.
    """

    name: str
    model: nn.Module
    optimizer: EPOptimizer
    scheduler: LRScheduler | None = None


class Lane:
    """An arm under way: schedule, private random stream and the measurements of this epoch."""

    def __init__(self, arm: Arm, config: TrainingConfig, total_steps: int) -> None:
        self.arm = arm
        self.device = next(arm.model.parameters()).device
        self.settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in arm.optimizer.param_groups
        ]
        self.scheduler = arm.scheduler or _scheduler(arm, config.schedule, total_steps)
        self.seed = config.seed
        self.random = _seeded(config.seed, self.device)
        self.meters: dict[str, list[float]] = {}
        self.skipped = arm.optimizer.skipped

    def step(self, x: Tensor, y: Tensor) -> None:
        """One update on one batch, timed, in this arm's own random stream."""
        x, y = x.to(self.device), y.to(self.device)
        with self._stream():
            started = self._clock()
            loss = self.arm.optimizer.step(x=x, target=y)
            elapsed = self._clock() - started
        if self.scheduler is not None:
            self.scheduler.step()
        self._measure(len(x), float(loss), elapsed)

    def latest(self) -> dict[str, float]:
        """Loss, and for EP the median residual, of the last step."""
        return {key: self.meters[key][-1] for key in ("loss", "residual") if key in self.meters}

    def close_epoch(self, epoch: int, test_accuracy: float) -> dict[str, Any]:
        """The row of a finished epoch; the meters start again from nothing."""
        meters, skipped = self.meters, self.arm.optimizer.skipped
        samples = meters["samples"]
        row = {
            "arm": self.arm.name,
            "seed": self.seed,
            "epoch": epoch,
            "train_loss": sum(map(operator.mul, meters["loss"], samples)) / sum(samples),
            "test_accuracy": test_accuracy,
            "residual": _mean(meters.get("residual")),
            "residual_aggregate": _mean(meters.get("aggregate")),
            "sweeps": _mean(meters.get("sweeps")),
            "skipped": skipped - self.skipped,
            "step_ms": 1e3 * statistics.median(meters["seconds"]),
        }
        self.meters, self.skipped = {}, skipped
        return row

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on before its numbers mean anything here."""
        return {
            "parameters": {
                name: [list(p.shape), str(p.dtype)] for name, p in self.arm.model.named_parameters()
            },
            "groups": [
                {key: v for key, v in group.items() if isinstance(v, int | float | str)}
                for group in self.settings
            ],
            "scheduler": type(self.scheduler).__name__,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        return {
            "model": self.arm.model.state_dict(),
            "optimizer": self.arm.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
            "random": self.random,
            "meters": self.meters,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state written by `state_dict`."""
        self.arm.model.load_state_dict(state["model"])
        self.arm.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.random = state["random"]
        self.meters = {key: list(values) for key, values in state["meters"].items()}
        self.skipped = state["skipped"]

    def close(self) -> None:
        """Undo what this run's own schedule did to the settings of the optimizer.

        The arm can then be trained on, or again, with the learning rate it was given.
        """
        if self.scheduler is self.arm.scheduler:
            return
        for group, settings in zip(self.arm.optimizer.param_groups, self.settings, strict=True):
            for key in group.keys() - settings.keys() - {"params"}:
                del group[key]
            group.update(settings)

    def _measure(self, samples: int, loss: float, seconds: float) -> None:
        values = {"samples": samples, "loss": loss, "seconds": seconds}
        last = self.arm.optimizer.last
        if last is not None:
            values |= {"residual": last.median, "aggregate": last.aggregate, "sweeps": last.sweeps}
        for key, value in values.items():
            self.meters.setdefault(key, []).append(value)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """Torch's global generators stand at this arm's position inside, untouched outside."""
        outside = _generators(self.device)
        _set_generators(self.random, self.device)
        try:
            yield
        finally:
            self.random = _generators(self.device)
            _set_generators(outside, self.device)


def _scheduler(arm: Arm, schedule: str, total_steps: int) -> LRScheduler | None:
    if schedule == "constant":
        return None
    peaks = [group["lr"] for group in arm.optimizer.param_groups]
    return OneCycleLR(arm.optimizer, peaks, total_steps=total_steps, cycle_momentum=False)


def _mean(values: list[float] | None) -> float | None:
    """Mean over the steps that settled to a number (a diverged one counts as skipped)."""
    finite = [value for value in values or [] if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _seeded(seed: int, device: torch.device) -> list[Tensor]:
    """Fresh generator states: the same for every arm, so their streams are equal."""
    kinds = [torch.device("cpu")] + ([device] if device.type == "cuda" else [])
    return [torch.Generator(kind).manual_seed(seed).get_state() for kind in kinds]
