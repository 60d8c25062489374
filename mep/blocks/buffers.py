"""Memory that is used again: a step asks for the same tensors as the step before.

Fresh memory costs more than the arithmetic on it: the allocator returns a step's tensors to the
system, which hands out empty pages at the next one. Inside ``Buffers.lend()`` the closed forms
write into tensors kept from earlier steps; outside, ``take`` returns None and torch allocates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["Buffers", "Shelf", "give", "lending", "made_again", "shelf", "take"]


class Shelf:
    """Tensors of one shape, dtype and device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._kind = shape, dtype, device
        self._own: dict[int, Tensor] = {}
        self._idle: list[Tensor] = []
        self._rows: dict[int, list[Tensor]] = {}
        self.asked = False

    def take(self) -> Tensor | None:
        """Returns a tensor to write into (torch's ``out=``), or None: torch then allocates.

        It comes back by ``give``, or at the end of the step.
        """
        return self._idle.pop() if self._idle else self._make()

    def lend(self) -> Tensor:
        """Returns a tensor to write into, where ``lending()`` says that there is one."""
        tensor = self.take()
        assert tensor is not None, "asked outside Buffers.lend()"
        return tensor

    def lend_rows(self) -> list[Tensor]:
        """Returns the rows of such a tensor, a list that is not to be changed."""
        return self.split(self.lend())

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Returns the rows of a tensor from here, a list that is not to be changed."""
        known = self._rows.get(id(tensor))
        if known is None:
            known = self._rows[id(tensor)] = [*tensor.unbind()]
        return known

    def give(self, tensor: Tensor) -> None:
        """Takes a tensor back, once; one that is not from here is none of its business."""
        if id(tensor) in self._own:
            self._idle.append(tensor)

    def close(self) -> bool:
        """Takes everything back; returns whether the shelf had been asked for."""
        self._idle = [*reversed(self._own.values())]
        asked, self.asked = self.asked, False
        return asked

    def _make(self) -> Tensor:
        shape, dtype, device = self._kind
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self._own[id(tensor)] = tensor
        return tensor


class Buffers:
    """Tensors lent out during a step and taken back at its end."""

    def __init__(self) -> None:
        self._shelves: dict[tuple, Shelf] = {}
        self._made: dict[Hashable, list[Tensor]] = {}  # in this step, and in the one before
        self._made_before: dict[Hashable, list[Tensor]] = {}

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Lends buffers while the context lasts. Nothing computed in it may be kept."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            # Shapes that this step did not ask for (another batch size) are not kept.
            self._shelves = {k: shelf for k, shelf in self._shelves.items() if shelf.close()}
            self._made, self._made_before = {}, self._made

    def clear(self) -> None:
        """Keeps nothing, where steps have come to do without."""
        self._shelves, self._made_before = {}, {}

    def _make(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        before = self._made_before.get(key)
        if before:
            before.pop()  # nobody reads it any more
        made = make()
        self._made.setdefault(key, []).append(made)
        return made

    def _shelf(self, shape: tuple[int, ...], like: Tensor) -> Shelf:
        key = shape, like.dtype, like.device
        found = self._shelves.get(key)
        if found is None:
            found = self._shelves[key] = Shelf(*key)
        found.asked = True
        return found


class NoShelf(Shelf):
    """Outside ``Buffers.lend()``: torch allocates, and frees what nobody holds."""

    def __init__(self) -> None:
        """It keeps nothing."""

    def take(self) -> None:  # type: ignore[override]
        return None

    def give(self, tensor: Tensor) -> None:
        return


_NO_SHELF = NoShelf()
_active: ContextVar[Buffers | None] = ContextVar("active buffers", default=None)


def lending() -> bool:
    """Returns whether there are buffers: True inside ``Buffers.lend()``."""
    return _active.get() is not None


def shelf(like: Tensor, shape: tuple[int, ...] | None = None) -> Shelf:
    """Returns the shelf for one kind of tensor, an empty one outside ``Buffers.lend()``.

    Args:
        like: gives dtype and device, and the shape unless that is given.
        shape: of the tensors.

    >>> shelf(torch.zeros(2)).take() is None
    True
    """
    buffers = _active.get()
    return _NO_SHELF if buffers is None else buffers._shelf(shape or like.shape, like)


def take(like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor | None:
    """Returns a tensor to write into (torch's ``out=``), or None outside ``Buffers.lend()``.

    Args:
        like: gives dtype and device, and the shape unless that is given.
        shape: of the result.

    >>> take(torch.zeros(2)) is None
    True
    """
    return shelf(like, shape).take()


def made_again(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """Returns a new tensor, in memory of the step before, from an operation without ``out=``.

    What the step before had made by the same operation is freed just before: the allocator then
    has memory of this size at hand, which the system has not taken back.

    Args:
        key: what the operation and its shapes are known by.
        make: the operation.

    >>> made_again("zeros", lambda: torch.zeros(2))
    tensor([0., 0.])
    """
    buffers = _active.get()
    return make() if buffers is None else buffers._make(key, make)


def give(tensor: Tensor) -> None:
    """Returns a tensor before the step ends: nobody reads it any more, and it is in the cache."""
    shelf(tensor).give(tensor)
