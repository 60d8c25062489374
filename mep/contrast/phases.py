"""From a model and a batch to a checked free phase."""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mep.blocks import Chain, trace
from mep.contrast.settings import Settings
from mep.energies import FreePhase

__all__ = ["chain_of", "check_input", "free_phase"]

_chains: WeakKeyDictionary[nn.Module, dict[str, tuple[tuple, Chain]]]
_chains = WeakKeyDictionary()


def chain_of(model: nn.Module, gradient_method: str = "analytic") -> Chain:
    """Returns the model's chain, traced once and again whenever a module has been changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
    signature = tuple(map(_signature, model.modules()))
    known = _chains.setdefault(model, {})
    if known.get(gradient_method, ((), None))[0] != signature:
        known[gradient_method] = (signature, trace(model, gradient_method=gradient_method))
    return known[gradient_method][1]


def _signature(module: nn.Module) -> tuple:
    """What a chain has frozen of a module: itself, its mode and numbers, its hooks."""
    plain = [v for v in vars(module).values() if type(v) in (bool, int, float, str)]
    return id(module), len(module._forward_hooks), len(module._forward_pre_hooks), *plain


def free_phase(model: nn.Module, x: Tensor, target: Tensor, how: Settings) -> FreePhase:
    """Checks a batch and runs its free phase.

    Raises:
        TypeError, ValueError: if input or target do not fit the model and the cost. Parameters and
            buffers are as they were.
    """
    chain = chain_of(model, how.gradient_method)
    check_input(chain, x)
    return FreePhase(chain, x, target, how.cost)


def check_input(model: Chain | nn.Module, x: Tensor) -> None:
    """Refuses an input that no block could take, naming the remedy.

    Raises:
        TypeError: not a tensor, or of another dtype than the parameters.
        ValueError: empty, on another device, or with NaN or infinite values.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be a Tensor, got {type(x).__name__}")
    if x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"`x` is empty (shape {tuple(x.shape)}); pass at least one sample")
    parameter = next(model.parameters())
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
    # The sum first: it is finite only if all values are, and takes a tenth of the time.
    elif not math.isfinite(float(x.sum())) and not torch.isfinite(x).all():
        raise ValueError("`x` holds NaN or infinite values; clean the data first")


def _check_indices(model: Chain | nn.Module, x: Tensor) -> None:
    first = nn.ModuleList(model.blocks[0].modules if isinstance(model, Chain) else [model])
    if not any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in first.modules()):
        raise TypeError(
            f"`x` has dtype {x.dtype}, but the model does not begin with an embedding; pass "
            "x.float()"
        )
