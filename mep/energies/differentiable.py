"""Equilibria that can be differentiated: backprop through time, and recurrent backprop."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from mep.couplings import Couplings
from mep.energies.equilibrium import forward_start, settled_states
from mep.energies.relaxation import Relaxation
from mep.energies.states import States
from mep.settling import FixedPoint

__all__ = ["differentiable_states"]


def differentiable_states(net: Couplings, x: Tensor, solver: FixedPoint, backward: str) -> States:
    """Returns the states of the free equilibrium, with a graph.

    Args:
        net: the couplings.
        x: input, ``(B, *in)``.
        solver: how they are settled, and how far.
        backward: ``"through time"`` keeps every round; ``"recurrent"`` keeps one, and solves
            ``v = dL/ds + J^T v`` for its gradient, ``J`` of one round at the equilibrium.

    Source: Almeida 1987, Pineda 1987; as a hook: Bai, Kolter & Koltun 2019.
    """
    if not all(unit.has_rest for unit in net.units):
        raise ValueError(
            "smooth units of the square potential have no rest in closed form, so that no round of "
            "relaxation can be differentiated: use potential='conjugate' or nn.Hardtanh(0, 1)"
        )
    if backward == "through time":
        return _through_time(net, x, solver)
    return _recurrent(net, x, solver)


def _through_time(net: Couplings, x: Tensor, solver: FixedPoint) -> States:
    at = forward_start(net, x)
    problem = Relaxation(at, None, None, 0.0, 1.0)
    for _ in range(solver.max_steps):
        at = problem.relax(at, solver.order)
        # Looked at with the graph on: the currents behind it are those of the next round.
        if solver.tol is None:
            continue
        if float(solver.measure(problem.residual(at)).detach()) <= solver.tol:
            break
    return at


def _recurrent(net: Couplings, x: Tensor, solver: FixedPoint) -> States:
    with torch.no_grad():
        settled = settled_states(net, x, solver).states
    problem = Relaxation(States(net, x, settled), None, None, 0.0, 1.0)

    def rounded() -> tuple[list[Tensor], Tensor]:
        """One round from the equilibrium: where it starts, and its end in a row."""
        start = [s.detach().requires_grad_() for s in settled]
        end = problem.relax(States(net, x, start), solver.order).states
        return start, torch.cat([s.flatten(1) for s in end], 1)

    start, reached = rounded()
    _, end = rounded()

    def solve(gradient: Tensor) -> Tensor:
        v, change = gradient, float("inf")
        for _ in range(solver.max_steps):
            pulled = torch.autograd.grad(
                reached, start, v, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            new = gradient + torch.cat([g.flatten(1) for g in pulled], 1)
            change, v = float((new - v).norm()), new
            if solver.tol is not None and change <= solver.tol * float(v.norm()):
                break
        else:
            if solver.tol is not None:
                warnings.warn(
                    f"recurrent backprop has not settled in {solver.max_steps} rounds (the last "
                    f"changed {change:.2g} of {float(v.norm()):.2g}): the net hardly contracts",
                    stacklevel=2,
                )
        return v

    end.register_hook(solve)
    parts = end.split([s[0].numel() for s in settled], 1)
    return States(net, x, [p.view_as(s) for p, s in zip(parts, settled, strict=True)])
