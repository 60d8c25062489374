"""Local signals and what follows from them. Knows nothing of EP."""

from mep.curvature.diagonal import diagonal_fisher
from mep.curvature.kronecker import activity_factor, error_factor, kronecker_factors
from mep.curvature.signal import Factors, Signal, Stack, finite_products, squares, stack_of

__all__ = [
    "Factors",
    "Signal",
    "Stack",
    "activity_factor",
    "diagonal_fisher",
    "error_factor",
    "finite_products",
    "kronecker_factors",
    "squares",
    "stack_of",
]
