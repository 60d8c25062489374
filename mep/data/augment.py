"""Random changes of training images that leave what they show: shifts, and mirror images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["augmented"]


def augmented(x: Tensor, *, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Returns every image moved by up to so many pixels, and half of them mirrored.

    Rows and columns are drawn uniformly from ``-shift ... shift``, for every image anew; what comes
    in from outside is 0.

    Args:
        x: images, ``(B, colours, height, width)``.
        shift: in pixels, >= 0.
        flip: whether to mirror half of the images, left and right.
        generator: on the CPU.

    Raises:
        ValueError: if ``x`` holds no images, or ``shift`` is out of range.

    >>> x = torch.arange(4.0).view(1, 1, 2, 2)
    >>> augmented(x, shift=1, flip=False, generator=torch.Generator().manual_seed(3)).shape
    torch.Size([1, 1, 2, 2])

    Source: Simard, Steinkraus & Platt 2003, sec. 2.
    """
    if shift < 0:
        raise ValueError(f"`shift` must be >= 0, got {shift}.")
    if x.dim() != 4 and (shift or flip):
        raise ValueError(f"shifts and mirror images need images (B, C, H, W), got {tuple(x.shape)}")
    if shift:
        x = _shifted(x, shift, generator)
    if flip:
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(mirrored.to(x.device), x.flip(3), x)
    return x


def _shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    samples, _, height, width = x.shape
    start = torch.randint(2 * most + 1, (2, samples, 1, 1, 1), generator=generator)
    rows = start[0] + torch.arange(height)[:, None]
    columns = start[1] + torch.arange(width)
    wide = F.pad(x, (most,) * 4).transpose(0, 1)
    found = wide[:, torch.arange(samples)[:, None, None], rows[:, 0], columns[:, 0]]
    return found.transpose(0, 1).contiguous()
