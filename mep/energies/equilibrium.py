"""The free phase of a coupled net: an equilibrium that has to be settled, from a forward pass."""

from __future__ import annotations

import math
import warnings
from functools import cached_property

import torch
from torch import Tensor

from mep.blocks import sample_norm
from mep.couplings import Couplings
from mep.energies.costs import Cost
from mep.energies.relaxation import Relaxation
from mep.energies.states import States, displaced
from mep.settling import GradientDescent, Settled, Solver, settle

__all__ = ["Equilibrium", "contraction", "fixed_point", "forward_start", "settled_states"]

# Enough to tell whether a factor is below 1; its last digit is nobody's concern.
_ROUNDS = 30

_DOWNHILL = GradientDescent(max_steps=2000, lr=0.1, momentum=0.5, tol=1e-6, patience=2000)


def forward_start(net: Couplings, x: Tensor) -> States:
    """Returns the states of a forward pass, as if nothing came back from above.

    Raises:
        ValueError: if the input does not fit; the message names the layer.
    """
    at = States(net, x, [None] * len(net.units))
    for i, unit in enumerate(net.units, 1):
        try:
            s = unit.start(at.from_below(i))
            at.put(i, s, unit.activity_if_kept(s))
        except (RuntimeError, IndexError, ValueError) as error:
            blocks = [net.interactions[k].block for k in net.into[i - 1]]
            below = ", ".join(block.describe() or block.name for block in blocks)
            raise ValueError(
                f"`x` of shape {tuple(x.shape)} and dtype {x.dtype} does not fit the model: "
                f"{below} said: {error}"
            ) from error
    return at


def settled_states(net: Couplings, x: Tensor, solver: Solver) -> Settled:
    """Settles the free phase of inputs without a target; residuals are relative to the states.

    Args:
        net: the couplings.
        x: input, ``(B, *in)``.
        solver: how; where units have no closed rest, states go downhill instead.
    """
    if not all(unit.has_rest for unit in net.units) and not isinstance(solver, GradientDescent):
        solver = _DOWNHILL
    found = settle(Relaxation(forward_start(net, x), None, None, 0.0, 1.0), solver)
    if not found.converged:
        warnings.warn(
            f"the equilibrium was not reached: residual {found.history[-1]:.2g} of the states "
            f"after {found.steps} steps; allow more, or bound the weights "
            "(constraint=mep.SpectralNorm(0.9, ends=False))",
            stacklevel=3,
        )
    return found


class Equilibrium:
    """The free equilibrium of a coupled net at one batch.

    Args:
        net: the couplings.
        x: input, ``(B, *in)``.
        target: as the cost takes it.
        cost: the cost.
        solver: how it is settled.
        beta: the nudging strength to come; residuals are relative to its nudge.

    Raises:
        TypeError, ValueError: if input or target do not fit.

    Attributes:
        settled: the end of the free phase.
        target: the prepared target.
        loss: cost per sample at the free output, shape ``(B,)``.
        gain: 1: the nudging strength is relative already.
    """

    feedback = twin = None
    gain = 1.0

    @torch.no_grad()
    def __init__(
        self, net: Couplings, x: Tensor, target: Tensor, cost: Cost, solver: Solver, beta: float
    ) -> None:
        self.chain = net
        self.x = x
        self.cost = cost
        start = forward_start(net, x)
        self.target = cost.prepare(target, start.output)
        self.settled = settle(Relaxation(start, cost, self.target, 0.0, 1.0), solver)
        self._free: States = self.settled.configuration
        self._response: tuple[complex, States] | None = None
        self.loss = cost.value(self._free.output, self.target)

    @property
    def settlings(self) -> list[Settled]:
        """What had to be settled."""
        return [self.settled]

    @property
    def states(self) -> list[Tensor]:
        """``s_1 ... s_n``; without a read-out the last one is the output."""
        return self._free.states

    @cached_property
    def mean(self) -> Tensor:
        """The batch mean of the cost, a scalar tensor."""
        return self.loss.mean()

    @property
    def sound(self) -> bool:
        """True if the loss is finite."""
        return math.isfinite(float(self.mean))

    def nudged(self, beta: complex) -> Relaxation:
        """Returns the settling problem at one nudging strength, from where it best starts.

        Raises:
            ValueError: if the nudge is complex and the net, or its contrast, is real.
        """
        if isinstance(beta, complex) and (not self.chain.analytic or self.chain.by_autograd):
            raise ValueError(
                "complex nudges need analytic units (nn.Tanh, nn.Sigmoid), no max pooling and "
                "gradient_method='analytic'; use stencil=mep.centered here"
            )
        start = self._still
        other, at = self._response or (beta, None)
        real = isinstance(beta, complex) or not isinstance(other, complex)
        if at is not None and real and all(unit.analytic for unit in self.chain.units):
            # To first order states respond in proportion to the nudge, unless they are on kinks.
            moved = zip(start.net.units, at.unknowns, strict=True)
            start = start.placed([unit.kept(d * (beta / other)) for unit, d in moved])
        return Relaxation(start, self.cost, self.target, beta, abs(beta))

    @cached_property
    def _still(self) -> States:
        """The displacements of nothing, which every nudged phase starts from."""
        return displaced(self._free)

    @property
    def unnudged(self) -> Relaxation:
        """The problem of the free phase, from its end."""
        return Relaxation(self._free.copy(), self.cost, self.target, 0.0, 1.0)

    def learn(self, beta: complex, settled: Settled) -> None:
        """Takes note of where a nudged phase has ended, for the start of the next one."""
        self._response = beta, settled.configuration

    def commit(self) -> None:
        """Nothing here keeps running statistics."""


@torch.no_grad()
def fixed_point(problem: Relaxation, order: str) -> States:
    """Returns states near a fixed point, also near one that repels to and fro.

    ``s <- (s + round(s)) / 2``: eigenvalues of a round in (-3, 1) become some in (-1, 1).

    Args:
        problem: what is settled.
        order: in which units relax.

    Source: Krasnoselskii 1955.
    """
    at = problem.start()
    for _ in range(_ROUNDS):
        moved = problem.relax(at.copy(), order).states
        at = problem.place([(s + m) / 2 for s, m in zip(at.states, moved, strict=True)])
    return at


@torch.no_grad()
def contraction(problem: Relaxation, at: States, order: str) -> float:
    """Returns the spectral radius of one round of relaxation, linearised at some states.

    Below 1 a fixed point attracts. By power iteration with differences; the largest over the batch.

    Args:
        problem: what is settled.
        at: where.
        order: in which units relax.

    Source: Saad 2011, "Numerical methods for large eigenvalue problems", sec. 4.1.
    """
    base = problem.relax(at.copy(), order).states
    scale = math.sqrt(torch.finfo(base[0].dtype).eps)
    draw = torch.Generator(base[0].device).manual_seed(0)
    v = [torch.randn(s.shape, generator=draw, dtype=s.dtype, device=s.device) for s in base]
    radius = 0.0
    for _ in range(_ROUNDS):
        size = _size(v).clamp(min=1e-30) / scale
        v = [t / size.view(-1, *[1] * (t.dim() - 1)) for t in v]
        start = States(at.net, at.x, [s + d for s, d in zip(at.states, v, strict=True)])
        v = [m - s for m, s in zip(problem.relax(start, order).states, base, strict=True)]
        radius = float(_size(v).max()) / scale
    return radius


def _size(v: list[Tensor]) -> Tensor:
    """The norm of every sample over all states, ``(B,)``."""
    return torch.stack([sample_norm(t) for t in v]).norm(dim=0)
