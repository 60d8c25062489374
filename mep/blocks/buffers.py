"""Memory that is used again: a step asks for the same tensors as the step before.

Fresh memory costs more than the arithmetic on it: the allocator returns a step's tensors to the
system, which hands out empty pages at the next one. Inside ``Buffers.lend()`` the closed forms
write into tensors kept from earlier steps; outside, ``take`` returns None and torch allocates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["Buffers", "give", "take"]


class Buffers:
    """Tensors lent out during a step and taken back at its end."""

    def __init__(self) -> None:
        self._idle: dict[tuple, list[Tensor]] = defaultdict(list)
        self._lent: dict[int, tuple[list[Tensor], Tensor]] = {}
        self._asked: set[tuple] = set()

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Lends buffers while the context lasts. Nothing computed in it may be kept."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            for idle, tensor in reversed(self._lent.values()):
                idle.append(tensor)
            self._lent.clear()
            # Shapes that this step did not ask for (another batch size) are not kept.
            for key in self._idle.keys() - self._asked:
                del self._idle[key]
            self._asked.clear()

    def _take(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        key = (shape, like.dtype, like.device)
        self._asked.add(key)
        idle = self._idle[key]
        tensor = idle.pop() if idle else torch.empty(shape, dtype=like.dtype, device=like.device)
        self._lent[id(tensor)] = (idle, tensor)
        return tensor

    def _give(self, tensor: Tensor) -> None:
        entry = self._lent.pop(id(tensor), None)
        if entry is not None:
            entry[0].append(tensor)


_active: ContextVar[Buffers | None] = ContextVar("active buffers", default=None)


def take(like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor | None:
    """Returns a tensor to write into (torch's ``out=``), or None outside ``Buffers.lend()``.

    Args:
        like: gives dtype and device, and the shape unless that is given.
        shape: of the result.

    >>> take(torch.zeros(2)) is None
    True
    """
    buffers = _active.get()
    return None if buffers is None else buffers._take(like, like.shape if shape is None else shape)


def give(tensor: Tensor) -> None:
    """Returns a tensor before the step ends: nobody reads it any more, and it is in the cache."""
    buffers = _active.get()
    if buffers is not None:
        buffers._give(tensor)
