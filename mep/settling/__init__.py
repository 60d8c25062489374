"""The one settling loop and its small solvers. Sees a problem, never blocks or energies."""

from mep.settling.loop import TRANSPOSE, Iterate, Messages, Problem, Solver, settle, verdict
from mep.settling.result import CONVERGED, DIVERGED, LIMIT, NOT_SETTLED, Measured, Residual, Settled
from mep.settling.solvers import KOLEN_POLLACK, Anderson, GradientDescent, Limit, Sweep

__all__ = [
    "CONVERGED",
    "DIVERGED",
    "KOLEN_POLLACK",
    "LIMIT",
    "NOT_SETTLED",
    "TRANSPOSE",
    "Anderson",
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
