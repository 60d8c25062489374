"""Presets: plain functions that only compose public parts.

Each takes parameters (or groups) and the model and returns an ``EPOptimizer``. Parameters given as
they are get the depth rule of ``mep.param_groups``: hidden layers step by ``lr / L``. What a preset
fixes can be had otherwise by writing its few lines out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mep.constraints import SpectralNorm
from mep.contrast import AutoBeta, centered, one_sided
from mep.energies import Cost
from mep.optim import EPOptimizer, param_groups
from mep.settling import Sweep
from mep.updates import Dion, Muon, Natural, Normalised, Route

__all__ = ["local_ep", "muon_backprop", "natural_ep", "sdmep", "smep", "smep_fast"]

LARGE = 64 * 1024
"""Entries from which on ``sdmep`` calls a matrix large: below, Dion saves nothing."""


def smep(
    params: Iterable[Any],
    *,
    model: nn.Module,
    lr: float = 0.01,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    gamma: float | None = None,
    cost: str | Cost = "cross_entropy",
    beta: float | str | AutoBeta = "auto",
) -> EPOptimizer:
    """Spectral Muon EP: Muon, a spectral bound, and settling to 1e-4 with a centered contrast.

    Args:
        params: parameters of the model, or groups.
        model: the model.
        lr: learning rate of the first and last block, >= 0; hidden ones step by ``lr / L``.
        momentum: in [0, 1).
        weight_decay: decoupled for matrices, >= 0.
        gamma: bound on every weight's spectral norm, > 0; None for the larger of 1 and what the
            weight has at the start.
        cost: ``"cross_entropy"``, ``"mse"`` or a cost object.
        beta: nudging strength: ``"auto"``, a number > 0 or ``mep.AutoBeta(c)``.

    Returns:
        The optimizer.

    Raises:
        TypeError, ValueError: if an argument does not fit.

    >>> from mep.models import deep_mlp
    >>> model = deep_mlp(5)
    >>> smep(model.parameters(), model=model).rule.matrix
    Muon(steps=5, coefficients='standard', scale='original', ns_dtype=torch.bfloat16)

    Source: Jordan et al. 2024 (Muon); Miyato et al. 2018 (spectral bound).
    """
    return EPOptimizer(
        _with_depth_rule(params, model, lr), model=model, lr=lr, momentum=momentum,
        weight_decay=weight_decay, nesterov=momentum > 0, update=Route(Muon()),
        constraint=SpectralNorm(gamma), settler=Sweep(3, tol=1e-4), stencil=centered, cost=cost,
        beta=beta,
    )  # fmt: skip


def smep_fast(
    params: Iterable[Any],
    *,
    model: nn.Module,
    lr: float = 0.01,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    gamma: float | None = None,
    cost: str | Cost = "cross_entropy",
    beta: float | str | AutoBeta = "auto",
) -> EPOptimizer:
    """``smep`` with one sweep and a one-sided contrast, at a finite nudge: never the limit.

    Args:
        params, model, lr, momentum, weight_decay, gamma, cost, beta: as for ``smep``.

    Returns:
        The optimizer.

    >>> from mep.models import deep_mlp
    >>> model = deep_mlp(5)
    >>> smep_fast(model.parameters(), model=model).how.settler.max_sweeps
    1
    """
    return EPOptimizer(
        _with_depth_rule(params, model, lr), model=model, lr=lr, momentum=momentum,
        weight_decay=weight_decay, nesterov=momentum > 0, update=Route(Muon()),
        constraint=SpectralNorm(gamma), settler=Sweep(1), stencil=one_sided, cost=cost, beta=beta,
    )  # fmt: skip


def sdmep(
    params: Iterable[Any],
    *,
    model: nn.Module,
    lr: float = 0.01,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    gamma: float | None = None,
    rank_fraction: float = 0.25,
    large: int = LARGE,
    cost: str | Cost = "cross_entropy",
    beta: float | str | AutoBeta = "auto",
) -> EPOptimizer:
    """Spectral Dion-Muon EP: Dion for large matrices, Muon for the others, and a spectral bound.

    Args:
        params, model, lr, momentum, weight_decay, gamma, cost, beta: as for ``smep``.
        rank_fraction: of Dion, in (0, 1].
        large: entries from which on a matrix is large, >= 0.

    Returns:
        The optimizer.

    >>> from mep.models import deep_mlp
    >>> model = deep_mlp(5)
    >>> sdmep(model.parameters(), model=model).rule.matrix.matrix
    Dion(rank_fraction=0.25)

    Source: Ahn et al. 2025 (Dion).
    """
    matrices = Route(Dion(rank_fraction), Muon(), at_least=large)
    return EPOptimizer(
        _with_depth_rule(params, model, lr), model=model, lr=lr, momentum=momentum,
        weight_decay=weight_decay, update=Route(matrices),
        constraint=SpectralNorm(gamma), settler=Sweep(1), stencil=one_sided, cost=cost, beta=beta,
    )  # fmt: skip


def local_ep(
    params: Iterable[Any],
    *,
    model: nn.Module,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    gamma: float | None = None,
    feedback: str = "transpose",
    cost: str | Cost = "cross_entropy",
    beta: float | str | AutoBeta = "auto",
) -> EPOptimizer:
    """Local EP: every block steps during the nudged sweep, by its own signal and nothing else.

    The step is normalised by the norm of the parameter's own gradient; no gradient outlives its
    block and no norm is taken over more than one parameter.

    Args:
        params, model, lr, momentum, cost, beta: as for ``smep``.
        weight_decay: decoupled, >= 0; Kolen-Pollack feedback needs some.
        gamma: bound on every weight's spectral norm, > 0; None for no bound.
        feedback: ``"transpose"``, or without weight transport ``"random"`` or
            ``"kolen-pollack"`` (see ``mep.Sweep``).

    Returns:
        The optimizer.

    >>> from mep.models import deep_mlp
    >>> model = deep_mlp(5)
    >>> local_ep(model.parameters(), model=model).blockwise
    True
    """
    return EPOptimizer(
        _with_depth_rule(params, model, lr), model=model, lr=lr, momentum=momentum,
        weight_decay=weight_decay, update=Normalised(), blockwise=True,
        constraint=None if gamma is None else SpectralNorm(gamma),
        settler=Sweep(1, feedback=feedback), stencil=one_sided, cost=cost, beta=beta,
    )  # fmt: skip


def natural_ep(
    params: Iterable[Any],
    *,
    model: nn.Module,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    damping: float = 0.3,
    fisher: str = "empirical",
    gamma: float | None = None,
    cost: str | Cost = "cross_entropy",
    beta: float | str | AutoBeta = "auto",
) -> EPOptimizer:
    """Natural EP: gradients preconditioned by Kronecker factors of EP's own signals.

    Args:
        params, model, lr, momentum, weight_decay, cost, beta: as for ``smep``.
        damping: of ``mep.Natural``, relative, >= 0.
        fisher: ``"empirical"`` or ``"true"`` (see ``mep.Natural``).
        gamma: bound on every weight's spectral norm, > 0; None for no bound.

    Returns:
        The optimizer.

    >>> from mep.models import deep_mlp
    >>> model = deep_mlp(5)
    >>> natural_ep(model.parameters(), model=model).rule.matrix.damping
    0.3

    Source: Martens & Grosse 2015.
    """
    return EPOptimizer(
        _with_depth_rule(params, model, lr), model=model, lr=lr, momentum=momentum,
        weight_decay=weight_decay, update=Route(Natural(damping=damping, fisher=fisher)),
        constraint=None if gamma is None else SpectralNorm(gamma), stencil=one_sided, cost=cost,
        beta=beta,
    )  # fmt: skip


def muon_backprop(
    params: Iterable[Any],
    *,
    lr: float = 0.01,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    gamma: float | None = None,
) -> EPOptimizer:
    """The baseline: the rule and the bound of ``smep`` on gradients of ``loss.backward()``.

    Args:
        params: parameters, or groups (``mep.param_groups(model, lr)`` has the depth rule).
        lr, momentum, weight_decay, gamma: as for ``smep``.

    Returns:
        The optimizer; it needs no model.

    >>> import torch
    >>> layer = nn.Linear(3, 2)
    >>> opt = muon_backprop(layer.parameters())
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    """
    return EPOptimizer(
        params, mode="backprop", lr=lr, momentum=momentum, weight_decay=weight_decay,
        nesterov=momentum > 0, update=Route(Muon()), constraint=SpectralNorm(gamma),
    )  # fmt: skip


def _with_depth_rule(params: Iterable[Any], model: nn.Module, lr: float) -> list[Any]:
    """Gives bare parameters the depth rule; groups are the caller's own."""
    given = [p[1] if isinstance(p, tuple) else p for p in params]  # named parameters, too
    if not all(isinstance(p, nn.Parameter) for p in given):
        return given
    kept, groups = {id(p) for p in given}, param_groups(model, lr)
    own = {id(p) for group in groups for p in group["params"]}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) in kept]
    foreign = {"params": [p for p in given if id(p) not in own]}  # for the optimizer to refuse
    return [group for group in (*groups, foreign) if group["params"]]
