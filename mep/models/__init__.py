"""Reference architectures: feedforward chains, and nets whose output is an equilibrium."""

from mep.blocks import Scale
from mep.models.equilibrium import (
    EquilibriumNet,
    LoopedMLP,
    hopfield_cnn,
    hopfield_mlp,
    hopfield_resnet13,
)
from mep.models.feedforward import Residual, cnn, deep_cnn, deep_mlp, mlp

__all__ = [
    "EquilibriumNet",
    "LoopedMLP",
    "Residual",
    "Scale",
    "cnn",
    "deep_cnn",
    "deep_mlp",
    "hopfield_cnn",
    "hopfield_mlp",
    "hopfield_resnet13",
    "mlp",
]
