"""From a model and a batch to a checked free phase."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mep.blocks import Chain
from mep.contrast.mixed import twin_of
from mep.contrast.seen import Seen, unchanged
from mep.contrast.settings import Settings
from mep.contrast.strength import strength_of
from mep.couplings import Coupled, Couplings
from mep.energies import Energy, Hopfield, PredictionError, Widened
from mep.kernels import rows
from mep.memory import phase
from mep.settling import TRANSPOSE

__all__ = ["all_finite", "chain_of", "check_input", "energy_of", "free_phase"]

# From so many tensors on, finding those that lie in a row takes less time than it saves.
_MANY = 16

_chains: WeakKeyDictionary[nn.Module, dict[tuple[str, str], tuple[list[Seen], Any]]]
_chains = WeakKeyDictionary()


def energy_of(model: nn.Module | None, energy: Energy | None = None) -> Energy:
    """Returns the energy that was given, or else the one that the model is made for."""
    if energy is not None:
        return energy
    return Hopfield() if isinstance(model, Coupled) else PredictionError()


def chain_of(
    model: nn.Module, gradient_method: str = "analytic", energy: Energy | None = None
) -> Any:
    """Returns what an energy sees of a model, its chain or its couplings.

    It is read once, and again whenever a module has been changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
    energy = energy_of(model, energy)
    known = _chains.setdefault(model, {})  # by the model itself, which it does not keep alive
    key = (type(energy).__name__, gradient_method)
    seen, chain = known.get(key, (None, None))
    # One look per module at every step: no walk through the tree, no new lists of names.
    if chain is None or seen is None or not unchanged(seen):
        chain = energy.read(model, gradient_method)
        # A model that is itself a block's module would be kept alive by its own entry.
        if not any(module is model for block in chain.blocks for module in block.modules):
            known[key] = [Seen(module) for module in model.modules()], chain
    return chain


def free_phase(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    how: Settings,
    feedback: Mapping[int, Tensor] | None = None,
) -> Any:
    """Checks a batch and runs its free phase.

    Args:
        model: the model.
        x: input, ``(B, *in)``.
        target: target as the cost takes it.
        how: the strategy.
        feedback: by the ``id`` of a weight, the matrix that carries errors down in its place;
            needed where the settler asks for one.

    Raises:
        TypeError, ValueError: if input or target do not fit the model and the cost. Parameters and
            buffers are as they were.
    """
    if feedback is None and how.settler.feedback != TRANSPOSE:
        raise ValueError(
            f"`feedback={how.settler.feedback!r}` keeps weights of its own, which live in an "
            "EPOptimizer: call its step(x=..., target=...), or use feedback='transpose' here"
        )
    chain, cost = chain_of(model, how.gradient_method, how.energy), how.cost
    how.energy.check(chain, how.settler)
    check_input(chain, x)
    twin = twin_of(model)
    if twin is not None:
        if feedback:
            raise ValueError(
                f"`feedback={how.settler.feedback!r}` keeps weights of its own, which autocast "
                "does not reach: convert the model instead, model.bfloat16()"
            )
        chain = chain_of(twin.model, how.gradient_method, how.energy)
        x, cost = twin.given(x), Widened(cost)
    with phase("mep: settle"):
        beta = strength_of(how.beta, lambda: 1.0)
        free = how.energy.free(chain, x, target, cost, how.settler, beta, feedback)
    free.twin = twin
    return free


def check_input(model: Chain | Couplings | nn.Module, x: Tensor) -> None:
    """Refuses an input that no block could take, naming the remedy.

    Raises:
        TypeError: not a tensor, or of another dtype than the parameters.
        ValueError: empty, on another device, or with NaN or infinite values.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be a Tensor, got {type(x).__name__}")
    if x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"`x` is empty (shape {tuple(x.shape)}); pass at least one sample")
    read = isinstance(model, (Chain, Couplings))
    parameter = model.parameter if read else next(model.parameters())
    if parameter.dtype == torch.float16:
        raise TypeError("float16 models are not supported: nudges underflow; use bfloat16")
    if x.device != parameter.device:
        raise ValueError(
            f"`x` is on {x.device} and the model on {parameter.device}; move one of them"
        )
    if not x.is_floating_point():
        _check_indices(model, x)
    elif x.dtype != parameter.dtype:
        raise TypeError(
            f"`x` has dtype {x.dtype} and the model {parameter.dtype}; pass x.to({parameter.dtype})"
        )
    elif not all_finite([x]):
        raise ValueError("`x` holds NaN or infinite values; clean the data first")


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if all values are finite.

    A sum of squares is finite only if all its terms are, and takes a tenth of the time of a look
    at every value; it may overflow before they do, and then every value is looked at.
    """
    every = list(tensors)
    for t in rows(every) if len(every) > _MANY else every:
        flat = t.view(-1) if t.is_contiguous() else t.reshape(-1)
        if not math.isfinite(float(torch.dot(flat, flat))) and not torch.isfinite(t).all():
            return False
    return True


def _check_indices(model: Chain | Couplings | nn.Module, x: Tensor) -> None:
    read = isinstance(model, (Chain, Couplings))
    first = nn.ModuleList(model.blocks[0].modules if read else [model])
    if not any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in first.modules()):
        raise TypeError(
            f"`x` has dtype {x.dtype}, but the model does not begin with an embedding; pass "
            "x.float()"
        )
