"""Test accuracy without leaving a trace on the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["accuracy", "evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # Module by module: `model.train()` would also wake a normalisation frozen on purpose.
        for module, mode in modes:
            module.training = mode


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 512) -> float:
    """Share of samples whose largest logit is the label.

    Args:
        model: maps ``(B, *units)`` to logits ``(B, classes)``.
        x: inputs ``(N, *units)``, on any device.
        y: labels ``(N,)``, int64.
        batch_size: samples per forward pass, >= 1.

    Returns:
        The accuracy in [0, 1].

    Raises:
        ValueError: if there are no samples.

    Example:
        >>> accuracy(nn.Identity(), torch.eye(3), torch.tensor([0, 1, 0]))
        0.6666666666666666
    """
    if len(x) == 0:
        raise ValueError("`accuracy` needs at least one sample, got an empty tensor.")
    device = next((p.device for p in model.parameters()), x.device)
    right = 0
    with evaluating(model):
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
            right += int((model(xs.to(device)).argmax(1) == ys.to(device)).sum())
    return right / len(x)
