"""What a perceptron's compiled steps need to know of SGD: rates, and where momenta are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mep.contrast import Layers, Lesson
from mep.memory import phase
from mep.optim.blockwise import BlockUpdates
from mep.optim.updating import States, Updating
from mep.updates import SGD

__all__ = ["Lessons", "make_momenta", "momenta", "numbers_of", "plain_rule"]


def plain_rule(updating: Updating) -> SGD | None:
    """Returns the rule if it is SGD, and nothing else has to see the gradients."""
    watched = updating.penalty is not None and updating.penalty.watches
    alone = updating.constraint is None and updating.clip_norm is None and not watched
    # A subclass may have a step of its own.
    return updating.rule if alone and type(updating.rule) is SGD else None


def numbers_of(group: dict[str, Any], rule: SGD) -> tuple[float, ...]:
    """Returns rate, momentum, decay in the gradient and out of it, and Nesterov's 1 or 0."""
    lr, decay = float(group["lr"] * group["lr_scale"]), float(group["weight_decay"])
    inside, outside = (0.0, decay) if rule.decoupled else (decay, 0.0)
    return lr, float(group["momentum"]), inside, outside, float(group["nesterov"])


def momenta(
    parameters: Sequence[Tensor | None],
    homes: Sequence[int],
    groups: Sequence[dict[str, Any]],
    state: States,
) -> list[int | None] | None:
    """Returns the addresses of momenta, 0 without one, None where there is none yet.

    Args:
        parameters: what has them.
        homes: the group of every parameter.
        groups: parameter groups.
        state: per parameter.

    Returns:
        None, if one does not lie in memory as its parameter does.
    """
    with_momentum = [bool(group["momentum"]) for group in groups]
    addresses: list[int | None] = []
    for p, home in zip(parameters, homes, strict=True):
        if p is None or not with_momentum[home]:
            addresses.append(0)
            continue
        own = state.get(p)  # which makes no entry
        m = own.get("momentum_buffer") if own else None
        if m is None:
            addresses.append(None)
            continue
        if m.shape != p.shape or m.dtype != p.dtype or not (m.is_cpu and m.is_contiguous()):
            return None
        addresses.append(m.data_ptr())
    return addresses


def make_momenta(
    parameters: Sequence[Tensor | None],
    homes: Sequence[int],
    groups: Sequence[dict[str, Any]],
    state: States,
) -> list[int]:
    """Returns the same where all of them lie as they should, those there are not yet made.

    Args:
        parameters: what has them.
        homes: the group of every parameter.
        groups: parameter groups.
        state: per parameter.
    """
    for p, home in zip(parameters, homes, strict=True):
        if p is not None and groups[home]["momentum"]:
            own = state[p]
            if own.get("momentum_buffer") is None:
                own["momentum_buffer"] = torch.zeros_like(p)
    return momenta(parameters, homes, groups, state)  # pyright: ignore[reportReturnType]


class Lessons:
    """Lets the segments of a perceptron learn, one after another.

    Args:
        layers: the net's.
        rule: the update rule.
        updates: whose groups and state are meant, and which takes note of every update.
    """

    def __init__(self, layers: Layers, rule: SGD, updates: BlockUpdates) -> None:
        self._layers, self._updates = layers, updates
        self._numbers = [numbers_of(group, rule) for group in updates.groups]
        self._begun = False

    def fit(self) -> bool:
        """Returns whether every parameter is to learn, and can."""
        weights, biases = self._layers.parameters()
        every, home = [p for p in (*weights, *biases) if p is not None], self._updates.home
        if not all(id(p) in home and p.requires_grad for p in every):
            return False
        own = self._homes(every), self._updates.groups, self._updates.state
        return momenta(every, *own) is not None

    def take(self, lesson: Lesson) -> None:
        """Lets one segment learn, unless gradients may not be finite."""
        finite = lesson.most <= torch.finfo(torch.float32).max
        self._updates.finite.append(finite)
        if not finite:
            return
        weights, biases = self._layers.parameters(*lesson.span)
        groups, state = self._updates.groups, self._updates.state
        with phase("mep: update"):
            if not self._begun:
                self._begin()
            homes = [self._homes(weights), self._homes(biases)]
            foot = [0] if lesson.span[0] else []
            numbers = [[self._numbers[k] for k in (*foot, *own)] for own in homes]
            lesson.take(
                make_momenta(weights, homes[0], groups, state),
                make_momenta(biases, homes[1], groups, state),
                torch.tensor(numbers, dtype=torch.float64, device="cpu"),
            )
            # A graph that still needs the weights as they were is to notice.
            increment_version([p for p in (*weights, *biases) if p is not None])

    def _begin(self) -> None:
        """Makes all momenta that there are not yet, before any lesson.

        Made one after another, between tensors that come and go, they would tear holes in memory.
        """
        self._begun = True
        every = [p for ps in self._layers.parameters() for p in ps if p is not None]
        if every[-1] not in self._updates.state or not self._updates.state[every[-1]]:
            make_momenta(every, self._homes(every), self._updates.groups, self._updates.state)

    def _homes(self, parameters: Sequence[Tensor | None]) -> list[int]:
        """Returns the group of every parameter, any for None."""
        return [0 if p is None else self._updates.home[id(p)] for p in parameters]
