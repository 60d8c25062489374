"""Which coupled nets relax in compiled rounds: perceptrons of ramps, pulled by a squared error."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from mep.couplings import Wiring
from mep.energies.costs import Cost, SquaredError
from mep.energies.states import States
from mep.kernels import CoupledPhase, rounds_of

if TYPE_CHECKING:
    from mep.kernels.rounds import Rounds

__all__ = ["are_compiled", "compiled_rounds"]


def are_compiled(net: Wiring, cost: Cost | None, target: Tensor | None, beta: complex) -> bool:
    """Returns whether there are compiled rounds for such a net and cost, where there are kernels.

    Args:
        net: the wiring.
        cost: the cost, if there is one.
        target: prepared.
        beta: nudging strength.
    """
    squared = target is not None and type(cost) is SquaredError
    return squared and not isinstance(beta, complex) and _is_perceptron(net)


def compiled_rounds(at: States, target: Tensor, beta: float) -> Rounds | None:
    """Returns room in which states relax, or None where they do not lie as kernels need it.

    Args:
        at: the states to start from, of a net for which there are compiled rounds.
        target: prepared.
        beta: nudging strength.
    """
    net, free = at.net, at.free
    layers = [None, *(c.block.layer for c in net.interactions[1:])]
    weights = [None if layer is None else layer.weight.detach() for layer in layers]
    # Changes of activities have no use for a bias, and what comes from the input does not change.
    biased = [None if layer is None or free is not None else layer.bias for layer in layers]
    biases = [None if bias is None else bias.detach() for bias in biased]
    if free is not None:
        target = target - free.output
    phase = CoupledPhase(
        weights, biases, [unit.box for unit in net.units if unit.box], at.unknowns,
        {i for i in range(1, len(net.units) + 1) if at.idle(i)}, at.sent_up,
        [unit.offset for unit in net.units], target, beta,
    )  # fmt: skip
    return rounds_of(phase)


def _is_perceptron(net: Wiring) -> bool:
    """Whether ramps follow each other through plain weights, up to an output of any value."""
    chain = [*pairwise(range(len(net.units) + 1))]
    return (
        net.readout is None
        and [(c.source, c.target) for c in net.interactions] == chain
        and net.interactions[0].factor == 1
        and all(c.is_matrix for c in net.interactions[1:])
        and all(unit.box is not None for unit in net.units)
    )
