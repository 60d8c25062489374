"""Nets whose output is an equilibrium of symmetric couplings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from mep.blocks import Scale, trace
from mep.couplings import (
    CONJUGATE,
    Couplings,
    Interaction,
    block_of,
    couplings_of,
    identity,
    unit_of,
)
from mep.energies import differentiable_states, forward_start, settled_states
from mep.models.feedforward import mlp
from mep.settling import FixedPoint

__all__ = ["EquilibriumNet", "LoopedMLP", "hopfield_cnn", "hopfield_mlp", "hopfield_resnet13"]

Backward = Literal["recurrent", "through time"]


class EquilibriumNet(nn.Module):
    """A net of symmetric couplings, read off a plain one: its output is what it settles to.

    Every weight of ``net`` couples two layers, its transpose carries activities back. ``forward``
    settles the free phase. It can be differentiated (the rival of Equilibrium Propagation, and its
    check): by recurrent backprop, which solves a second, linear equilibrium and keeps one round, or
    through time, which keeps them all.

    Args:
        net: Linear and Conv2d layers with bounded activations between them, and pooling.
        potential: the units' own energy, ``"square"`` or ``"conjugate"``; by default square for
            ramps and conjugate for smooth units.
        readout: whether the last layer is a plain function of the last activity, outside the
            equilibrium, as cross-entropy likes it.
        settler: of ``forward``; residuals are there relative to the states.
        backward: ``"recurrent"`` or ``"through time"``.
        skips: ``(source, target) -> strength`` of residual interactions ``-strength <rho(s_source),
            rho(s_target)>`` between states of one shape, by number from 1.

    Raises:
        TypeError, ValueError: if an option is unknown, or a skip leads nowhere.
        mep.TraceError: if ``net`` cannot be read so.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Hardtanh(0, 1), nn.Linear(8, 2))
    >>> EquilibriumNet(net)(torch.zeros(3, 4)).shape
    torch.Size([3, 2])

    Source: Scellier & Bengio 2017; Almeida 1987 and Pineda 1987 (recurrent backprop).
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        potential: str | None = None,
        readout: bool = False,
        settler: FixedPoint | None = None,
        backward: Backward = "recurrent",
        skips: Mapping[tuple[int, int], float] | None = None,
    ) -> None:
        super().__init__()
        if backward not in ("recurrent", "through time"):
            raise ValueError(f"`backward` must be 'recurrent' or 'through time', got {backward!r}")
        if settler is not None and not isinstance(settler, FixedPoint):
            raise TypeError(f"`settler` must be a mep.FixedPoint, got {settler!r}")
        self.net = net
        self.potential = potential
        self.readout = readout
        self.settler = settler or FixedPoint(max_steps=100, tol=1e-4)
        self.backward = backward
        self.skips = dict(skips or {})
        states = len(self.couplings().units)  # refuses an unreadable net at once
        for (source, target), strength in self.skips.items():
            if not 1 <= source < target <= states or not math.isfinite(strength):
                raise ValueError(
                    f"`skips` lead from a state to a later one, of 1 to {states}, and have a "
                    f"finite strength, got {(source, target)}: {strength}"
                )

    def couplings(self) -> Couplings:
        """Returns states and interactions, sharing the parameters."""
        found = couplings_of(trace(self.net), potential=self.potential, readout=self.readout)
        if not self.skips:
            return found
        skips = [
            Interaction(source, target, identity(f"skip from state {source} to {target}"), strength)
            for (source, target), strength in self.skips.items()
        ]
        return Couplings(found.units, [*found.interactions, *skips], found.readout)

    def forward(self, x: Tensor) -> Tensor:
        """Settles; returns the output, ``(B, *out)``."""
        net = self.couplings()
        if len(x) == 0:  # nothing to settle, but a shape
            return forward_start(net, x).output
        wanted = x.requires_grad or any(p.requires_grad for p in self.parameters())
        if torch.is_grad_enabled() and wanted:
            return differentiable_states(net, x, self.settler, self.backward).output
        return settled_states(net, x, self.settler).configuration.output


class LoopedMLP(EquilibriumNet):
    """The recurrent equilibrium net ``h = tanh(W_x x + b_x + S h + b_h / 2)``, with a read-out.

    ``S`` is the symmetric part of the recurrent weight, so that ``h`` is a minimum of ``E(h) =
    sum_i int_0^{h_i} artanh - 1/2 h^T S h - h^T (W_x x + b_x + b_h / 2)``, the only one if the
    norm of ``S`` is below 1: ``mep.SpectralNorm(0.9, ends=False)`` keeps it there.

    Args:
        in_features: size of the flattened input.
        hidden: number of recurrent units.
        out_features: number of outputs.
        settler: of ``forward``.
        backward: ``"recurrent"`` or ``"through time"``.

    Raises:
        ValueError: if a size is not positive.

    >>> LoopedMLP(64, 32, 10)(torch.zeros(3, 8, 8)).shape
    torch.Size([3, 10])

    Source: Bai, Kolter & Koltun 2019 (equilibrium nets); Hopfield 1984 (the energy).
    """

    def __init__(
        self,
        in_features: int = 784,
        hidden: int = 256,
        out_features: int = 10,
        *,
        settler: FixedPoint | None = None,
        backward: Backward = "recurrent",
    ) -> None:
        if min(in_features, hidden, out_features) < 1:
            raise ValueError(f"sizes must be >= 1, got {in_features}, {hidden} and {out_features}")
        recurrent = nn.Linear(hidden, hidden)
        with torch.no_grad():
            recurrent.weight.copy_((recurrent.weight + recurrent.weight.T) / 2)
        looped = nn.ModuleDict(
            {
                "flatten": nn.Flatten(),
                "input": nn.Linear(in_features, hidden),
                "recurrent": recurrent,
                "activation": nn.Tanh(),
                "output": nn.Linear(hidden, out_features),
            }
        )
        super().__init__(
            looped, potential=CONJUGATE, readout=True, settler=settler, backward=backward
        )

    def couplings(self) -> Couplings:
        """Returns states and interactions, sharing the parameters."""
        part = self.net
        assert isinstance(part, nn.ModuleDict)
        unit = unit_of(part["activation"], self.potential)
        assert unit is not None
        return Couplings(
            [unit],
            [
                Interaction(0, 1, block_of("net.input", part["flatten"], part["input"])),
                Interaction(1, 1, block_of("net.recurrent", part["recurrent"]), factor=0.5),
            ],
            Interaction(1, 2, block_of("net.output", part["output"]), factor=-1.0),
        )


def hopfield_mlp(
    in_features: int = 784,
    hidden: Sequence[int] = (512, 512),
    out_features: int = 10,
    activation: Callable[[], nn.Module] = lambda: nn.Hardtanh(0, 1),
    *,
    potential: str | None = None,
    readout: bool = False,
) -> EquilibriumNet:
    """Returns a fully connected layered Hopfield net.

    Args:
        in_features: size of the flattened input.
        hidden: width of every hidden layer.
        out_features: number of outputs.
        activation: makes the units of a hidden layer.
        potential: their own energy, see ``EquilibriumNet``.
        readout: see ``EquilibriumNet``.

    Raises:
        ValueError: if a size is not positive.

    >>> hopfield_mlp(4, (8,), 2)(torch.zeros(3, 2, 2)).shape
    torch.Size([3, 2])

    Source: Scellier & Bengio 2017, sec. 5.
    """
    net = mlp(in_features, hidden, out_features, activation)
    return EquilibriumNet(net, potential=potential, readout=readout)


def hopfield_cnn(
    in_channels: int = 1,
    size: int = 28,
    out_features: int = 10,
    channels: Sequence[int] = (32, 64),
    *,
    kernel: int | Sequence[int] = 5,
    full_size: bool = False,
    pool: Literal["stride", "average", "max"] = "stride",
    coupling: float = 1.0,
    potential: str | None = None,
    readout: bool = False,
) -> EquilibriumNet:
    """Returns a convolutional layered Hopfield net: convolutions, one output layer.

    Its weights, and so its maps, are channels last, in which torch's convolutions on a CPU take
    less time where maps are large (measured in ``docs/log.md``).

    Args:
        in_channels: channels of the image.
        size: height and width.
        out_features: number of outputs.
        channels: of every convolution.
        kernel: height and width of their kernels, odd: of all, or of every convolution.
        full_size: whether the first maps are as large as the image, and not halved yet.
        pool: how maps are halved on their way up: by convolving at every second place only, or by
            pooling 2x2 activities, which takes four times as many units and products.
        coupling: factor on what every inner convolution sends up and, its transpose, back. Below 1
            a net contracts with weights as large as a feedforward net's: activities shrink from
            layer to layer, which a factor ``coupling^(1 - n)`` before the read-out makes good, and
            what comes back does so twice. Biases and the units' bounds are not multiplied: beside
            the smaller activities they weigh more. Needs ``readout``.
        potential: the units' own energy, see ``EquilibriumNet``.
        readout: see ``EquilibriumNet``.

    Raises:
        ValueError: if a size is not positive, ``channels`` empty, a kernel even, kernels more or
            fewer than channels, ``coupling`` not positive, or without ``readout`` not 1, or
            ``pool`` unknown.

    >>> hopfield_cnn(1, 8, 10, (4, 8))(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])

    Source: Ernoult et al. 2019, sec. 4; Laborieux et al. 2021, table 2.
    """
    pooling = {"stride": None, "average": nn.AvgPool2d, "max": nn.MaxPool2d}
    if pool not in pooling:
        raise ValueError(f"`pool` must be one of {tuple(pooling)}, got {pool!r}")
    if not channels:
        raise ValueError("`channels` must name at least one convolution")
    if not 0 < coupling < math.inf or (coupling != 1 and not readout):
        raise ValueError(
            "`coupling` must be positive and finite, and needs `readout`, for an output within "
            f"the equilibrium cannot make good for it; got {coupling}"
        )
    kernels = _kernels(kernel, len(channels))
    pooled = pooling[pool]
    halvings = len(channels) - full_size
    if min(in_channels, size >> halvings if pooled else size, out_features, *channels) < 1:
        raise ValueError(
            f"sizes must be >= 1, and `size` >= 2 for every pooling, got "
            f"{[in_channels, size, out_features, *channels]}"
        )
    layers: list[nn.Module] = []
    for n_in, n_out, k in zip([in_channels, *channels], channels, kernels, strict=False):
        halves = bool(layers) or not full_size
        stride = 2 if halves and not pooled else 1
        layers += [Scale(coupling)] if layers and coupling != 1 else []
        layers += [nn.Conv2d(n_in, n_out, k, stride, k // 2), nn.Hardtanh(0, 1)]
        layers += [pooled(2)] if halves and pooled else []
        size = size // 2 if halves and pooled else (size + stride - 1) // stride
    layers += [nn.Flatten()]
    layers += [Scale(math.prod([1 / coupling] * (len(channels) - 1)))] if coupling != 1 else []
    layers += [nn.Linear(channels[-1] * size * size, out_features)]
    net = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return EquilibriumNet(net, potential=potential, readout=readout)


def _kernels(kernel: int | Sequence[int], count: int) -> list[int]:
    kernels = [kernel] * count if isinstance(kernel, int) else list(kernel)
    if len(kernels) != count or any(k < 1 or k % 2 == 0 for k in kernels):
        raise ValueError(
            f"`kernel` must be odd and >= 1, one for all or each of {count}, got {kernel}"
        )
    return kernels


def hopfield_resnet13(
    in_channels: int = 3,
    size: int = 32,
    out_features: int = 10,
    *,
    width: int = 64,
    skip: float = 0.4,
    gain: float = 0.6,
    potential: str | None = None,
    readout: bool = False,
) -> EquilibriumNet:
    """Returns a Hopfield net of 13 weighted layers with residual interactions.

    Four stages of three 3x3 convolutions, each stage with twice the channels of the one before at
    half the size; its first state also reaches its last one directly. Then the mean over the image
    and one output layer.

    Args:
        in_channels: channels of the image.
        size: height and width.
        out_features: number of outputs.
        width: channels of the first stage.
        skip: strength of the residual interactions. Together with the weights it must stay small
            enough for the net to settle; 1 would couple two units without any damping.
        gain: factor on torch's initial convolution weights, with the same intention.
        potential: the units' own energy, see ``EquilibriumNet``.
        readout: see ``EquilibriumNet``.

    Raises:
        ValueError: if a size is not positive, or a number not finite.

    >>> net = hopfield_resnet13(1, 8, 10, width=4)
    >>> len(net.couplings().units), net(torch.zeros(2, 1, 8, 8)).shape
    (13, torch.Size([2, 10]))

    Source: Elayedam & Srinivasan 2025 (a residual Hopfield net of 13 layers); the stages are those
    of He et al. 2016.
    """
    if min(in_channels, size, out_features, width) < 1 or not math.isfinite(gain):
        raise ValueError(
            "sizes must be >= 1 and `gain` finite, got "
            f"{[in_channels, size, out_features, width]} and {gain}"
        )
    layers: list[nn.Module] = []
    channels = [in_channels, *(width << stage for stage in range(4))]
    for stage, (below, above) in enumerate(pairwise(channels)):
        size = (size + 1) // 2 if stage else size
        for n_in, stride in ((below, 2 if stage else 1), (above, 1), (above, 1)):
            layers += [nn.Conv2d(n_in, above, 3, stride, 1), nn.Hardtanh(0, 1)]
    with torch.no_grad():
        for layer in layers[::2]:
            layer.get_parameter("weight").mul_(gain)
    layers += [nn.AvgPool2d(size), nn.Flatten(), nn.Linear(channels[-1], out_features)]
    skips = {(3 * stage + 1, 3 * stage + 3): skip for stage in range(4)}
    return EquilibriumNet(nn.Sequential(*layers), potential=potential, readout=readout, skips=skips)
