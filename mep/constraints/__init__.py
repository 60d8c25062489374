"""Constraints on parameters. They know nothing of EP."""

from mep.constraints.constraint import Constraint
from mep.constraints.spectral import SpectralNorm

__all__ = ["Constraint", "SpectralNorm"]
