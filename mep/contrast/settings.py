"""How gradients are estimated: everything but the model and the batch, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mep.contrast.stencils import Stencil, one_sided
from mep.contrast.strength import AutoBeta, Easing, check_beta
from mep.energies import Cost, Energy, PredictionError, cost_of
from mep.settling import Anderson, Solver, Sweep

__all__ = ["Settings", "settings"]


@dataclass(frozen=True)
class Settings:
    """The strategy of an estimate. Make one with ``settings``, which checks it."""

    cost: Cost
    beta: float | AutoBeta
    settler: Solver
    stencil: Stencil
    energy: Energy
    gradient_method: str

    def nodes(self, beta: float) -> list[tuple[Any, Any]]:
        """Returns the nodes ``(beta_k, w_k)`` of the stencil that have a share in the contrast.

        They are floats, or complex where the energy takes it.
        """
        free = self.energy.contrasts_free
        return [(b, w) for b, w in self.stencil(beta) if b != 0 or free]

    @property
    def backs_off(self) -> bool:
        """Whether the nudge gives way where a batch has not settled."""
        return isinstance(self.beta, AutoBeta) and self.beta.back_off

    def eased(self, easing: Easing) -> Settings:
        """Returns the strategy for the next batch."""
        return replace(self, beta=easing.eased(self.beta))


def settings(
    *,
    cost: str | Cost = "cross_entropy",
    beta: float | str | AutoBeta = "auto",
    settler: Solver | None = None,
    stencil: Stencil = one_sided,
    energy: Energy | None = None,
    gradient_method: str = "analytic",
) -> Settings:
    """Checks and completes the options that ``estimate``, ``settle`` and the optimizer share.

    Raises:
        TypeError, ValueError: naming the option and what it may be.
    """
    if settler is not None and not isinstance(settler, Solver):
        raise TypeError(f"`settler` must be a mep solver such as mep.Sweep(), got {settler!r}")
    if not callable(stencil):
        raise TypeError(f"`stencil` must be a function such as mep.one_sided, got {stencil!r}")
    if energy is not None and not isinstance(energy, Energy):
        raise TypeError(
            f"`energy` must be a mep energy such as mep.PredictionError(), got {energy!r}"
        )
    energy = energy or PredictionError()
    _check_stencil(stencil, energy)
    if gradient_method not in ("analytic", "autograd"):
        raise ValueError(
            f"`gradient_method` must be 'analytic' or 'autograd', got {gradient_method!r}"
        )
    found = Settings(
        cost_of(cost),
        check_beta(beta),
        settler or energy.default_solver,
        stencil,
        energy,
        gradient_method,
    )
    if found.backs_off and not isinstance(found.settler, (Sweep, Anderson)):
        raise ValueError(
            f"`AutoBeta(back_off=True)` helps sweeps to settle; what {found.settler} leaves does "
            "not depend on the nudge: allow it more steps"
        )
    return found


def _check_stencil(stencil: Stencil, energy: Energy) -> None:
    """A stencil that is no first derivative would estimate something else than the gradient."""
    nodes = stencil(1.0)
    if callable(nodes):
        raise TypeError("`stencil` must return nodes: pass mep.random_sign() or mep.holomorphic(n)")
    if any(isinstance(b, complex) for b, _ in nodes) and not energy.takes_complex:
        raise ValueError(
            f"a stencil of complex nodes needs an energy whose states may be complex, such as "
            f"mep.Hopfield(), not {energy}"
        )
    moments = [sum((w * b**k).real for b, w in nodes) for k in (0, 1)]
    if max(abs(moments[0]), abs(moments[1] - 1)) > 1e-9:
        raise ValueError(
            f"`stencil` must return nodes (beta_k, w_k) with sum w = 0 and sum w beta = 1; these "
            f"sum to {moments[0]:g} and {moments[1]:g}"
        )
