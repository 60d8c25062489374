"""The one settling loop and its small solvers. Sees a problem, never blocks or energies."""

from mep.settling.loop import (
    TRANSPOSE,
    Iterate,
    Messages,
    Problem,
    Solver,
    settle,
    verdict,
)
from mep.settling.result import CONVERGED, DIVERGED, LIMIT, NOT_SETTLED, Measured, Residual, Settled
from mep.settling.solvers import (
    ALTERNATING,
    BACKWARD,
    FORWARD,
    KOLEN_POLLACK,
    ORDERS,
    SYNCHRONOUS,
    Anderson,
    FixedPoint,
    GradientDescent,
    Limit,
    Sweep,
)

__all__ = [
    "ALTERNATING",
    "BACKWARD",
    "CONVERGED",
    "DIVERGED",
    "FORWARD",
    "KOLEN_POLLACK",
    "LIMIT",
    "NOT_SETTLED",
    "ORDERS",
    "SYNCHRONOUS",
    "TRANSPOSE",
    "Anderson",
    "FixedPoint",
    "GradientDescent",
    "Iterate",
    "Limit",
    "Measured",
    "Messages",
    "Problem",
    "Residual",
    "Settled",
    "Solver",
    "Sweep",
    "settle",
    "verdict",
]
