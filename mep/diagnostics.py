"""Is this really Equilibrium Propagation? Regime, residuals and agreement with backprop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mep.blocks import Block
from mep.contrast import (
    AutoBeta,
    Settings,
    Stencil,
    chain_of,
    contrast,
    energy_of,
    free_phase,
    one_sided,
    settings,
)
from mep.contrast.mixed import mixed
from mep.curvature import Signal
from mep.energies import Cost, Energy
from mep.settling import CONVERGED, LIMIT, Settled, Solver, settle

__all__ = ["Alignment", "Diagnosis", "diagnose"]

# Below this share of the true output displacement, rounding has eaten the nudge.
TRUE_DISPLACEMENT = 0.9


@dataclass(frozen=True)
class Alignment:
    """One block's gradient beside backprop's.

    Attributes:
        name: the block.
        cosine: between the two, in [-1, 1]; 0 if one of them vanishes.
        norm_ratio: estimate over backprop; 0 if backprop's vanishes.
    """

    name: str
    cosine: float
    norm_ratio: float


@dataclass(frozen=True)
class Diagnosis:
    """The report of ``diagnose``.

    Attributes:
        regime: ``"limit"``, ``"finite nudge"`` or ``"not settled"``.
        median: median residual.
        q95: 95 % quantile of the residual.
        aggregate: residual of the batch as a whole.
        sweeps: steps or sweeps taken.
        beta: nudging strength.
        c: relative nudging strength ``beta kappa``.
        displacement: relative output displacement, ``median ||d_L|| / ||s_L||``.
        displacement_ratio: output displacement over that of a float64 replay, the 5 % quantile
            over samples; 1 means that rounding has not touched the nudge.
        cosine: of the whole gradient to backprop's.
        layers: per block, from input to output.
        layers_with_gradient: number of blocks whose estimate is not zero.
        dtype: of the run.
    """

    regime: str
    median: float
    q95: float
    aggregate: float
    sweeps: int
    beta: float
    c: float
    displacement: float
    displacement_ratio: float
    cosine: float
    layers: tuple[Alignment, ...]
    layers_with_gradient: int
    dtype: str


def diagnose(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    cost: str | Cost = "cross_entropy",
    beta: float | str | AutoBeta = "auto",
    settler: Solver | None = None,
    stencil: Stencil = one_sided,
    energy: Energy | None = None,
    gradient_method: str = "analytic",
) -> Diagnosis:
    """Reports the regime of a run on one batch, without changing model, gradients or random state.

    ``limit`` if the contrast is taken at the free states, or if the output displacement in the
    run's dtype is below 0.9 of a float64 replay of the same batch; ``not settled`` if the median
    residual is above the settler's tolerance; else ``finite nudge``.

    Args:
        model: any model that ``mep.trace`` can read, or one with ``couplings()``, in the mode
            (train or eval) to be diagnosed.
        x: input, ``(B, *in)``.
        target: what the cost takes.
        cost: name or object.
        beta: nudging strength: ``"auto"``, a number > 0, or ``mep.AutoBeta(c)``.
        settler: ``mep.Sweep()`` by default, ``mep.FixedPoint()`` for ``mep.Hopfield()``.
        stencil: ``mep.one_sided`` by default.
        energy: ``mep.PredictionError(output=...)`` or ``mep.Hopfield()``; by the model.
        gradient_method: ``"analytic"`` or ``"autograd"``.

    Returns:
        The report.

    Raises:
        TypeError, ValueError: if an argument does not fit.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    >>> x, y = torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    >>> diagnose(model, x, y).regime
    'finite nudge'

    Source: the regimes are this library's own; see the README.
    """
    with torch.random.fork_rng():  # a stencil may draw, too
        how = settings(
            cost=cost, beta=beta, settler=settler, stencil=stencil,
            energy=energy_of(model, energy), gradient_method=gradient_method,
        )  # fmt: skip
    twin = copy.deepcopy(model)  # running statistics of the model itself stay as they are
    chain = chain_of(twin, how.gradient_method, how.energy)
    with torch.random.fork_rng(), mixed(x):
        torch.manual_seed(0)
        free = free_phase(twin, x, target, how)
        estimated: dict[nn.Parameter, Tensor] = {}
        found = contrast(free, how, lambda signal: _add(estimated, signal))
        nudged = _settle(free, how, found.beta)
        torch.manual_seed(0)  # every pass meets the same dropout masks
        backprop = _backprop(chain, x, target, how)
        torch.manual_seed(0)
        wide = x.double() if x.is_floating_point() else x
        replay = _settle(free_phase(twin.double(), wide, target, how), how, found.beta)
    ratio = _displacement_ratio(nudged, replay)
    vectors = [(_vector(block, estimated), _vector(block, backprop)) for block in chain.blocks]
    layers = [_alignment(b.name, *pair) for b, pair in zip(chain.blocks, vectors, strict=True)]
    ours, theirs = (torch.cat(column) for column in zip(*vectors, strict=True))
    return Diagnosis(
        regime=_regime(found.status, ratio),
        median=found.median,
        q95=found.q95,
        aggregate=found.aggregate,
        sweeps=found.sweeps,
        beta=found.beta,
        c=found.beta * free.gain,
        displacement=_relative_displacement(nudged),
        displacement_ratio=ratio,
        cosine=_alignment("", ours, theirs).cosine,
        layers=tuple(layers),
        layers_with_gradient=sum(bool(vector.any()) for vector, _ in vectors),
        dtype=str(nudged.states[-1].dtype).removeprefix("torch."),
    )


def _add(gradients: dict[nn.Parameter, Tensor], signal: Signal) -> None:
    known, gradient = gradients.get(signal.parameter), signal.form()
    gradients[signal.parameter] = gradient if known is None else known + gradient


@torch.no_grad()
def _settle(free: Any, how: Settings, beta: float) -> Settled:
    return settle(how.energy.nudged(free, beta), how.settler)


def _backprop(chain: Any, x: Tensor, target: Tensor, how: Settings) -> dict[nn.Parameter, Tensor]:
    """The gradient by autograd through the free equilibrium."""
    wanted = [p for p in chain.parameters() if p.requires_grad]
    with torch.enable_grad():
        output = how.energy.free_output(chain, x)
        if not wanted:
            return {}
        found = torch.autograd.grad(how.cost.mean(output, target), wanted, allow_unused=True)
    return {p: g for p, g in zip(wanted, found, strict=True) if g is not None}


def _vector(block: Block, gradients: dict[nn.Parameter, Tensor]) -> Tensor:
    """All gradients of one block in a row, in double; zeros where there is none."""
    parts = [gradients.get(p, torch.zeros_like(p)).detach() for p in block.parameters()]
    return torch.cat([torch.zeros(0), *(part.flatten().double().cpu() for part in parts)])


def _alignment(name: str, ours: Tensor, theirs: Tensor) -> Alignment:
    a, b = float(ours.norm()), float(theirs.norm())
    cosine = float(ours @ theirs) / (a * b) if a > 0 and b > 0 else 0.0
    return Alignment(name, cosine, a / b if b > 0 else 0.0)


def _displacement_ratio(nudged: Settled, replay: Settled) -> float:
    """5 % quantile of ``<d, d64> / ||d64||^2``: a projection, so that noise cannot fill in."""
    d = nudged.displacements[-1].double().flatten(1)
    true = replay.displacements[-1].flatten(1)
    size = true.square().sum(1)
    ratio = (d * true).sum(1)[size > 0] / size[size > 0]
    return float(ratio.quantile(0.05)) if len(ratio) else 1.0


def _relative_displacement(nudged: Settled) -> float:
    d, s = nudged.displacements[-1].flatten(1), nudged.states[-1].flatten(1)
    return float((d.norm(dim=1) / s.norm(dim=1)).median())


def _regime(status: str, ratio: float) -> str:
    if status == LIMIT or ratio < TRUE_DISPLACEMENT:
        return "limit"
    return "finite nudge" if status == CONVERGED else "not settled"
