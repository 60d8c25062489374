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
from mep.memory import Update, phase, track
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
        updating, groups, state: as given.
        home: the group of every parameter, by its id.
        finite: of every update, whether all gradients were; if not, nothing was changed.
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
        self.updating, self.groups, self.state = updating, groups, state
        self._roles, self._factored, self._twins = roles, factored, twins
        self._batches = any(rule.batches for rule in updating.rule.parts())
        self.home = {id(p): k for k, g in enumerate(groups) for p in g["params"]}
        self._gradients, self._parameters = Gradients(factored), dict[int, Tensor]()

    @property
    def whole(self) -> bool:
        """True if there were updates, and each was made."""
        return bool(self.finite) and all(self.finite)

    def collect(self, signals: list[Signal]) -> None:
        """Takes the signals of one block."""
        for signal in signals:
            if id(signal.parameter) in self.home:
                self._gradients.collect(signal)
                self._parameters[id(signal.parameter)] = signal.parameter

    def make(self, now: bool = True) -> None:
        """Updates what has been collected; unless ``now``, only what should not wait.

        A rule that treats many parameters at once, or takes signals as they are, waits for some
        more: one call for many costs little more than one for each. A matrix's gradient that has
        been formed for any other rule does not.
        """
        if not self._parameters or not (now or (self._gradients.formed and not self._batches)):
            return
        self.finite.append(self._gradients.finite())
        if self.finite[-1]:
            shares: dict[int, list[Tensor]] = defaultdict(list)
            for key, p in self._parameters.items():
                shares[self.home[key]].append(p)
            groups = [{**self.groups[k], "params": own} for k, own in shares.items()]
            with phase("mep: update"):
                self.updating.apply(self._gradients, groups, self._roles, self.state, self._twins)
        self._gradients.release()
        self._parameters.clear()

    def measure(self, tracker: track, block: Block, signals: Callable[[], list[Signal]]) -> Update:
        """Returns what one block's update takes; made on copies, and forgotten."""
        own = [p for p in dict.fromkeys(block.parameters()) if id(p) in self.home]
        # Of rules that treat several blocks as one batch, the measure has two.
        twice = [{id(p): p.detach().clone() for p in own} for _ in range(1 + self._batches)]
        trial, states = self._trial(own, twice)
        for tensor in trial.everything():
            tracker.label(tensor, "parameters")
        found = Update()
        for _ in range(2):  # the first makes the state
            for tensor in _tensors(states):
                tracker.label(tensor, "optimizer state")
            before = tracker.reset()
            for copies in twice:
                mine = [s for s in signals() if id(s.parameter) in copies]
                trial.collect([replace(s, parameter=copies[id(s.parameter)]) for s in mine])
                del mine
            gradients, factored = tracker.live - before, trial.factored
            trial.make(now=False)
            waits = bool(trial._parameters)
            trial.make()
            rule = tracker.most - before - gradients
            count = len(twice)
            found = Update(-(-gradients // count), -(-rule // count), waits, factored)
        return found

    @property
    def factored(self) -> bool:
        """True if some of what has been collected are signals as they are."""
        return self._gradients.factored

    def everything(self) -> list[Tensor]:
        """Returns all parameters and twins."""
        return [*(p for group in self.groups for p in group["params"]), *self._twins.values()]

    def _trial(
        self, own: list[Any], twice: list[dict[int, Any]]
    ) -> tuple[BlockUpdates, dict[Tensor, dict[str, Any]]]:
        """Returns the same updates of copies, and the state that they will have."""
        pairs = [(p, copies[id(p)]) for copies in twice for p in own]
        shares: dict[int, list[Tensor]] = defaultdict(list)
        for p, copy in pairs:
            shares[self.home[id(p)]].append(copy)
        states: dict[Tensor, dict[str, Any]] = {copy: {} for _, copy in pairs}
        trial = BlockUpdates(
            self.updating,
            [{**self.groups[k], "params": copies} for k, copies in shares.items()],
            {id(copy): self._roles[id(p)] for p, copy in pairs},
            states,
            {id(copy) for p, copy in pairs if id(p) in self._factored},
            {id(copy): self._twins[id(p)].clone() for p, copy in pairs if id(p) in self._twins},
        )
        return trial, states


def by_block(
    free: FreePhase, how: Settings, updates: BlockUpdates, *, within: bool = False
) -> Estimate:
    """Takes one nudged sweep with all of the chain at hand, and updates each block on the way.

    Args:
        free: the free phase.
        how: the strategy.
        updates: of the blocks.
        within: a budget, where some rules may wait for the end.
    """

    def take_step(signals: list[Signal]) -> None:
        updates.collect(signals)
        updates.make(now=not within)

    found = contrast_blockwise(free, how, take_step)
    updates.make()
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
