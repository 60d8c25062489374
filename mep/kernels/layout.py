"""Memory formats of maps: contiguous (channels first), or channels last."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_channels_last", "laid_like", "rows_of"]


def is_channels_last(t: Tensor) -> bool:
    """True for maps whose channels lie next to each other, and not in torch's usual order.

    >>> is_channels_last(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    True
    >>> is_channels_last(torch.zeros(2, 3, 4, 5)) or is_channels_last(torch.zeros(2, 3))
    False
    """
    if t.dim() != 4 or t.is_contiguous():
        return False
    return t.is_contiguous(memory_format=torch.channels_last)


def rows_of(t: Tensor) -> Tensor | None:
    """Returns a view in which every sample is a row, in the order of memory; None if there is none.

    >>> rows_of(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)).shape
    torch.Size([2, 60])
    """
    if t.is_contiguous():
        return t.flatten(1)
    return t.permute(0, 2, 3, 1).flatten(1) if is_channels_last(t) else None


def laid_like(t: Tensor, s: Tensor) -> Tensor:
    """Returns a tensor of a state's shape in its memory format: itself where it is.

    Contiguous where the state is in neither format.

    >>> s = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    >>> laid_like(torch.ones(2, 3, 4, 5), s).stride() == s.stride()
    True
    """
    last = is_channels_last(s)
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
