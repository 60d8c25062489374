"""Local signals and what follows from them. Knows nothing of EP."""

from mep.curvature.kronecker import kronecker_factors
from mep.curvature.signal import Factors, Signal, finite_products

__all__ = ["Factors", "Signal", "finite_products", "kronecker_factors"]
