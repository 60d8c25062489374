"""The prediction-error energy of a chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mep.blocks import Chain, Feedback, trace
from mep.curvature import Signal
from mep.energies.costs import Cost
from mep.energies.energy import Energy, Phase
from mep.energies.free import FreePhase
from mep.energies.nudged import Nudged
from mep.energies.outputs import OutputEnergy, Squared
from mep.settling import DIVERGED, FixedPoint, GradientDescent, Settled, Solver, Sweep

__all__ = ["PredictionError"]


@dataclass(frozen=True)
class PredictionError(Energy):
    """``E(s) = sum_i 1/2 ||s_i - f_i(s_{i-1})||^2`` per sample, with a choice for the output.

    Args:
        output: energy of the output layer: ``Squared()`` as in every other layer, or
            ``KL(temperature)``.

    >>> PredictionError()
    PredictionError(output=Squared())

    Source: Whittington & Bogacz 2017, with unit variances.
    """

    default_solver: ClassVar[Solver] = Sweep()
    foreign: ClassVar[tuple[type[Solver], ...]] = (FixedPoint,)
    contrasts_free: ClassVar[bool] = False
    takes_complex: ClassVar[bool] = False

    output: OutputEnergy = field(default_factory=Squared)

    def read(self, model: nn.Module, gradient_method: str) -> Chain:
        return trace(model, gradient_method=gradient_method)

    def free_states(self, chain: Chain, x: Tensor) -> list[Tensor]:
        return chain.free(x)[0]

    def shapes(self, chain: Chain, x: Tensor) -> list[tuple[int, ...]]:
        return [tuple(s.shape) for s in chain.free(x)[0]]

    def free_output(self, chain: Chain, x: Tensor) -> Tensor:
        s = x
        for block in chain:
            s, _ = block.predict(s)
        return s

    def result(self, chain: Chain, x: Tensor, states: list[Tensor]) -> Tensor:
        return states[-1]

    def free(
        self,
        chain: Chain,
        x: Tensor,
        target: Tensor,
        cost: Cost,
        solver: Solver,
        beta: float,
        feedback: Feedback,
    ) -> FreePhase:
        return FreePhase(chain, x, target, cost, feedback)

    def advice(self, free: FreePhase, solver: Solver, nudged: Settled, status: str) -> str | None:
        if status == DIVERGED or not isinstance(solver, GradientDescent):
            return None
        errors = nudged.configuration.local_errors()
        silent = sum(not bool(e.any()) for e in errors)
        if not silent or not errors[-1].any():
            return None
        return (
            f"{silent} of {len(errors)} layers get no signal: gradient settling moves information "
            "one layer per step; use settler=mep.Sweep() with beta='auto', or more steps"
        )

    def signals(self, free: FreePhase, phases: Sequence[Phase], scale: float) -> Iterator[Signal]:
        for settled, beta, weight in phases:
            at = settled.configuration
            factor = -weight.real * beta.real * scale  # errors come per unit of beta
            errors = at.local_errors()
            for run in free.chain.runs:
                yield from run.signals(at.points[run.span], errors[run.span], factor)

    def value(
        self, chain: Chain, x: Tensor, states: list[Tensor], y: Tensor, cost: Cost, beta: float
    ) -> Tensor:
        """Returns the total energy ``F_beta`` per sample, shape ``(B,)``, at any states.

        Differentiable in the states and the parameters when gradients are enabled.
        """
        total: Tensor | float = 0.0
        terms = [Squared()] * (len(chain) - 1) + [self.output]
        for block, term, s_in, s in zip(chain, terms, [x, *states[:-1]], states, strict=True):
            f = block.predict(s_in)[0]
            total = total + term.value(s - f, f)
        return total + beta * cost.value(states[-1], y)

    @torch.no_grad()
    def forces(
        self, chain: Chain, x: Tensor, states: list[Tensor], y: Tensor, cost: Cost, beta: float
    ) -> list[Tensor]:
        """Returns ``dF/ds_1 ... dF/ds_L`` at any states.

        ``dF/ds_i = e_i - J_{i+1}(s_i)^T e_{i+1}`` and
        ``dF/ds_L = dE_L/ds_L + beta dC/ds_L``.
        """
        predictions = [block.predict(s) for block, s in zip(chain, [x, *states[:-1]], strict=True)]
        errors = [s - f for s, (f, _) in zip(states, predictions, strict=True)]
        v, f = errors[-1], predictions[-1][0]
        signals = [*errors[:-1], self.output.error(v, f)]
        forces = []
        for i in range(1, len(chain)):
            block, point = chain.blocks[i], predictions[i][1]
            forces.append(errors[i - 1] - block.pull(point, block.product(point, signals[i])))
        return [*forces, self.output.force(v, f) + beta * cost.gradient(states[-1], y)]

    def nudged(self, free: FreePhase, beta: float) -> Nudged:
        """Returns the settling problem at one nudging strength."""
        return Nudged(free, self.output, beta)
