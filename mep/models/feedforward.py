"""Reference architectures: plain ``nn.Sequential`` chains that take images or flat input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from mep.init import identity_, orthogonal_, scaled_residual_

__all__ = ["Residual", "cnn", "deep_cnn", "deep_mlp", "mlp"]


def mlp(
    in_features: int = 784,
    hidden: Sequence[int] = (512, 512),
    out_features: int = 10,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Returns a multilayer perceptron with torch's default start.

    Args:
        in_features: size of the flattened input.
        hidden: width of every hidden layer.
        out_features: number of outputs.
        activation: makes the module between two layers.

    Returns:
        Maps ``(B, *in)`` with ``prod(in) = in_features`` to ``(B, out_features)``.

    Raises:
        ValueError: if a size is not positive.

    >>> import torch
    >>> mlp(4, (8,), 2)(torch.zeros(3, 2, 2)).shape
    torch.Size([3, 2])

    Source: fully connected nets of one to three layers of 512 units are the field's usual MNIST
    models, as in Ernoult et al. 2019.
    """
    sizes = [in_features, *hidden, out_features]
    _positive(sizes)
    layers: list[nn.Module] = [nn.Flatten()]
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        layers += [activation()] * (k > 0) + [nn.Linear(n_in, n_out)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """``x + branch(x)``: one block of a chain.

    Args:
        branch: keeps the shape of its input.

    >>> import torch
    >>> Residual(nn.ReLU())(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def deep_mlp(
    depth: int,
    width: int = 128,
    in_features: int = 784,
    out_features: int = 10,
    *,
    residual: bool = False,
) -> nn.Sequential:
    """Returns a Linear + ReLU net of any depth that begins as a net of one hidden layer.

    Without skips hidden weights begin as ``W = I, b = 0``, so the Jacobian is isometric on active
    units whatever the depth. The residual variant has ``s_i = s_{i-1} + W_i relu(s_{i-1}) + b_i``
    instead and begins with ``b = 0`` and orthogonal ``W_i`` scaled by ``1 / sqrt(depth)``. First
    and last layer keep torch's default start.

    Args:
        depth: number of Linear layers, >= 2.
        width: of every hidden layer.
        in_features: size of the flattened input.
        out_features: number of outputs.
        residual: whether hidden layers have skips around them.

    Returns:
        Maps ``(B, *in)`` to ``(B, out_features)``.

    Raises:
        ValueError: if a size is too small.

    >>> import mep
    >>> len(mep.trace(deep_mlp(30))), len(mep.trace(deep_mlp(30, residual=True)))
    (30, 30)

    Source: Le, Jaitly & Hinton 2015, sec. 3, for the start; He et al. 2016 for the skips.
    """
    if depth < 2:
        raise ValueError(f"`depth` must be >= 2, got {depth}")
    if not residual:
        model = mlp(in_features, [width] * (depth - 1), out_features)
        square = [m for m in model if isinstance(m, nn.Linear)][1:-1]
        if square:
            identity_(nn.ModuleList(square))
        return model
    _positive([width, in_features, out_features])
    branches = [nn.Sequential(nn.ReLU(), nn.Linear(width, width)) for _ in range(depth - 2)]
    if branches:
        orthogonal_(nn.ModuleList(branches))
        scaled_residual_(branches)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_features, width), *map(Residual, branches), nn.ReLU(),
        nn.Linear(width, out_features),
    )  # fmt: skip


def deep_cnn(
    depth: int, channels: int = 16, in_channels: int = 1, size: int = 28, out_features: int = 10
) -> nn.Sequential:
    """Returns a plain convolutional net of any depth, without skips, with identity start.

    A 5x5 convolution of stride 2, then ``depth - 2`` 3x3 convolutions that begin as Dirac kernels,
    then a Linear layer, all behind ReLU.

    Args:
        depth: number of weighted layers, >= 2.
        channels: of every convolution.
        in_channels: channels of the image.
        size: height and width.
        out_features: number of outputs.

    Returns:
        Maps ``(B, in_channels, size, size)`` to ``(B, out_features)``.

    Raises:
        ValueError: if a size is too small.

    >>> import torch
    >>> deep_cnn(10, 4, 1, 8)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])

    Source: Zagoruyko & Komodakis 2017, "DiracNets", for the start.
    """
    if depth < 2:
        raise ValueError(f"`depth` must be >= 2, got {depth}")
    _positive([channels, in_channels, size, out_features])
    layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 5, stride=2, padding=2)]
    inner = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth - 2)]
    if inner:
        identity_(nn.ModuleList(inner))
    for conv in inner:
        layers += [nn.ReLU(), conv]
    side = (size + 1) // 2
    return nn.Sequential(
        *layers, nn.ReLU(), nn.Flatten(), nn.Linear(channels * side * side, out_features)
    )


def cnn(
    in_channels: int = 1,
    size: int = 28,
    out_features: int = 10,
    channels: Sequence[int] = (32, 64),
    hidden: int = 128,
) -> nn.Sequential:
    """Returns a small convolutional net: 5x5 convolutions of stride 2 with ReLU, then two layers.

    It strides instead of pooling: where neighbouring pixels tie, as on the even background of a
    digit, a maximum has no derivative, and nudged states flip between its winners.

    Args:
        in_channels: channels of the image.
        size: height and width.
        out_features: number of outputs.
        channels: of every convolution.
        hidden: width of the fully connected layer.

    Returns:
        Maps ``(B, in_channels, size, size)`` to ``(B, out_features)``.

    Raises:
        ValueError: if a size is not positive.

    >>> import torch
    >>> cnn(1, 8, 10, (4, 8), 16)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])

    Source: Springenberg et al. 2015, "Striving for simplicity", sec. 2.
    """
    _positive([in_channels, size, out_features, hidden, *channels])
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise([in_channels, *channels]):
        layers += [nn.Conv2d(n_in, n_out, 5, stride=2, padding=2), nn.ReLU()]
        size = (size + 1) // 2
    features = [in_channels, *channels][-1] * size * size
    layers += [nn.Flatten(), nn.Linear(features, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out_features))


def _positive(sizes: Sequence[int]) -> None:
    if any(n < 1 for n in sizes):
        raise ValueError(f"sizes must be >= 1, got {list(sizes)}")
