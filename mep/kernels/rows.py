"""Tensors that lie in memory in a row are one tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import Tensor

__all__ = ["rows"]


def rows(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields all tensors, those of one shape that follow each other in memory as one.

    Args:
        tensors: of any shapes; the order of those of one shape is the order looked for in memory.

    >>> import torch
    >>> whole = torch.zeros(3, 2)
    >>> [tuple(t.shape) for t in rows([*whole.unbind(), torch.zeros(2)])]
    [(3, 2), (2,)]
    """
    kinds: dict[tuple, list[Tensor]] = defaultdict(list)
    for t in tensors:
        kinds[t.shape].append(t)
    for same in kinds.values():
        nbytes = same[0].numel() * same[0].element_size()
        start, expected = 0, -1
        for i, t in enumerate(same):
            at, plain = t.data_ptr(), t.is_contiguous() and t.dtype == same[0].dtype
            if at != expected or not plain:
                yield from _joined(same[start:i])
                start = i
            expected = at + nbytes if plain else -1
        yield from _joined(same[start:])


def _joined(row: list[Tensor]) -> list[Tensor]:
    if len(row) < 2:
        return row
    first, numel = row[0], row[0].numel()
    end = first.storage_offset() + len(row) * numel
    # Neighbours by chance, each in memory of its own.
    if end * first.element_size() > first.untyped_storage().nbytes():
        return row
    return [first.as_strided((len(row), *first.shape), (numel, *first.stride()))]
