"""The nudged problem: what a chain, an energy, a cost and a nudging strength ask to be settled.

Everything is a displacement from the free equilibrium. With ``delta_i = f_i(s_{i-1} + d_{i-1}) -
f_i(s_{i-1})`` formed without cancellation that would matter, the errors are ``e_i = d_i - delta_i``
and the forces ``e_i - J_{i+1}^T e_{i+1}``. The output's own displacement is ``v = d_L - delta_L``;
its local error is what the output energy makes of it (``v`` itself for the squared error).

Errors are carried per unit of beta: they keep an ordinary size however weak the nudge is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mep.blocks import sample_norm
from mep.blocks.buffers import take
from mep.energies.free import FreePhase
from mep.energies.outputs import OutputEnergy, Squared
from mep.settling import Messages, Residual

__all__ = ["Configuration", "Nudged"]


@dataclass
class Configuration:
    """Displaced states and what is known of them.

    Attributes:
        free: the free states ``s_1 ... s_L``.
        displacements: ``d_1 ... d_L``.
        errors: ``e_1 ... e_{L-1}`` and the output's own displacement ``v``, per unit of beta.
        signal: the local error that the output sends down, ``-dE/df_L``, per unit of beta.
        points: every block's point at its displaced input.
        squares: per sample, those of the forces below the output, where the sweep that led here has
            left them.
        nudge: ``dC/ds_L`` at the displaced output, once it has been asked for.
        at_kinks: True if units of leading ramps were solved exactly and may rest on a kink.
    """

    free: list[Tensor]
    displacements: list[Tensor]
    errors: list[Tensor]
    signal: Tensor
    points: list[Any]
    squares: Tensor | None = None
    nudge: Tensor | None = None
    at_kinks: bool = False

    @property
    def states(self) -> list[Tensor]:
        """The displaced states."""
        return [s + d for s, d in zip(self.free, self.displacements, strict=True)]

    def local_errors(self) -> list[Tensor]:
        """Returns the postsynaptic errors ``-dE/df_i`` of all blocks, per unit of beta."""
        return [*self.errors[:-1], self.signal]


class Nudged:
    """``F_beta = E + beta C`` around the free equilibrium of one batch (a settling ``Problem``).

    Args:
        free: the free phase.
        output: the energy of the output layer.
        beta: nudging strength, of either sign.

    Attributes:
        visit: called by a first forward sweep with every block's number, point and error, in
            order, as soon as they are final and the sweep has no more use for the block.
    """

    visit: Callable[[int, Any, Tensor], None] | None = None

    def __init__(self, free: FreePhase, output: OutputEnergy, beta: float) -> None:
        self.free = free
        self.output = output
        self.beta = beta
        self.blocks = free.chain.blocks

    def start(self) -> Configuration:
        return self._unmoved([torch.zeros_like(s) for s in self.free.states])

    def _unmoved(self, zeros: list[Tensor]) -> Configuration:
        return Configuration(self.free.states, zeros, zeros, zeros[-1], self.free.points)

    def start_residual(self) -> Residual:
        # Every force vanishes at the free equilibrium but the nudge itself.
        nudge = sample_norm(self.free.cost_gradient)
        return Residual(nudge.sign(), nudge)

    def limit(self) -> Configuration:
        # Nobody writes into these displacements: one zero will do for all.
        nothing = [s.new_zeros(()).expand_as(s) for s in self.free.states]
        at, messages = self._unmoved(nothing), self.free.unit
        at.errors, at.signal = messages.errors, messages.errors[-1]
        return at

    @property
    def unit(self) -> float:
        return self.beta

    def first(self) -> Configuration:
        return self.sweep(None)

    def unknowns(self, at: Configuration) -> list[Tensor]:
        return at.errors

    def improved(self, at: Configuration) -> list[Tensor]:
        return self.backward(at).errors

    def place(self, unknowns: list[Tensor]) -> Configuration:
        return self.forward(Messages(unknowns, None))

    def move(self, at: Configuration, steps: list[Tensor]) -> Configuration:
        return self.displace([d + u for d, u in zip(at.displacements, steps, strict=True)])

    def displace(self, displacements: list[Tensor]) -> Configuration:
        points, errors = [self.free.points[0]], [displacements[0] / self.beta]
        for i in range(1, len(self.blocks)):
            delta, point = self.blocks[i].difference(self.free.points[i], displacements[i - 1])
            points.append(point)
            errors.append(torch.sub(displacements[i], delta, out=delta).div_(self.beta))
        return self._read(displacements, errors, points)

    def sweep(self, at: Configuration | None) -> Configuration:
        if at is not None:
            # A second sweep means that the first did not do. Ramps are then solved exactly:
            # slopes read off the last states can flip to and fro for ever.
            return self.forward(self._descend(at, exact_ramps=True))
        if isinstance(self.output, Squared):
            return self.forward(self.free.unit)
        return self.forward(self.backward(self.start()))  # the output's answer is not linear

    def backward(self, at: Configuration) -> Messages:
        return self._descend(at, exact_ramps=False)

    def forward(self, messages: Messages) -> Configuration:
        lowest = messages.errors[0]  # nothing moves below it
        first = torch.mul(lowest, self.beta, out=take(lowest))
        if messages.products is None:
            return self._forward_from_errors(messages, first)
        errors, products = messages.errors, messages.products
        displacements, points = [first], [self.free.points[0]]
        squares = first.new_zeros(len(first))
        if self.visit is not None:
            self.visit(0, points[0], errors[0])
        for run in self.free.chain.runs[1:]:
            span, below = run.span, slice(run.span.start - 1, run.span.stop - 1)
            moved, at, forces = run.climb(
                self.free.points[span], displacements[-1], errors[below], errors[span],
                products[below], self.beta, self.visit,
            )  # fmt: skip
            displacements += moved
            points += at
            squares += forces
        found = self._read(displacements, list(errors), points)
        if isinstance(self.output, Squared):
            found.squares = squares  # another output energy has another local error by now
        return found

    def _forward_from_errors(self, messages: Messages, first: Tensor) -> Configuration:
        """The same where no products are known: ramps that are solved exactly change errors."""
        errors, points, displacements = list(messages.errors), [self.free.points[0]], []
        inners = messages.inners or [None] * len(errors)
        for i, (block, inner) in enumerate(zip(self.blocks, inners, strict=True)):
            if i == 0:
                delta = torch.zeros_like(first)
            else:
                delta, point = block.difference(self.free.points[i], displacements[-1])
                points.append(point)
            if inner is None:
                d = delta.add_(errors[i], alpha=self.beta)
            else:
                d, errors[i] = self._rest(i, delta, inner)
            displacements.append(d)
        at = self._read(displacements, errors, points)
        at.at_kinks = messages.inners is not None
        return at

    def forces(self, at: Configuration) -> tuple[list[Tensor], Residual]:
        forces = list(self._forces(at))
        norms = torch.stack([sample_norm(force) for force in forces])
        return forces, self._residual(at, norms.square_().sum(0))

    def residual(self, at: Configuration) -> Residual:
        if at.squares is None:
            return self.forces(at)[1]
        norm = sample_norm(self._output_force(at))
        return self._residual(at, torch.addcmul(at.squares, norm, norm))

    def _forces(self, at: Configuration) -> Iterator[Tensor]:
        signals = at.local_errors()
        for i, block in enumerate(self.blocks[1:], start=1):
            product = self.free.product(i, at.points[i], signals[i])
            inner = block.inner(at.points[i], product) if at.at_kinks else None
            if inner is None:
                yield at.errors[i - 1] - block.pull(at.points[i], product)
            else:
                s = self.free.states[i - 1] + at.displacements[i - 1]
                yield block.least_force(s, at.errors[i - 1], inner)
        yield self._output_force(at)

    def _output_force(self, at: Configuration) -> Tensor:
        if isinstance(self.output, Squared):
            return at.errors[-1] + self._nudge(at)
        v, f = at.errors[-1] * self.beta, self._output_prediction(at)
        return self.output.force(v, f) / self.beta + self._nudge(at)

    def _residual(self, at: Configuration, squares: Tensor) -> Residual:
        """Forces and nudge both per unit of beta, which cancels."""
        return Residual.of(squares.sqrt(), sample_norm(self._nudge(at)))

    def _descend(self, at: Configuration, *, exact_ramps: bool) -> Messages:
        """The backward sweep at a configuration."""
        f = self._output_prediction(at)
        v = self.output.respond(
            at.errors[-1] * self.beta, f, self.free.cost, self.free.target, self.beta
        )
        e = self.output.error(v, f) / self.beta
        errors, products = [v / self.beta], []
        inners: list[Tensor | None] = [None]
        for i in reversed(range(1, len(self.blocks))):
            block, point = self.blocks[i], at.points[i]
            products.append(self.free.product(i, point, e))
            inner = block.inner(point, products[-1]) if exact_ramps else None
            if inner is None:
                e = block.pull(point, products[-1])
            else:
                delta = torch.sub(at.displacements[i - 1], at.errors[i - 1], alpha=self.beta)
                e = self._rest(i - 1, delta, inner)[1]
            errors.append(e)
            inners.append(inner)
        if all(inner is None for inner in inners):
            return Messages(errors[::-1], products[::-1])
        # Solved ramps change their errors on the way up, and so the products.
        return Messages(errors[::-1], None, inners[::-1])

    def _rest(self, i: int, delta: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        d, e = self.blocks[i + 1].at_rest(self.free.states[i], delta, inner * self.beta)
        return d, e / self.beta

    def _read(
        self, displacements: list[Tensor], errors: list[Tensor], points: list[Any]
    ) -> Configuration:
        at = Configuration(self.free.states, displacements, errors, errors[-1], points)
        if not isinstance(self.output, Squared):
            f = self._output_prediction(at)
            at.signal = self.output.error(errors[-1] * self.beta, f) / self.beta
        return at

    def _nudge(self, at: Configuration) -> Tensor:
        """``dC/ds_L`` at a configuration."""
        if at.nudge is None:
            s = self.free.states[-1] + at.displacements[-1]
            at.nudge = self.free.cost.both(s, self.free.target)[1]
        return at.nudge

    def _output_prediction(self, at: Configuration) -> Tensor:
        moved = torch.sub(at.displacements[-1], at.errors[-1], alpha=self.beta)
        return self.free.states[-1] + moved
