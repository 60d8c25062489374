"""What shapes a training run, apart from the arms themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SCHEDULES", "TrainingConfig"]

SCHEDULES = ("one-cycle", "constant")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings every arm of a run shares.

    Args:
        epochs: passes over the training set, >= 1.
        batch_size: samples per update, >= 1; the last batch of an epoch may be smaller.
        schedule: ``"one-cycle"`` (rise over 30 % of the steps to the arm's own learning rate,
            then a cosine to zero) or ``"constant"``; stepped after every batch.
        seed: drives the data order and each arm's random stream (dropout).
        eval_batch_size: samples per forward pass of the evaluation, >= 1.
        shift: pixels by which training images are moved at random, >= 0 (``mep.data.augmented``).
        flip: whether half of them are mirrored.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> TrainingConfig(epochs=3).schedule
        'one-cycle'
    """

    epochs: int = 10
    batch_size: int = 128
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    seed: int = 0
    eval_batch_size: int = 512
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {SCHEDULES}, got {self.schedule!r}.")
        for name in ("seed", "shift"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)}.")
