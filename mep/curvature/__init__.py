"""Local signals and what follows from them. Knows nothing of EP."""

from mep.curvature.signal import Factors, Signal

__all__ = ["Factors", "Signal"]
