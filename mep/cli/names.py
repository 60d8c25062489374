"""What a word on the command line stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

import mep
from mep.data import Dataset

__all__ = [
    "COSTS",
    "DEFAULTS",
    "MODELS",
    "SETTLERS",
    "SQUARED",
    "STENCILS",
    "SYMMETRIC",
    "Defaults",
]


@dataclass(frozen=True)
class Defaults:
    """What a data set is trained with unless an option says otherwise."""

    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0


DEFAULTS = {
    "digits": Defaults(hidden=(128, 128), epochs=10, batch_size=64, lr=0.1, weight_decay=1e-4),
    "mnist": Defaults(hidden=(512, 512), epochs=10, batch_size=128, lr=0.05),
    "fashion-mnist": Defaults(hidden=(512, 512), epochs=10, batch_size=128, lr=0.05),
}


def _mlp(data: Dataset, hidden: tuple[int, ...]) -> nn.Module:
    return mep.models.mlp(data.x_train[0].numel(), hidden=hidden, out_features=data.classes)


def _cnn(data: Dataset, channels: tuple[int, ...], hidden: int) -> nn.Module:
    _, colours, size, _ = data.x_train.shape
    return mep.models.cnn(
        colours, size=size, out_features=data.classes, channels=channels, hidden=hidden
    )


def _deep_mlp(data: Dataset, depth: int, width: int) -> nn.Module:
    features = data.x_train[0].numel()
    return mep.models.deep_mlp(depth, width, in_features=features, out_features=data.classes)


def _hopfield_mlp(data: Dataset, hidden: tuple[int, ...], readout: bool) -> nn.Module:
    features = data.x_train[0].numel()
    return mep.models.hopfield_mlp(features, hidden, data.classes, readout=readout)


def _hopfield_cnn(
    data: Dataset,
    channels: tuple[int, ...],
    kernel: int | tuple[int, ...],
    full_size: bool,
    pool: Literal["stride", "average", "max"],
    coupling: float,
    readout: bool,
) -> nn.Module:
    _, colours, size, _ = data.x_train.shape
    return mep.models.hopfield_cnn(
        colours, size, data.classes, channels,
        kernel=kernel, full_size=full_size, pool=pool, coupling=coupling, readout=readout,
    )  # fmt: skip


def _hopfield_resnet13(data: Dataset, width: int, readout: bool) -> nn.Module:
    _, colours, size, _ = data.x_train.shape
    return mep.models.hopfield_resnet13(colours, size, data.classes, width=width, readout=readout)


def _looped(data: Dataset, width: int) -> nn.Module:
    return mep.models.LoopedMLP(data.x_train[0].numel(), width, data.classes)


_WITHIN = {"readout": False}
_CONVOLUTIONS = {
    "channels": (32, 64), "kernel": 5, "full_size": False, "pool": "stride", "coupling": 1.0,
    **_WITHIN,
}  # fmt: skip
_DEEPER = {**_CONVOLUTIONS, "channels": (32, 64, 128)}
MODELS = {
    "mlp": (_mlp, {}),
    "cnn": (_cnn, {"channels": (32, 64), "hidden": 128}),
    "deep-mlp": (_deep_mlp, {"depth": 10, "width": 128}),
    "hopfield-mlp": (_hopfield_mlp, _WITHIN),
    "hopfield-cnn": (_hopfield_cnn, _CONVOLUTIONS),
    "hopfield-cnn3": (_hopfield_cnn, {**_DEEPER, "kernel": 3, "full_size": True}),
    "hopfield-cnn3-strided": (_hopfield_cnn, {**_DEEPER, "kernel": (5, 5, 3)}),
    "hopfield-resnet13": (_hopfield_resnet13, {"width": 16, **_WITHIN}),
    "looped": (_looped, {"width": 512}),
}
"""Model -> what makes it for a data set, and its sizes; an mlp's come with the data set."""

SQUARED = (
    "hopfield-mlp", "hopfield-cnn", "hopfield-cnn3", "hopfield-cnn3-strided", "hopfield-resnet13"
)  # fmt: skip
"""Models whose output a squared error pulls: a state of the equilibrium, or read out of it."""

SYMMETRIC = (*SQUARED, "looped")
"""Models whose output is an equilibrium: they settle by fixed points, not by sweeps."""

SETTLERS: Mapping[str, tuple[type[Any], Mapping[str, str]]] = {
    "sweep": (mep.Sweep, {"sweeps": "max_sweeps", "tol": "tol"}),
    "descent": (mep.GradientDescent, {"settle_steps": "max_steps", "tol": "tol"}),
    "anderson": (mep.Anderson, {"sweeps": "max_steps", "tol": "tol"}),
    "limit": (mep.Limit, {}),
    "fixed-point": (mep.FixedPoint, {"sweeps": "max_steps", "tol": "tol", "omega": "omega"}),
}
"""Settler -> its class, and the options it takes with the name of the field each one sets."""

COSTS = ("cross_entropy", "mse")

STENCILS = {
    "one-sided": mep.one_sided,
    "centered": mep.centered,
    "five-point": mep.five_point,
    "random-sign": mep.random_sign(),
}
