"""Initialisers under which signals keep their size through any depth."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["identity_", "looks_linear_", "orthogonal_", "scaled_residual_"]


@torch.no_grad()
def identity_(model: nn.Module) -> nn.Module:
    """Sets every layer that can keep its input to the identity, ``b = 0``, in place.

    These are square Linear layers (``W = I``) and Conv2d layers with as many outputs as inputs,
    odd kernels, stride 1 and padding that keeps the size (a Dirac kernel). Behind ReLU the
    Jacobian is then exactly isometric on the active units at any depth: the chain begins as the
    net of its other layers.

    Args:
        model: any module; other layers are left as they are.

    Returns:
        The model.

    Raises:
        ValueError: if the model has no such layer.

    >>> identity_(nn.Linear(2, 2)).weight.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    >>> identity_(nn.Conv2d(1, 1, 3, padding=1)).weight.flatten().tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]

    Source: Le, Jaitly & Hinton 2015, sec. 3 (identity start of ReLU recurrent nets); Zagoruyko &
    Komodakis 2017 (Dirac kernels).
    """
    layers = [m for m in model.modules() if _keeps_its_input(m)]
    if not layers:
        raise ValueError(
            "`model` has no square Linear layer, and no Conv2d that keeps channels and size, to "
            "set to the identity"
        )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.eye_(layer.weight)
        else:
            nn.init.dirac_(layer.weight, layer.groups)  # pyright: ignore[reportArgumentType]
        _zero_bias(layer)
    return model


def _keeps_its_input(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features == module.out_features
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels == module.out_channels
        and module.stride == (1, 1)
        and all(k % 2 for k in module.kernel_size)
        and (
            module.padding == "same"
            or module.padding
            == tuple(d * (k // 2) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        )
    )


@torch.no_grad()
def looks_linear_(model: nn.Module, *, generator: torch.Generator | None = None) -> nn.Module:
    """Sets a chain of Linear and ReLU so that it begins as an orthogonal linear map, in place.

    Hidden units come in pairs of opposite sign, of which ReLU lets one pass: with ``O``
    (semi-)orthogonal the first weight is ``[O; -O]``, hidden ones ``[[O, -O], [-O, O]]`` and the
    last ``[O, -O]``, ``b = 0``. The map is isometric at any depth, but hidden weights have norm 2:
    a step that breaks the pairing may be amplified by as much in every layer.

    Args:
        model: its Linear layers, in order, are the chain; hidden widths must be even.
        generator: source of randomness; torch's default if None.

    Returns:
        The model.

    Raises:
        ValueError: if it has fewer than two Linear layers, or a hidden width is odd.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> x = torch.eye(3)
    >>> y = looks_linear_(net)(x)
    >>> bool(torch.allclose(y @ y.T, torch.eye(3), atol=1e-5))
    True

    Source: Balduzzi et al. 2017, sec. 4.1.
    """
    layers = _linear_layers(model)
    if len(layers) < 2:
        raise ValueError("`model` needs two Linear layers at least: hidden units come in pairs")
    odd = sorted({layer.out_features for layer in layers[:-1] if layer.out_features % 2})
    if odd:
        raise ValueError(f"hidden widths must be even, for units come in pairs; got {odd}")
    for k, layer in enumerate(layers):
        outputs, inputs = (1 if k == len(layers) - 1 else 2), (1 if k == 0 else 2)
        core = layer.weight.new_empty(layer.out_features // outputs, layer.in_features // inputs)
        nn.init.orthogonal_(core, generator=generator)
        rows = torch.cat([core, -core][:inputs], 1)
        layer.weight.copy_(torch.cat([rows, -rows][:outputs], 0))
        _zero_bias(layer)
    return model


@torch.no_grad()
def scaled_residual_(branches: Iterable[nn.Module], gain: float = 1.0) -> None:
    """Multiplies the last weighted layer of every residual branch by ``gain / sqrt(n)``, in place.

    The variance that ``n`` branches add to the skip is then that of one, whatever the depth.

    Args:
        branches: the branches, not the sums around them; each with a Linear or Conv2d.
        gain: >= 0; 0 lets the net begin as its skips.

    Raises:
        ValueError: if there is no branch, one has no Linear or Conv2d, or ``gain`` is negative.

    >>> branch = nn.Linear(1, 1)
    >>> _ = nn.init.ones_(branch.weight)
    >>> scaled_residual_([branch, nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)])
    >>> branch.weight.item()
    0.5

    Source: the scaling of Radford et al. 2019, sec. 2.3; its zero is Zhang et al. 2019 (Fixup).
    """
    if not gain >= 0:
        raise ValueError(f"`gain` must be >= 0, got {gain}")
    layers = []
    for k, branch in enumerate(branches):
        weighted = [m for m in branch.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        if not weighted:
            raise ValueError(f"branch {k} has no Linear or Conv2d layer to scale")
        layers.append(weighted[-1])
    if not layers:
        raise ValueError("`branches` is empty")
    for layer in layers:
        layer.weight.mul_(gain / math.sqrt(len(layers)))
        _zero_bias(layer)


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


def _zero_bias(layer: nn.Module) -> None:
    if isinstance(layer.bias, Tensor):
        nn.init.zeros_(layer.bias)
