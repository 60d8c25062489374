"""The gradients of one step, on their way from the contrast to the rules."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mep.blocks import give
from mep.contrast.phases import all_finite
from mep.curvature import Factors, Signal, finite_products
from mep.memory import label
from mep.updates import Gradient

__all__ = ["Gradients"]


class Gradients:
    """Collects signals: as tensors, or as factors for those rules that take them.

    Args:
        factored: ids of the parameters whose gradients stay factors where they are outer products.
        folded: the same, but only where the gradient would have to be formed otherwise.

    Attributes:
        formed: whether the gradient of some matrix or kernel has been formed.
    """

    def __init__(self, factored: Collection[int] = (), folded: Collection[int] = ()) -> None:
        self._factored, self._folded = factored, folded
        self._found: dict[int, Gradient] = {}  # by id: hashing a tensor is slow
        self.formed = False  # kept, for it is asked for after every one of thousands of blocks

    def collect(self, signal: Signal) -> None:
        """Adds a signal (the sink of a contrast)."""
        key = id(signal.parameter)
        known = self._found.get(key)
        if self._as_factors(key, signal) and not isinstance(known, Tensor):
            self._found[key] = Factors([*(known.signals if known else ()), signal])
        else:
            gradient = label(signal.form(), "gradients")
            self.formed |= gradient.dim() > 1
            self._found[key] = gradient if known is None else _sum(known, gradient)

    def _as_factors(self, key: int, signal: Signal) -> bool:
        if signal.rows is None:
            return False
        return key in self._factored or (key in self._folded and not signal.formed)

    def put(self, parameter: Tensor, gradient: Tensor) -> None:
        """Sets a parameter's gradient."""
        self.formed |= gradient.dim() > 1
        self._found[id(parameter)] = gradient

    def of(self, parameter: Tensor) -> Gradient | None:
        """Returns a parameter's gradient, if it has one."""
        return self._found.get(id(parameter))

    def among(self, parameters: list[Tensor]) -> list[Tensor]:
        """Returns those of the parameters that have a gradient."""
        return [p for p in parameters if id(p) in self._found]

    @property
    def factored(self) -> bool:
        """True if some gradients are factors."""
        return any(isinstance(g, Factors) for g in self._found.values())

    def finite(self) -> bool:
        """True if all are: sums over a batch may overflow where every residual was finite."""
        tensors = [g for g in self._found.values() if isinstance(g, Tensor)]
        factors = [g for g in self._found.values() if isinstance(g, Factors)]
        return all_finite(tensors) and (not factors or finite_products(factors))

    def release(self) -> None:
        """Gives the memory back: nobody reads these gradients any more."""
        for g in self._found.values():
            if isinstance(g, Tensor):
                give(g)
        self._found.clear()
        self.formed = False

    def clip(self, limit: float) -> None:
        """Scales all by one factor, so that their common norm is at most ``limit``."""
        whole = [g if isinstance(g, Tensor) else g.dense() for g in self._found.values()]
        norm = float(torch.nn.utils.get_total_norm(whole))
        if norm > limit:
            factor = limit / norm
            for key, g in self._found.items():
                # Out of place: it may be the user's own `.grad`.
                self._found[key] = g * factor if isinstance(g, Tensor) else g.scaled(factor)


def _sum(known: Gradient, gradient: Tensor) -> Tensor:
    return known.add_(gradient) if isinstance(known, Tensor) else known.dense().add_(gradient)
