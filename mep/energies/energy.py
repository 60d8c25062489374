"""What an energy of a chain is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from mep.curvature import Signal
from mep.energies.costs import Cost
from mep.settling import Problem, Settled, Solver

__all__ = ["Energy", "Phase"]


class Phase(NamedTuple):
    """One settled node of a stencil: its end, its nudging strength and its weight."""

    settled: Settled
    beta: complex
    weight: complex


class Energy(ABC):
    """An energy ``E(s)`` of a model's states, per sample; with a cost, ``F_beta = E + beta C``.

    Attributes:
        default_solver: what settles it where no solver is named.
        foreign: kinds of solvers that do not settle it.
        contrasts_free: whether the free equilibrium has a share in a contrast: where all errors
            vanish there, it has none.
        takes_complex: whether the nudging strength may be complex.
    """

    default_solver: ClassVar[Solver]
    foreign: ClassVar[tuple[type[Solver], ...]]
    contrasts_free: ClassVar[bool]
    takes_complex: ClassVar[bool]

    @abstractmethod
    def read(self, model: nn.Module, gradient_method: str) -> Any:
        """Returns what the energy sees of a model: its chain, or its couplings.

        Raises:
            mep.TraceError: if the model cannot be read so.
        """

    def check(self, chain: Any, solver: Solver) -> None:
        """Refuses a solver that does not settle this energy.

        Raises:
            ValueError: naming one that does.
        """
        if isinstance(solver, self.foreign):
            raise ValueError(
                f"`settler={solver}` does not settle mep.{type(self).__name__}: use "
                f"mep.{self.default_solver}"
            )

    @abstractmethod
    def free_states(self, chain: Any, x: Tensor) -> list[Tensor]:
        """Returns the states of the free equilibrium."""

    @abstractmethod
    def shapes(self, chain: Any, x: Tensor) -> list[tuple[int, ...]]:
        """Returns the shapes of all states."""

    @abstractmethod
    def free_output(self, chain: Any, x: Tensor) -> Tensor:
        """Returns the output of the free equilibrium, with a graph for backprop."""

    @abstractmethod
    def result(self, chain: Any, x: Tensor, states: list[Tensor]) -> Tensor:
        """Returns what the cost looks at."""

    @abstractmethod
    def free(
        self,
        chain: Any,
        x: Tensor,
        target: Tensor,
        cost: Cost,
        solver: Solver,
        beta: float,
        feedback: Any,
    ) -> Any:
        """Returns the free phase of a batch.

        Args:
            chain: from ``read``.
            x: input, ``(B, *in)``.
            target: as the cost takes it.
            cost: the cost.
            solver: of equilibria that are not known in closed form.
            beta: the nudging strength to come, relative to the gain.
            feedback: by the ``id`` of a weight, the matrix that carries errors down in its place.
        """

    @abstractmethod
    def signals(self, free: Any, phases: Sequence[Phase], scale: float) -> Iterator[Signal]:
        """Yields the local signals of ``scale Re(sum_k w_k dF/dtheta(s^beta_k))``."""

    @abstractmethod
    def advice(self, free: Any, solver: Solver, nudged: Settled, status: str) -> str | None:
        """Says what is wrong with the settling of a batch, and what helps; None if nothing is.

        Args:
            free: the free phase.
            solver: of the settling.
            nudged: one settled phase.
            status: the worst over all.
        """

    @abstractmethod
    def value(
        self, chain: Any, x: Tensor, states: list[Tensor], y: Tensor, cost: Cost, beta: float
    ) -> Tensor:
        """Returns ``F_beta`` per sample, shape ``(B,)``, at any states; differentiable."""

    @abstractmethod
    def forces(
        self, chain: Any, x: Tensor, states: list[Tensor], y: Tensor, cost: Cost, beta: float
    ) -> list[Tensor]:
        """Returns the complete ``dF/ds_1 ... dF/ds_L`` at any states."""

    @abstractmethod
    def nudged(self, free: Any, beta: float) -> Problem:
        """Returns the settling problem around a free phase at one nudging strength."""
