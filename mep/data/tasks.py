"""Sequences of tasks from one data set: permuted pixels, or its classes a few at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from mep.data.dataset import Dataset

__all__ = ["INCREMENTAL", "Tasks", "permuted", "split"]

INCREMENTAL = ("domain", "task", "class")


class Tasks:
    """Tasks that are learned one after another.

    Args:
        name: for reports.
        data: the data set they are made from.
        permutations: of the pixels, one per task; None for pixels as they are.
        groups: classes of every task; None for all classes in all tasks.
        incremental: what changes from task to task, and is not told at test unless it is
            ``"task"``: the ``"domain"`` (labels are places within the group), the ``"task"`` (only
            the group's outputs take part) or the ``"class"``.

    Attributes:
        name: as given.
        outputs: number of the model's outputs.
    """

    def __init__(
        self,
        name: str,
        data: Dataset,
        permutations: list[Tensor] | None,
        groups: list[tuple[int, ...]] | None,
        incremental: str,
    ) -> None:
        self.name = name
        self._data, self._permutations, self._groups = data, permutations, groups
        self._incremental = incremental
        domain = groups is not None and incremental == "domain"
        self.outputs = len(groups[0]) if groups is not None and domain else data.classes
        self._members = [_members(data.y_train, group) for group in groups or ()]

    def __len__(self) -> int:
        return len(self._permutations or self._groups or ())

    def size(self, task: int) -> int:
        """Returns the number of a task's training samples."""
        return len(self._members[task]) if self._groups else len(self._data.x_train)

    def batch(self, task: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns some of a task's training samples, by their numbers in the task."""
        if self._groups:
            index = self._members[task][index]
        return self._form(task, self._data.x_train[index], self._data.y_train[index])

    def test(self, task: int) -> tuple[Tensor, Tensor]:
        """Returns a task's test samples."""
        x, y = self._data.x_test, self._data.y_test
        if self._groups:
            own = _members(y, self._groups[task])
            x, y = x[own], y[own]
        return self._form(task, x, y)

    def classes(self, task: int) -> tuple[int, ...] | None:
        """Returns the outputs that take part, where the task is told; None for all."""
        return self._groups[task] if self._groups and self._incremental == "task" else None

    def _form(self, task: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._permutations:
            x = x.flatten(1)[:, self._permutations[task]].view_as(x)
        if self._groups and self._incremental == "domain":
            y = y - self._groups[task][0]
        return x, y


def permuted(data: Dataset, count: int, seed: int) -> Tasks:
    """Returns tasks that differ by a permutation of the pixels (domain-incremental).

    Args:
        data: the data set.
        count: number of tasks, >= 1.
        seed: of the permutations.

    Raises:
        ValueError: if the count is out of range.

    Source: Goodfellow et al. 2013; Kirkpatrick et al. 2017.
    """
    if count < 1:
        raise ValueError(f"`count` must be >= 1, got {count}")
    generator = torch.Generator().manual_seed(seed)
    pixels = data.x_train[0].numel()
    permutations = [torch.randperm(pixels, generator=generator) for _ in range(count)]
    return Tasks(f"permuted {data.name} x {count}", data, permutations, None, "domain")


def split(data: Dataset, count: int, incremental: str) -> Tasks:
    """Returns tasks that take the classes a few at a time, in order.

    Args:
        data: the data set.
        count: number of tasks; it must divide the number of classes.
        incremental: ``"domain"``, ``"task"`` or ``"class"``.

    Raises:
        ValueError: if an argument is out of range.

    Source: Zenke et al. 2017; van de Ven & Tolias 2019 (the three kinds).
    """
    if incremental not in INCREMENTAL:
        raise ValueError(f"`incremental` must be one of {INCREMENTAL}, got {incremental!r}")
    if count < 1 or data.classes % count or data.classes // count < 2:
        raise ValueError(
            f"`count` must cut {data.classes} classes into equal groups of at least 2, got {count}"
        )
    size = data.classes // count
    groups = [tuple(range(k * size, (k + 1) * size)) for k in range(count)]
    return Tasks(f"split {data.name}, {incremental}-incremental", data, None, groups, incremental)


def _members(y: Tensor, group: tuple[int, ...]) -> Tensor:
    return ((y >= group[0]) & (y <= group[-1])).nonzero()[:, 0]
