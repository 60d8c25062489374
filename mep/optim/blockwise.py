"""Updates on the way: every block steps as soon as the nudged sweep has passed it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mep.blocks import Block
from mep.contrast import Estimate, Settings, contrast_blockwise
from mep.curvature import Signal
from mep.energies import FreePhase
from mep.memory import phase, track
from mep.optim.gradients import Gradients
from mep.optim.updating import Roles, States, Updating

__all__ = ["BlockUpdates", "by_block"]


class BlockUpdates:
    """Takes the signals of some blocks, updates these, and gives the memory back.

    Args:
        updating: clipping, rules and constraint.
        groups: the optimizer's parameter groups; the parameters of others are left alone.
        roles: of the parameters.
        state: per parameter.
        factored: ids of parameters whose gradients stay factors.
        twins: as for ``Updating.apply``.

    Attributes:
        finite: of every call of ``make``, whether all gradients were; if not, nothing was changed.
    """

    def __init__(
        self,
        updating: Updating,
        groups: Sequence[dict[str, Any]],
        roles: Roles,
        state: States,
        factored: Collection[int],
        twins: Mapping[int, Tensor],
    ) -> None:
        self.finite: list[bool] = []
        self._updating, self._groups, self._roles = updating, groups, roles
        self._state, self._factored, self._twins = state, factored, twins
        self._home = {id(p): k for k, g in enumerate(groups) for p in g["params"]}
        self._gradients, self._parameters = Gradients(factored), dict[int, Tensor]()

    @property
    def by_segment(self) -> bool:
        """True if some rule treats many parameters at once, and had better wait for a few."""
        return any(rule.batches for rule in self._updating.rule.parts())

    @property
    def whole(self) -> bool:
        """True if there were updates, and each was made."""
        return bool(self.finite) and all(self.finite)

    def collect(self, signals: list[Signal]) -> None:
        """Takes the signals of one block."""
        for signal in signals:
            if id(signal.parameter) in self._home:
                self._gradients.collect(signal)
                self._parameters[id(signal.parameter)] = signal.parameter

    def make(self) -> None:
        """Updates what has been collected."""
        self.finite.append(self._gradients.finite())
        if self.finite[-1]:
            shares: dict[int, list[Tensor]] = defaultdict(list)
            for key, p in self._parameters.items():
                shares[self._home[key]].append(p)
            groups = [{**self._groups[k], "params": own} for k, own in shares.items()]
            with phase("mep: update"):
                self._updating.apply(self._gradients, groups, self._roles, self._state, self._twins)
        self._gradients.release()
        self._parameters.clear()

    def measure(self, tracker: track, block: Block, signals: Callable[[], list[Signal]]) -> int:
        """Returns the most bytes that one block's update takes; made on copies, and forgotten."""
        own = [p for p in dict.fromkeys(block.parameters()) if id(p) in self._home]
        # Rules that wait for several blocks treat them as one batch: so the measure has two.
        twice = [{id(p): p.detach().clone() for p in own} for _ in range(1 + self.by_segment)]
        trial, states = self._trial(own, twice)
        for tensor in trial.everything():
            tracker.label(tensor, "parameters")
        before = 0
        for _ in range(2):  # the first makes the state
            for tensor in _tensors(states):
                tracker.label(tensor, "optimizer state")
            before = tracker.reset()
            for copies in twice:
                found = [s for s in signals() if id(s.parameter) in copies]
                trial.collect([replace(s, parameter=copies[id(s.parameter)]) for s in found])
            trial.make()
        return -(-(tracker.most - before) // len(twice))

    def everything(self) -> list[Tensor]:
        """Returns all parameters and twins."""
        return [*(p for group in self._groups for p in group["params"]), *self._twins.values()]

    def _trial(
        self, own: list[Any], twice: list[dict[int, Any]]
    ) -> tuple[BlockUpdates, dict[Tensor, dict[str, Any]]]:
        """Returns the same updates of copies, and the state that they will have."""
        pairs = [(p, copies[id(p)]) for copies in twice for p in own]
        shares: dict[int, list[Tensor]] = defaultdict(list)
        for p, copy in pairs:
            shares[self._home[id(p)]].append(copy)
        states: dict[Tensor, dict[str, Any]] = {copy: {} for _, copy in pairs}
        trial = BlockUpdates(
            self._updating,
            [{**self._groups[k], "params": copies} for k, copies in shares.items()],
            {id(copy): self._roles[id(p)] for p, copy in pairs},
            states,
            {id(copy) for p, copy in pairs if id(p) in self._factored},
            {id(copy): self._twins[id(p)].clone() for p, copy in pairs if id(p) in self._twins},
        )
        return trial, states


def by_block(free: FreePhase, how: Settings, updates: BlockUpdates) -> Estimate:
    """Takes one nudged sweep with all of the chain at hand, and updates each block on the way."""

    def take_step(signals: list[Signal]) -> None:
        updates.collect(signals)
        updates.make()

    found = contrast_blockwise(free, how, take_step)
    if any(updates.finite):
        free.commit()
    return found


def _tensors(state: Mapping[Tensor, dict[str, Any]]) -> list[Tensor]:
    found, waiting = [], list(state.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            waiting += value.values()
    return found
