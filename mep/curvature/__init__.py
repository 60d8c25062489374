"""Local signals and what follows from them. Knows nothing of EP."""

from mep.curvature.diagonal import diagonal_fisher
from mep.curvature.kronecker import kronecker_factors
from mep.curvature.signal import Factors, Signal, finite_products

__all__ = ["Factors", "Signal", "diagonal_fisher", "finite_products", "kronecker_factors"]
