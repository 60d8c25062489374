"""Compressed gradients, and error feedback that makes up for what they lose."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mep.updates.rule import Role, Rule
from mep.updates.sgd import SGD

__all__ = ["Compressing", "ErrorFeedback", "Sign", "TopK"]


class Compressing(Rule):
    """``theta <- rule(theta, C(g))``: an inner rule steps with a compressed gradient.

    A compression is one method. It sees one parameter's gradient at a time.

    Attributes:
        rule: the inner rule.

    Raises:
        TypeError: if the inner rule is none, is a route, observes signals or compresses itself.

    >>> @dataclass(frozen=True)
    ... class Half(Compressing):
    ...     rule: Rule = field(default_factory=SGD)
    ...     def compress(self, gradient):
    ...         return gradient.bfloat16().to(gradient)
    >>> Half().compress(torch.tensor([1.001]))
    tensor([1.])

    Source: Karimireddy et al. 2019, sec. 2 (compressions).
    """

    rule: Rule

    def __post_init__(self) -> None:
        rule, name = self.rule, type(self).__name__
        if not isinstance(rule, Rule):
            raise TypeError(
                f"`{name}(rule=...)` must be an update rule such as mep.SGD(), got {rule!r}"
            )
        compresses = isinstance(rule, (Compressing, ErrorFeedback))
        if compresses or rule.observes or rule.parts() != [rule]:
            raise TypeError(
                f"`{name}(rule=...)` must be one rule that steps with the gradient alone, such as "
                f"mep.SGD() or mep.Muon(), got {rule!r}; a route goes outside: "
                f"mep.Route({name}(...), ...)"
            )

    @abstractmethod
    def compress(self, gradient: Tensor) -> Tensor:
        """Returns the compressed gradient: a new tensor of the same shape."""

    def check(self, group: dict[str, Any]) -> None:
        self.rule.check(group)

    def assign(self, parameter: Tensor, role: Role) -> tuple[Rule, float] | None:
        found = self.rule.assign(parameter, role)
        return found and (self, found[1])

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        self.rule.step(parameters, [self.compress(g) for g in gradients], states, group)


@dataclass(frozen=True)
class TopK(Compressing):
    """Keeps the largest entries by size of each gradient, at least one, and zeroes the others.

    Group numbers: those of the inner rule.

    Args:
        fraction: of a parameter's entries, in (0, 1].
        rule: what steps with the rest.

    Raises:
        TypeError, ValueError: if an option does not fit.

    >>> TopK(0.5).compress(torch.tensor([1.0, -4.0, 3.0, 2.0]))
    tensor([ 0., -4., 3., 0.])

    Source: Stich et al. 2018, definition 2.1 (``top_k``).
    """

    fraction: float
    rule: Rule = field(default_factory=SGD)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"`TopK(fraction=...)` must be in (0, 1], got {self.fraction}")

    def compress(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten()
        kept = flat.abs().topk(max(1, round(self.fraction * flat.numel())), sorted=False).indices
        return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view(gradient.shape)


@dataclass(frozen=True)
class Sign(Compressing):
    """``C(g) = mean |g| sign(g)`` of each gradient: one bit an entry, and one number.

    Group numbers: those of the inner rule.

    Args:
        rule: what steps with the signs.

    Raises:
        TypeError: if the inner rule does not fit.

    >>> Sign().compress(torch.tensor([1.0, -3.0]))
    tensor([ 2., -2.])

    Source: Seide et al. 2014; Bernstein et al. 2018 (signSGD), with the scale of Karimireddy et al.
    2019.
    """

    rule: Rule = field(default_factory=SGD)

    def compress(self, gradient: Tensor) -> Tensor:
        return gradient.sign() * gradient.abs().mean()


@dataclass(frozen=True)
class ErrorFeedback(Rule):
    """``m = g + decay r``; ``c = C(m)``; ``r <- m - c``; the inner rule steps with ``c``.

    What a compression drops is remembered and added to the next gradient, so that nothing is lost:
    for ``decay=1`` all ``c`` so far and ``r`` add up to all gradients so far. The learning rate
    multiplies ``c``: under a schedule the residual keeps to gradients, not to steps.

    Group numbers: those of the inner rule.

    Args:
        rule: a compressing rule, such as ``TopK(0.01)`` or ``Sign()``.
        decay: of the residual, in (0, 1].

    Raises:
        TypeError, ValueError: if an option does not fit.

    >>> theta, state = torch.zeros(2), {}
    >>> numbers = {"lr": 1.0, "lr_scale": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    >>> for _ in range(2):
    ...     g = torch.tensor([3.0, 2.0])
    ...     ErrorFeedback(TopK(0.5)).step([theta], [g], [state], {**numbers, "nesterov": False})
    >>> theta, state["residual"]
    (tensor([-3., -4.]), tensor([3., 0.]))

    Source: Karimireddy et al. 2019, algorithm 2.
    """

    rule: Compressing
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Compressing):
            raise TypeError(
                "`ErrorFeedback(rule=...)` must be a compressing rule such as mep.TopK(0.01) or "
                f"mep.Sign(), got {self.rule!r}; mep.Dion() carries error feedback of its own"
            )
        if not 0 < self.decay <= 1:
            raise ValueError(f"`ErrorFeedback(decay=...)` must be in (0, 1], got {self.decay}")

    def check(self, group: dict[str, Any]) -> None:
        self.rule.check(group)

    def assign(self, parameter: Tensor, role: Role) -> tuple[Rule, float] | None:
        found = self.rule.assign(parameter, role)
        return found and (self, found[1])

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        handed_on = []
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            if "residual" not in state:
                state["residual"] = torch.zeros_like(parameter)
            residual = state["residual"].mul_(self.decay).add_(gradient)
            handed_on.append(self.rule.compress(residual))
            residual.sub_(handed_on[-1])
        self.rule.rule.step(parameters, handed_on, states, group)
