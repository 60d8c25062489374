"""Curvature of a task: the Fisher information of its data, from local signals at free states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mep.contrast import Settings, free_phase, free_sweeps, settings
from mep.contrast.mixed import full
from mep.curvature import Signal, diagonal_fisher
from mep.energies import Cost, cost_of

__all__ = ["Loader", "Sweeps", "check_fisher", "fisher_diagonal", "of_task", "widened"]

Loader = Iterable[tuple[Tensor, Tensor]]
Sweeps = Callable[[], Iterator[dict[int, list[Signal]]]]


def fisher_diagonal(
    model: nn.Module,
    loader: Loader,
    *,
    fisher: str = "true",
    samples: int | None = None,
    cost: str | Cost = "cross_entropy",
) -> dict[str, Tensor]:
    """Returns the diagonal Fisher information of a task's data, parameter by parameter.

    ``F = 1/N sum_n E[g_n^2]`` with ``g_n`` the gradient of one sample by itself: per-sample squares
    from local signals at the free equilibrium, where they are exact. The model is looked at in
    evaluation mode, and left as it was.

    Args:
        model: any model that ``mep.trace`` can read.
        loader: batches ``(x, target)``.
        fisher: ``"true"``: the expectation over targets that the model itself draws;
            ``"empirical"``: the given targets.
        samples: with ``"true"``, targets to draw for every input, >= 1; None takes the exact
            expectation, one backward sweep per output.
        cost: ``"cross_entropy"``, ``"mse"`` or a cost object.

    Returns:
        By name, tensors like the parameters; those that need no gradient are left out.

    Raises:
        TypeError, ValueError: if an argument or a batch does not fit, or there is no batch.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> found = fisher_diagonal(model, [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))])
    >>> {name: tuple(diagonal.shape) for name, diagonal in found.items()}
    {'0.weight': (2, 3), '0.bias': (2,)}

    Source: Kirkpatrick et al. 2017, eq. 3; Martens 2020, sec. 5 (true and empirical).
    """
    check_fisher("fisher_diagonal", fisher, samples)
    named = {id(p): (name, p) for name, p in model.named_parameters() if p.requires_grad}
    total = {key: widened(torch.zeros_like(p)) for key, (_, p) in named.items()}
    count = 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with full(device):
        for size, sweeps in of_task(model, loader, settings(cost=cost_of(cost)), fisher, samples):
            count += size
            for sweep in sweeps():
                for key in total.keys() & sweep.keys():
                    total[key].add_(diagonal_fisher(sweep[key]), alpha=size)
    return {name: total[key].div_(count).to(p.dtype) for key, (name, p) in named.items()}


def of_task(
    model: nn.Module, loader: Loader, how: Settings, fisher: str, samples: int | None
) -> Iterator[tuple[int, Sweeps]]:
    """Yields the size of every batch, and what sweeps over its signals.

    Raises:
        TypeError, ValueError: if a batch does not fit, or there is none.
    """
    empty = True
    with _evaluating(model), torch.no_grad():
        for x, target in loader:
            empty = False
            free = free_phase(model, x, target, how, feedback={})
            yield len(x), lambda free=free: free_sweeps(free, fisher, samples)
    if empty:
        raise ValueError("`loader` has no batches: curvature is taken from a task's data")


def widened(t: Tensor) -> Tensor:
    """Returns a tensor in which sums over many batches do not stall: of float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def check_fisher(name: str, fisher: str, samples: int | None) -> None:
    """Refuses options that ``free_sweeps`` would refuse only later.

    Raises:
        ValueError: naming the option.
    """
    if fisher not in ("true", "empirical"):
        raise ValueError(f"`{name}(fisher=...)` must be 'true' or 'empirical', got {fisher!r}")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int)):
        raise TypeError(f"`{name}(samples=...)` must be a whole number or None, got {samples!r}")
    if samples is not None and (samples < 1 or fisher != "true"):
        raise ValueError(
            f"`{name}(samples=...)` draws targets for fisher='true', at least 1: got {samples} "
            f"with fisher={fisher!r}"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
