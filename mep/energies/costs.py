"""Costs C(s_L, y): what the nudge pulls the output towards. Baselines use the very same objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mep.kernels import cross_entropy

__all__ = ["Cost", "CrossEntropy", "SquaredError", "Widened", "cost_of"]


class Cost(ABC):
    """A cost per sample, ``C(s, y)``, and its exact gradient in the output."""

    name: str
    curvature: float = 0.0  # what is known of the second derivative, in every direction

    @abstractmethod
    def prepare(self, target: Tensor, output: Tensor) -> Tensor:
        """Checks a target against an output of shape ``(B, ...)`` and brings it into form.

        Raises:
            TypeError: wrong kind of target.
            ValueError: wrong shape, device or range.
        """

    @abstractmethod
    def value(self, s: Tensor, y: Tensor) -> Tensor:
        """Returns the cost per sample, shape ``(B,)``, for a prepared target."""

    @abstractmethod
    def gradient(self, s: Tensor, y: Tensor) -> Tensor:
        """Returns ``dC/ds`` with the shape of ``s``, for a prepared target."""

    def both(self, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``value`` and ``gradient``: what they have in common is computed once."""
        return self.value(s, y), self.gradient(s, y)

    def directions(self, s: Tensor) -> Iterator[Tensor]:
        """Yields ``v_k`` of the shape of ``s`` with ``sum_k v_k v_k^T = E[dC/ds dC/ds^T]``.

        The expectation is over targets that the model itself draws, of probability ``exp(-C)``.

        Raises:
            ValueError: if the cost has no such expectation in closed form.
        """
        raise ValueError(
            f"cost '{self.name}' states no exact Fisher information: use fisher='empirical'"
        )

    def drawn(self, s: Tensor) -> Tensor:
        """Returns ``dC/ds`` at a target that the model itself draws, of probability ``exp(-C)``.

        Raises:
            ValueError: if the cost does not say how.
        """
        raise ValueError(f"cost '{self.name}' draws no targets: use fisher='empirical'")

    def mean(self, s: Tensor, target: Tensor) -> Tensor:
        """Returns the batch mean as a scalar: the loss that a backprop baseline minimises."""
        return self.value(s, self.prepare(target, s)).mean()


@dataclass(frozen=True)
class CrossEntropy(Cost):
    """``C = -log softmax(s)_y``, averaged over positions for ``(B, C, ...)`` outputs.

    Targets are class indices ``(B, ...)`` in ``[0, C)``, of any integer type.

    Args:
        classes: the outputs that take part, where others belong to other tasks; targets are among
            them. None for all.

    Raises:
        ValueError: if there are fewer than two classes, or one comes twice.

    >>> CrossEntropy().mean(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)

    Source: the same function as ``torch.nn.functional.cross_entropy``.
    """

    name: ClassVar[str] = "cross_entropy"
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        chosen = self.classes
        if chosen is not None and (len(chosen) < 2 or len({*chosen}) < len(chosen)):
            raise ValueError(
                f"`CrossEntropy(classes=...)` must be two or more different classes, got {chosen}"
            )

    def prepare(self, target: Tensor, output: Tensor) -> Tensor:
        _same_device(target, output)
        if output.dim() < 2:
            raise ValueError(
                f"cost 'cross_entropy' needs outputs (B, classes, ...), got {tuple(output.shape)}"
            )
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(
                f"`target` must hold class indices (an integer type) for cost 'cross_entropy', got "
                f"{target.dtype}; pass target.long(), or cost='mse' for real-valued targets"
            )
        expected = output.shape[:1] + output.shape[2:]
        if target.shape != expected:
            raise ValueError(
                f"`target` must have shape {tuple(expected)} for an output of shape "
                f"{tuple(output.shape)}, got {tuple(target.shape)}"
            )
        _check_classes(target, output.shape[1])
        return target.long() if self.classes is None else self._places(target, output)

    def _places(self, target: Tensor, output: Tensor) -> Tensor:
        """Returns the targets' places among the classes that take part."""
        assert self.classes is not None
        if max(self.classes) >= output.shape[1] or min(self.classes) < 0:
            raise ValueError(
                f"`CrossEntropy(classes={self.classes})` needs an output for each, got "
                f"{output.shape[1]} outputs"
            )
        places = torch.full((output.shape[1],), -1, device=target.device)
        places[list(self.classes)] = torch.arange(len(self.classes), device=target.device)
        found = places[target.long()]
        if bool((found < 0).any()):
            raise ValueError(f"`target` must hold classes among {self.classes}, got others")
        return found

    def _taking_part(self, s: Tensor) -> Tensor:
        return s if self.classes is None else s[:, list(self.classes)]

    def _spread(self, part: Tensor, s: Tensor) -> Tensor:
        """Returns a gradient in all outputs: 0 for those that take no part."""
        if self.classes is None:
            return part
        return torch.zeros_like(s).index_copy_(1, torch.tensor(self.classes).to(s.device), part)

    def value(self, s: Tensor, y: Tensor) -> Tensor:
        per_position = F.cross_entropy(self._taking_part(s), y, reduction="none")
        return per_position if s.dim() == 2 else per_position.flatten(1).mean(1)

    def directions(self, s: Tensor) -> Iterator[Tensor]:
        if s.dim() > 2:
            raise ValueError(
                "the exact Fisher information of cost 'cross_entropy' takes outputs (B, classes), "
                f"got {tuple(s.shape)}; use fisher='empirical'"
            )
        p = torch.softmax(self._taking_part(s), 1)
        for k in range(p.shape[1]):
            missed = torch.zeros_like(p)
            missed[:, k] = 1
            yield self._spread(p[:, k : k + 1].sqrt() * (p - missed), s)

    def drawn(self, s: Tensor) -> Tensor:
        classes = torch.softmax(self._taking_part(s), 1).movedim(1, -1).flatten(0, -2)
        y = torch.multinomial(classes, 1).view(s.shape[:1] + s.shape[2:])
        return self.gradient(s, y)

    def both(self, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        known = cross_entropy(s, y) if self.classes is None else None
        return known or super().both(s, y)

    def gradient(self, s: Tensor, y: Tensor) -> Tensor:
        p = _softmax(self._taking_part(s))
        index = y.unsqueeze(1)
        # p_y - 1 loses all its digits for well-classified samples; the other classes' sum does not.
        p = p.scatter(1, index, 0.0)
        p.scatter_(1, index, -p.sum(1, keepdim=True))
        return self._spread(p if s.dim() == 2 else p / y[0].numel(), s)


@dataclass(frozen=True)
class SquaredError(Cost):
    """``C = 1/2 ||s - t||^2`` summed over units; integer labels are one-hot encoded.

    >>> SquaredError().mean(torch.zeros(1, 3), torch.tensor([1]))
    tensor(0.5000)

    Source: Scellier & Bengio 2017.
    """

    name: ClassVar[str] = "mse"
    curvature: ClassVar[float] = 1.0

    def prepare(self, target: Tensor, output: Tensor) -> Tensor:
        _same_device(target, output)
        if output.dim() < 2:
            raise ValueError(f"cost 'mse' needs outputs (B, units, ...), got {tuple(output.shape)}")
        if target.is_complex() or target.dtype == torch.bool:
            raise TypeError(
                "`target` must hold real values or integer labels for cost 'mse', got "
                f"{target.dtype}; pass target.to({output.dtype})"
            )
        if not target.is_floating_point() and target.shape == output.shape[:1] + output.shape[2:]:
            _check_classes(target, output.shape[1])
            one_hot = F.one_hot(target.long(), output.shape[1]).movedim(-1, 1)
            return one_hot.to(output.dtype)
        if target.shape != output.shape:
            raise ValueError(
                f"`target` must have the output's shape {tuple(output.shape)} or be integer labels "
                f"of shape {tuple(output.shape[:1] + output.shape[2:])}, got {target.dtype} of "
                f"shape {tuple(target.shape)}"
            )
        if not torch.isfinite(target).all():
            raise ValueError("`target` holds NaN or infinite values; clean the data first")
        return target.to(output.dtype)

    def value(self, s: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (s - y).flatten(1).square().sum(1)

    def directions(self, s: Tensor) -> Iterator[Tensor]:
        for k in range(s[0].numel()):
            unit = torch.zeros_like(s).flatten(1)
            unit[:, k] = 1
            yield unit.view_as(s)

    def drawn(self, s: Tensor) -> Tensor:
        return torch.randn_like(s)

    def gradient(self, s: Tensor, y: Tensor) -> Tensor:
        return s - y


class Widened(Cost):
    """A cost of states in few digits, taken in float32; its gradients are in the states' type.

    Args:
        inner: the cost.

    >>> s = torch.tensor([[1.0, 300.0]], dtype=torch.bfloat16)
    >>> cost = Widened(SquaredError())
    >>> y = cost.prepare(torch.tensor([[1.0, 301.0]]), s)
    >>> cost.value(s, y)
    tensor([0.5000])
    """

    def __init__(self, inner: Cost) -> None:
        self.inner = inner
        self.name, self.curvature = inner.name, inner.curvature

    def prepare(self, target: Tensor, output: Tensor) -> Tensor:
        return self.inner.prepare(target, output.float())

    def value(self, s: Tensor, y: Tensor) -> Tensor:
        return self.inner.value(s.float(), y)

    def gradient(self, s: Tensor, y: Tensor) -> Tensor:
        return self.inner.gradient(s.float(), y).to(s.dtype)

    def both(self, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = self.inner.both(s.float(), y)
        return value, gradient.to(s.dtype)

    def directions(self, s: Tensor) -> Iterator[Tensor]:
        return (v.to(s.dtype) for v in self.inner.directions(s.float()))

    def drawn(self, s: Tensor) -> Tensor:
        return self.inner.drawn(s.float()).to(s.dtype)


def _softmax(s: Tensor) -> Tensor:
    if not s.is_complex():
        return torch.softmax(s, 1)
    e = torch.exp(s - s.real.amax(1, keepdim=True))  # torch's own takes real values only
    return e / e.sum(1, keepdim=True)


def _same_device(target: Tensor, output: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"`target` must be a Tensor, got {type(target).__name__}")
    if target.device != output.device:
        raise ValueError(
            f"`target` is on {target.device} and the output on {output.device}; move the target"
        )


def _check_classes(target: Tensor, classes: int) -> None:
    low, high = torch.aminmax(target)
    if int(low) < 0 or int(high) >= classes:
        raise ValueError(
            f"`target` must hold classes in [0, {classes}), got values from {int(low)} to "
            f"{int(high)}"
        )


_COSTS: dict[str, Cost] = {cost.name: cost for cost in (CrossEntropy(), SquaredError())}


def cost_of(cost: str | Cost) -> Cost:
    """Returns a cost by name, or the object itself.

    Raises:
        ValueError: unknown name.

    >>> cost_of("mse").name
    'mse'
    """
    if isinstance(cost, Cost):
        return cost
    if not isinstance(cost, str) or cost not in _COSTS:
        raise ValueError(f"`cost` must be one of {sorted(_COSTS)} or a mep Cost, got {cost!r}")
    return _COSTS[cost]
