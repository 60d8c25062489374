"""One whole step of a plain net: signals go from the sweep straight into momenta and weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from mep.contrast import Settings, chain_of
from mep.contrast.estimate import Estimate
from mep.contrast.flat import Flat, Room
from mep.contrast.layers import Parameters, layers_of
from mep.memory import phase, watched
from mep.optim.lessons import make_momenta, momenta, numbers_of, plain_rule
from mep.optim.updating import States, Updating

if TYPE_CHECKING:
    from mep.kernels.captured import Captured

__all__ = ["FlatSteps"]


class FlatSteps:
    """Steps by ``Flat`` and SGD, where nothing else has to see the gradients.

    Args:
        updating: the rule and what goes with it.
        room: for further sweeps; part of what a run needs to go on as it would have.
    """

    def __init__(self, updating: Updating, room: Room) -> None:
        self._room, self._updating = room, updating
        self._rule = plain_rule(updating)
        self._flat: Flat | None = None
        self._chain: Any = None
        self._every: list[Any] = []  # weights, and then biases
        self._owned: list[list[Any]] = []  # by the groups
        self._homes: list[int] = []  # the group of every weight, and then of every bias
        self._known: list[int | None] | None = None  # where their momenta are
        self._seen: list[Any] = []  # which groups have momenta, and all there are
        self._where: list[Any] = []  # and the shapes of what has them
        self._numbers: list[tuple[float, ...]] = []  # of the groups, and which step has them
        self._knows_them: Captured | None = None

    def take(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        how: Settings,
        groups: Sequence[dict[str, Any]],
        state: States,
    ) -> Estimate | None:
        """Takes a step; None if it is not for it, and nothing was done.

        Args:
            model: the model.
            x: input, ``(B, *in)``.
            target: target as the cost takes it.
            how: the strategy.
            groups: parameter groups.
            state: per parameter.

        Raises:
            TypeError, ValueError: if the target does not fit; nothing has changed then.
        """
        if self._rule is None:
            return None
        chain = chain_of(model, how.gradient_method, how.energy)
        parameters = self._prepared(chain, how, groups)
        if parameters is None:
            return None
        every, known = self._every, self._momenta(groups, state)
        if known is None:
            return None
        # Whoever looks on is shown the update apart.
        at_once = None not in known and not watched()
        teach = partial(self._teach, known, groups) if at_once else None
        assert self._flat is not None
        swept = self._flat.sweep(x, target, parameters, how.beta, teach)
        if swept is None:
            return None
        with phase("mep: update"):
            if not swept.learned:
                if teach is None:
                    made = make_momenta(every, self._homes, groups, state)
                    self._teach(made, groups, swept.captured)
                swept.captured.learn()
            # A graph that still needs the weights as they were is to notice.
            increment_version([p for p in every if p is not None])
            if self._updating.penalty is not None:
                with torch.no_grad():
                    self._pull(every, groups, state)
        return swept.estimate

    def _prepared(
        self, chain: Any, how: Settings, groups: Sequence[dict[str, Any]]
    ) -> Parameters | None:
        """Returns the layers' parameters if the chain fits, and all of them are in some group."""
        if self._flat is None or self._chain is not chain or not self._flat.goes_by(how):
            layers = layers_of(chain) if Flat.fits(how) else None
            if layers is None:
                return None
            self._flat, self._chain, self._every = Flat(layers, how, self._room), chain, []
        parameters = self._flat.layers.parameters()
        every, owned = [*parameters[0], *parameters[1]], [group["params"] for group in groups]
        same = _same(every, self._every) and len(owned) == len(self._owned)
        if not same or not all(map(_same, owned, self._owned)):
            self._homes = _homes(every, groups)
            self._every, self._owned, self._numbers = every, [[*ps] for ps in owned], []
            self._seen = []
        if not self._homes or not all([p is None or p.requires_grad for p in every]):
            return None
        return parameters

    def _momenta(self, groups: Sequence[dict[str, Any]], state: States) -> list[int | None] | None:
        """Returns what ``momenta`` does, looked up again where any has become another."""
        seen: list[Any] = [bool(group["momentum"]) for group in groups]
        buffers = [own.get("momentum_buffer") for own in state.values()]
        where: list[Any] = [m.data_ptr() for m in buffers if m is not None]
        where += [p.shape for p in self._every if p is not None]
        if where != self._where or not _same([*seen, *buffers], self._seen):
            self._known = momenta(self._every, self._homes, groups, state)
            self._where, self._seen = where, [*seen, *buffers]
        return self._known

    def _teach(
        self, known: list[Any], groups: Sequence[dict[str, Any]], captured: Captured
    ) -> None:
        """Says where momenta are, and what the groups' numbers are."""
        assert self._rule is not None
        layers = len(known) // 2
        captured.teach(known[:layers], known[layers:])
        numbers = [numbers_of(group, self._rule) for group in groups]
        if numbers != self._numbers or captured is not self._knows_them:
            table = np.array(numbers)[self._homes]
            captured.numbers[:] = table.reshape(2, layers, -1)
            self._numbers, self._knows_them = numbers, captured

    def _pull(
        self, every: Sequence[Tensor | None], groups: Sequence[dict[str, Any]], state: States
    ) -> None:
        assert self._rule is not None
        shares: list[list[Tensor]] = [[] for _ in groups]
        for p, home in zip(every, self._homes, strict=True):
            if p is not None:
                shares[home].append(p)
        for own, group in zip(shares, groups, strict=True):
            self._updating.pull(self._rule, own, [state[p] for p in own], group, {})


def _same(tensors: list[Any], known: list[Any]) -> bool:
    return len(tensors) == len(known) and all(map(is_, tensors, known))


def _homes(every: Sequence[Tensor | None], groups: Sequence[dict[str, Any]]) -> list[int]:
    """Returns every parameter's group, any for None; nothing if one is in no group, or twice."""
    home = {id(p): k for k, group in enumerate(groups) for p in group["params"]}
    own = [id(p) for p in every if p is not None]
    if len({*own}) < len(own) or not home.keys() >= {*own}:
        return []
    return [0 if p is None else home[id(p)] for p in every]
