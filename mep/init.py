"""Initialisers under which signals keep their size through any depth."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["identity_", "orthogonal_"]


@torch.no_grad()
def identity_(model: nn.Module) -> nn.Module:
    """Sets every square Linear layer of a model to ``W = I, b = 0``, in place.

    Behind ReLU the Jacobian is then exactly isometric on the active units at any depth: the chain
    begins as the net of its other layers.

    Args:
        model: any module; non-square layers are left as they are.

    Returns:
        The model.

    Raises:
        ValueError: if the model has no square Linear layer.

    >>> identity_(nn.Linear(2, 2)).weight.tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    Source: Le, Jaitly & Hinton 2015, sec. 3 (identity start of ReLU recurrent nets).
    """
    layers = [m for m in _linear_layers(model) if m.in_features == m.out_features]
    if not layers:
        raise ValueError("`model` has no square Linear layer to set to the identity")
    for layer in layers:
        nn.init.eye_(layer.weight)
        _zero_bias(layer)
    return model


@torch.no_grad()
def orthogonal_(
    model: nn.Module, gain: float = 1.0, *, generator: torch.Generator | None = None
) -> nn.Module:
    """Sets every Linear layer of a model to a random (semi-)orthogonal matrix, ``b = 0``, in place.

    Args:
        model: any module.
        gain: all singular values, > 0.
        generator: source of randomness; torch's default if None.

    Returns:
        The model.

    Raises:
        ValueError: if ``gain`` is not positive or the model has no Linear layer.

    >>> w = orthogonal_(nn.Linear(4, 4)).weight.detach()
    >>> bool(torch.allclose(w @ w.T, torch.eye(4), atol=1e-5))
    True

    Source: Saxe, McClelland & Ganguli 2014, sec. 3.
    """
    if not gain > 0:
        raise ValueError(f"`gain` must be > 0, got {gain}")
    layers = _linear_layers(model)
    if not layers:
        raise ValueError("`model` has no Linear layer to make orthogonal")
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        _zero_bias(layer)
    return model


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def _zero_bias(layer: nn.Linear) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
