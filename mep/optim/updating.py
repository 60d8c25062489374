"""From gradients to parameters: clipping, the rules, the constraint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mep.constraints import Constraint
from mep.continual import Penalty
from mep.continual.penalty import memory_of
from mep.energies import Energy, PredictionError
from mep.optim.gradients import Gradients
from mep.updates import SGD, Gradient, Role, Rule

__all__ = ["Updating"]

Roles = Mapping[int, tuple[str, Role]]
States = Mapping[Tensor, dict[str, Any]]


class Updating:
    """What happens to gradients, in this order.

    Args:
        rule: the update rule, or a route between several; None for plain SGD.
        constraint: what holds after every step, if anything.
        clip_norm: largest common norm of all gradients, > 0, or None.
        penalty: what keeps parameters where finished tasks have left them, or None.

    Raises:
        TypeError, ValueError: if an argument does not fit.
    """

    def __init__(
        self,
        rule: Rule | None,
        constraint: Constraint | None,
        clip_norm: float | None,
        penalty: Penalty | None = None,
    ) -> None:
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(f"`update` must be an update rule such as mep.Muon(), got {rule!r}")
        if constraint is not None and not isinstance(constraint, Constraint):
            raise TypeError(
                f"`constraint` must be a constraint such as mep.SpectralNorm(), got {constraint!r}"
            )
        if clip_norm is not None and not (clip_norm > 0 and math.isfinite(clip_norm)):
            raise ValueError(f"`clip_norm` must be a finite number > 0 or None, got {clip_norm}")
        if penalty is not None and not isinstance(penalty, Penalty):
            raise TypeError(f"`penalty` must be a penalty such as mep.EWC(lam), got {penalty!r}")
        self.penalty = penalty
        self.rule = rule or SGD()
        self.constraint = constraint
        self.clip_norm = clip_norm
        parts = self.rule.parts()
        self._alone = parts == [self.rule]
        self.observes = any(part.observes for part in parts)

    def check_model(self, model: nn.Module | None, energy: Energy) -> None:
        """Refuses a rule that observes what model and energy do not give.

        Raises:
            ValueError: naming the rule.
        """
        if self.observes and not isinstance(energy, PredictionError):
            names = ", ".join(type(part).__name__ for part in self.rule.parts() if part.observes)
            raise ValueError(
                f"{names} reads curvature off the backward sweep of mep.PredictionError(), which "
                f"{energy} does not have: use another rule"
            )
        if self.observes and model is None:
            raise ValueError(
                f"`update={type(self.rule).__name__}(...)` needs local signals, and so a model: "
                "EPOptimizer(..., model=model)"
            )

    def check_grad(self) -> None:
        """Refuses a rule that takes more than ``.grad``.

        Raises:
            ValueError: naming the rule.
        """
        if self.observes:
            raise ValueError(
                f"`update={type(self.rule).__name__}(...)` needs local signals, which `.grad` does "
                "not carry: take steps by step(x=..., target=...)"
            )

    def check_blockwise(self, option: str, *, within: bool) -> None:
        """Refuses what needs more than one block at a time.

        Args:
            option: what makes blocks be updated one by one.
            within: whether a memory budget forbids to keep the signals of all, too.

        Raises:
            ValueError: naming both options.
        """
        if self.clip_norm is not None:
            raise ValueError(
                f"{option} knows no norm over all blocks: drop `clip_norm`, or use "
                "update=mep.Normalised(), whose steps have a length of their own"
            )
        if within and self.penalty is not None:
            raise ValueError(
                f"{option} and `penalty={self.penalty}` exclude each other: what a penalty "
                "remembers and how it pulls are in no plan; blockwise=True takes both"
            )
        for rule in self.rule.parts() if within else ():
            if rule.observes:
                raise ValueError(
                    f"{option} and `update={type(rule).__name__}(...)` exclude each other: the "
                    "rule observes the signals of all blocks before it updates the first"
                )

    def refuse(self, parameters: Sequence[Tensor], roles: Roles) -> None:
        """Refuses parameters for which there is no rule, by name.

        Raises:
            ValueError: naming all of them and the remedy.
        """
        refused = [
            f"`{roles[id(p)][0]}` {tuple(p.shape)}"
            for p in parameters
            if self.rule.assign(p, roles[id(p)][1]) is None
        ]
        if refused:
            name = type(self.rule).__name__
            raise ValueError(
                f"`update={name}(...)` treats matrices and kernels only, not {', '.join(refused)}: "
                f"use mep.Route({name}(...)), which sends the others to SGD"
            )

    def prepare(self, parameters: Sequence[Tensor], roles: Roles, state: States) -> None:
        """Lets the constraint note what it needs of new parameters."""
        if self.constraint is not None:
            for p in parameters:
                if self.constraint.holds_for(p, roles[id(p)][1]):
                    self.constraint.prepare(p, state[p])

    def apply(
        self,
        gradients: Gradients,
        groups: Sequence[dict[str, Any]],
        roles: Roles,
        state: States,
        twins: Mapping[int, Tensor],
    ) -> None:
        """Changes all parameters that have a gradient.

        Args:
            gradients: of the parameters.
            groups: parameter groups.
            roles: of the parameters.
            state: per parameter.
            twins: by the ``id`` of a parameter, a tensor that takes the same steps by its own
                state (Kolen-Pollack feedback).
        """
        if self.clip_norm is not None:
            gradients.clip(self.clip_norm)
        for group in groups:
            chosen = gradients.among(group["params"])
            if not chosen:  # frozen, or not part of this block
                continue
            for rule, factor, parameters in self.shares(chosen, roles):
                numbers = group if factor == 1 else {**group, "lr": group["lr"] * factor}
                found: list[Any] = [gradients.of(p) for p in parameters]
                states = [state[p] for p in parameters]
                with self._penalised(rule, parameters, found, states, numbers, twins) as whole:
                    every = (parameters, whole, states)
                    if twins:
                        every = _with_twins(parameters, whole, states, twins)
                    rule.step(*every, numbers)
            if self.constraint is not None:
                held = [p for p in chosen if self.constraint.holds_for(p, roles[id(p)][1])]
                twinned = [p for p in held if id(p) in twins]
                self.constraint.apply(
                    [*held, *(twins[id(p)] for p in twinned)],
                    [*(state[p] for p in held), *(state[p]["feedback_state"] for p in twinned)],
                )

    @contextmanager
    def _penalised(
        self,
        rule: Rule,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
        twins: Mapping[int, Tensor],
    ) -> Iterator[list[Any]]:
        """Lets the penalty act around one rule's step; yields the gradients for it."""
        penalty = self.penalty
        if penalty is None:
            yield gradients
            return
        before = penalty.watch(parameters, states) if penalty.watches else []
        pulled = list(gradients)
        if rule.effective_step(group) is None:
            for k, (p, state) in enumerate(zip(parameters, states, strict=True)):
                memory = memory_of(state)
                if memory is not None and penalty.lam:
                    pulled[k] = _dense(gradients[k]) + penalty.gradient(p, memory)
        yield pulled
        self.pull(rule, parameters, states, group, twins)
        if penalty.watches:
            penalty.learned(parameters, before, [_dense(g) for g in gradients], states)

    def pull(
        self,
        rule: Rule,
        parameters: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        group: dict[str, Any],
        twins: Mapping[int, Tensor],
    ) -> None:
        """Lets the penalty, if there is one, pull at what a rule's step has moved.

        Only where the rule has an effective step; elsewhere the penalty is in the gradient.

        Args:
            rule: has taken the step.
            parameters: that it has moved.
            states: theirs.
            group: the step's numbers.
            twins: as in ``apply``.
        """
        penalty, step = self.penalty, rule.effective_step(group)
        if penalty is None or step is None or not penalty.lam:
            return
        for p, state in zip(parameters, states, strict=True):
            memory = memory_of(state)
            if memory is not None:
                at = p.clone() if id(p) in twins else p
                penalty.pull(p, memory, step)
                if id(p) in twins:
                    twins[id(p)].add_(p - at)

    def shares(
        self, parameters: list[Tensor], roles: Roles
    ) -> Iterator[tuple[Rule, float, list[Tensor]]]:
        """Yields each rule, the factor on its learning rate, and the parameters it treats."""
        if self._alone:  # the common case, without a look at every parameter
            yield self.rule, 1.0, parameters
            return
        shares: dict[tuple[int, float], tuple[Rule, float, list[Tensor]]] = {}
        for p in parameters:
            found = self.rule.assign(p, roles[id(p)][1])
            assert found is not None, "refused at construction"
            shares.setdefault((id(found[0]), found[1]), (*found, []))[2].append(p)
        yield from shares.values()

    def factored(self, parameters: Sequence[Tensor], roles: Roles) -> set[int]:
        """Returns the ids of the matrices and kernels whose rules want gradients as factors.

        Args:
            parameters: of all groups.
            roles: of the parameters.
        """
        return {
            id(p)
            for rule, _, share in self.shares(list(parameters), roles)
            for p in share
            if p.dim() > 1 and rule.takes_factors
        }

    def folded(self, parameters: Sequence[Tensor], roles: Roles, *, on_the_way: bool) -> set[int]:
        """Returns the ids of those whose rules need no gradient of their own, only its products.

        Clipping reads the gradients of all blocks, where it is possible.

        Args:
            parameters: of all groups.
            roles: of the parameters.
            on_the_way: whether blocks are updated one by one.
        """
        if not on_the_way and self.clip_norm is not None:
            return set()
        return {
            id(p)
            for rule, _, share in self.shares(list(parameters), roles)
            for p in share
            if p.dim() > 1 and rule.folds(p)
        }

    def observe(
        self,
        parameters: Sequence[Tensor],
        roles: Roles,
        state: States,
        signals: Callable[[str], Mapping[int, list[Any]]],
    ) -> bool:
        """Shows the local signals to the rules that ask for them.

        Returns whether all could be used.

        Args:
            parameters: of all groups.
            roles: of the parameters.
            state: per parameter.
            signals: ``"empirical"`` or ``"true"`` -> the signals of every parameter, by its id.
        """
        usable = True
        for rule, _, share in self.shares([p for p in parameters if p.requires_grad], roles):
            wanted = rule.wants_curvature([state[p] for p in share])
            if wanted is not None:
                found = signals(wanted)
                for p in share:
                    if not found.get(id(p)) or found[id(p)][0].rows is None:
                        raise ValueError(
                            f"`{type(rule).__name__}` needs the local signal of `{roles[id(p)][0]}`"
                            ", which is no Linear or Conv2d of its own: use another rule for it"
                        )
                    usable &= rule.observe(found[id(p)], state[p])
        return usable


def _dense(gradient: Gradient) -> Tensor:
    return gradient if isinstance(gradient, Tensor) else gradient.dense()


def _with_twins(
    parameters: list[Tensor],
    gradients: list[Any],
    states: list[dict[str, Any]],
    twins: Mapping[int, Tensor],
) -> tuple[list[Tensor], list[Any], list[dict[str, Any]]]:
    """Adds the tensors that take the same steps, with states of their own."""
    doubled = [k for k, p in enumerate(parameters) if id(p) in twins]
    return (
        [*parameters, *(twins[id(parameters[k])] for k in doubled)],
        [*gradients, *(gradients[k] for k in doubled)],
        [*states, *(states[k].setdefault("feedback_state", {}) for k in doubled)],
    )
