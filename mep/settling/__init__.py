"""The one settling loop and its small solvers. Sees a problem, never blocks or energies."""

from mep.settling.loop import Iterate, Messages, Problem, Solver, settle
from mep.settling.result import CONVERGED, DIVERGED, LIMIT, NOT_SETTLED, Measured, Residual, Settled
from mep.settling.solvers import Anderson, GradientDescent, Limit, Sweep

__all__ = [
    "CONVERGED",
    "DIVERGED",
    "LIMIT",
    "NOT_SETTLED",
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
]
