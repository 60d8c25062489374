"""What a compiled loop over a perceptron's layers works on: numbers, and tables by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mep.kernels.perceptron import HEAD, OWN, TABLES
from mep.kernels.team import COMMON

__all__ = ["Job", "addresses", "empty"]


class Job:
    """A row of 8-byte numbers, by name.

    Args:
        depth: number of layers, the foot among them.

    Attributes:
        tensor: the row, for those who count.
        array: the same, for the loop.
    """

    def __init__(self, depth: int) -> None:
        self.tensor = torch.zeros(HEAD + len(TABLES) * depth, dtype=torch.int64, device="cpu")
        self.array = self.tensor.numpy()
        self._tables = self.array[HEAD:].reshape(-1, depth)
        self.set(depth=depth)

    def set(self, **numbers: int) -> None:
        """Sets numbers that stand before the tables."""
        for name, number in numbers.items():
            self.array[_PLACES[name]] = number

    def fill(self, **tables: Sequence[int] | np.ndarray) -> None:
        """Fills tables, each with a number for every layer; blanks in names are underscores."""
        for name, values in tables.items():
            self._tables[_ROWS[name]] = values


_PLACES = {name: place for place, name in enumerate(OWN, COMMON)}
_ROWS = {name.replace(" ", "_"): row for row, name in enumerate(TABLES)}


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Returns where tensors begin in memory; 0 for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def empty(*shape: int) -> Tensor:
    """Returns a float32 tensor to write into, on the CPU whatever the defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
