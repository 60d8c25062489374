"""One whole step of a plain net: signals go from the sweep straight into the momenta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from mep.contrast import Settings, chain_of, check_input
from mep.contrast.estimate import Estimate
from mep.contrast.flat import Flat, Swept
from mep.kernels import rows
from mep.memory import phase
from mep.optim.updating import States, Updating
from mep.updates import SGD
from mep.updates.sgd import momenta_in_a_row

__all__ = ["FlatSteps"]

Add = Callable[[float], Any]


@dataclass(frozen=True)
class _Share:
    """What one parameter group has of the net: weights and biases that are taken together."""

    group: int
    weights: list[list[int]]
    biases: list[list[int]]


class FlatSteps:
    """Steps by ``Flat`` and SGD with momentum, where nothing else has to see the gradients.

    Args:
        updating: the rule and what goes with it.
    """

    def __init__(self, updating: Updating) -> None:
        alone = updating.constraint is None and updating.penalty is None
        rule = updating.rule if alone and updating.clip_norm is None else None
        self._rule: SGD | None = (
            rule if type(rule) is SGD else None
        )  # a subclass may have a step of its own
        self._flat: Flat | None = None
        self._parameters: list[Any] = []  # of the net, and then of the groups
        self._sizes: list[int] = []
        self._shares: list[_Share] = []

    def take(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        how: Settings,
        groups: Sequence[dict[str, Any]],
        state: States,
    ) -> Estimate | None:
        """Takes a step inside ``Buffers.lend()``; None if it is not for it, and nothing was done.

        Args:
            model: the model.
            x: input, ``(B, *in)``.
            target: target as the cost takes it.
            how: the strategy.
            groups: parameter groups.
            state: per parameter.

        Raises:
            TypeError, ValueError: if input or target do not fit; nothing has changed then.
        """
        if self._rule is None:
            return None
        chain = chain_of(model, how.gradient_method, how.energy)
        if not self._prepared(chain, how, groups):
            return None
        assert self._flat is not None
        check_input(chain, x)
        swept = self._flat.sweep(x, target)
        if swept is None or not swept.finite:
            return None
        with phase("mep: update"):
            self._update(swept, groups, state)
        return swept.estimate

    def _prepared(self, chain: Any, how: Settings, groups: Sequence[dict[str, Any]]) -> bool:
        """Returns whether the chain fits, with all of its parameters in some group."""
        if self._flat is None or self._flat.chain is not chain or self._flat.how is not how:
            if not Flat.fits(chain, how):
                return False
            self._flat, self._parameters = Flat(chain, how), []
        weights, biases = self._flat.parameters()
        every, sizes = [*weights, *biases], [len(group["params"]) for group in groups]
        known = [*every, *(p for group in groups for p in group["params"])]
        if sizes != self._sizes or not _same(known, self._parameters):
            self._shares = _shares(weights, biases, groups)
            self._parameters, self._sizes = known, sizes
        with_momentum = all(groups[share.group]["momentum"] for share in self._shares)
        frozen = any(p is None or not p.requires_grad for p in every)
        return bool(self._shares) and with_momentum and not frozen

    def _update(self, swept: Swept, groups: Sequence[dict[str, Any]], state: States) -> None:
        assert self._rule is not None and self._flat is not None
        weights, biases = self._flat.parameters()
        activities, errors = swept.activities, swept.errors
        scale = -1 / len(errors[0])  # errors come per unit of beta
        for share in self._shares:
            own, momenta, adds = [], [], []
            for parameters, spans, products in (
                (weights, share.weights, True), (biases, share.biases, False),
            ):  # fmt: skip
                for span in spans:
                    chosen: list[Any] = [parameters[k] for k in span]
                    own += chosen
                    e, a = [errors[k] for k in span], [activities[k] for k in span]
                    states = [state[p] for p in chosen]
                    momenta += _prepare(adds, chosen, states, e, a if products else None, scale)
            self._rule.fold(
                own, momenta, lambda keep, adds=adds: _all(adds, keep), groups[share.group]
            )


def _prepare(
    adds: list[Add],
    parameters: list[Any],
    states: list[dict[str, Any]],
    errors: list[Tensor],
    activities: list[Tensor] | None,
    scale: float,
) -> list[Tensor]:
    """Notes how the gradients of neighbours are added to their momenta; returns these."""
    if len(parameters) > 1:
        whole, momenta = momenta_in_a_row(parameters, states)
        (e,) = rows(errors)
        if activities is None:
            adds.append(lambda keep: whole.mul_(keep).add_(e.sum(1), alpha=scale))
        else:
            (a,) = rows(activities)
            adds.append(lambda keep: whole.baddbmm_(e.mT, a, beta=keep, alpha=scale))
        return momenta
    (p,), (own,), (e,) = parameters, states, errors
    if own.get("momentum_buffer") is None:
        own["momentum_buffer"] = torch.zeros_like(p)
    m = own["momentum_buffer"]
    if activities is None:
        adds.append(lambda keep: m.mul_(keep).add_(e.sum(0), alpha=scale))
    else:
        adds.append(lambda keep: m.addmm_(e.t(), activities[0], beta=keep, alpha=scale))
    return [m]


def _same(tensors: list[Any], known: list[Any]) -> bool:
    return len(tensors) == len(known) and all(map(is_, tensors, known))


def _all(adds: list[Add], keep: float) -> None:
    for add in adds:
        add(keep)


def _spans(places: list[int], count: int) -> list[list[int]]:
    """Returns the places that are taken together: all between the first and the last layer.

    >>> _spans([0, 1, 2, 3], 4), _spans([1], 4)
    ([[0], [3], [1, 2]], [[1]])
    """
    middle = [k for k in places if 0 < k < count - 1]
    if len(middle) < max(2, count - 2):
        return [[k] for k in places]
    return [*([k] for k in places if k in (0, count - 1)), middle]


def _shares(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], groups: Sequence[dict[str, Any]]
) -> list[_Share]:
    """Returns what every group has of the net; nothing if some of it is no group's, or twice."""
    home = {id(p): k for k, group in enumerate(groups) for p in group["params"]}
    every = [id(p) for p in (*weights, *biases)]
    if len({*every}) < len(every) or not home.keys() >= {*every}:
        return []
    shares = [
        _Share(
            k,
            _spans([i for i, p in enumerate(weights) if home[id(p)] == k], len(weights)),
            _spans([i for i, p in enumerate(biases) if home[id(p)] == k], len(weights)),
        )
        for k in range(len(groups))
    ]
    return [share for share in shares if share.weights or share.biases]
