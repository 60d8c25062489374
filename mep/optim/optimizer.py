"""EPOptimizer: the one place where estimating and updating meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mep.blocks import Buffers
from mep.constraints import Constraint
from mep.continual import Penalty
from mep.continual.fisher import Loader
from mep.contrast import (
    AutoBeta,
    Easing,
    Estimate,
    Settings,
    Stencil,
    chain_of,
    check_blockwise,
    free_phase,
    free_signals,
    settings,
)
from mep.contrast.flat import Room
from mep.contrast.mixed import autocasts, full, mixed, refuse_mixed
from mep.energies import Cost, Energy, FreePhase, cost_of
from mep.memory import Plan, phase
from mep.optim.blockwise import BlockUpdates, by_block
from mep.optim.budget import budget_of
from mep.optim.feedback import check_learning, feedback_weights, learning
from mep.optim.flat import FlatSteps
from mep.optim.gradients import Gradients
from mep.optim.groups import check_own, roles
from mep.optim.saving import Saved
from mep.optim.sources import by_backprop, by_contrast
from mep.optim.tasks import consolidate, penalty_of
from mep.optim.updating import Roles, Updating
from mep.optim.wording import NO_BATCH, NO_GRAD, chosen_of, too_many_skipped, with_settler
from mep.settling import CONVERGED, KOLEN_POLLACK, Limit, Solver, Sweep
from mep.updates import Rule

__all__ = ["EPOptimizer"]


class EPOptimizer(Saved):
    """A torch optimizer whose ``step(x=, target=)`` settles, contrasts and updates.

    ``theta <- rule(theta, g)`` with ``g`` the estimate that ``mep.estimate`` describes. Without a
    batch, ``step()`` applies the same rule to ``.grad``, so backprop with the very same rule is
    ``loss.backward(); opt.step()``. ``step(x=, target=)`` neither reads nor writes ``.grad``.

    What a scheduler may change (``lr``, ``momentum``, ``weight_decay``, ``lr_scale``) stands in the
    parameter groups; what shapes the computation is fixed at construction. Under
    ``torch.autocast(device, torch.bfloat16)`` a step settles copies of the weights in bfloat16 and
    updates the weights themselves. No loss scaling is needed: do not use a ``GradScaler``, it would
    divide an EP gradient that was never multiplied.

    Args:
        params: parameters or groups, as for any torch optimizer. All must belong to ``model``.
        model: the model to settle; needed for ``step(x=, target=)``.
        mode: ``"ep"``, or ``"backprop"``: with a batch, torch's backward and the same rule.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: >= 0.
        nesterov: Nesterov momentum.
        update: the update rule; ``mep.SGD()`` by default. ``mep.Route`` combines several.
        constraint: what holds after every step, such as ``mep.SpectralNorm()``; none by default.
        clip_norm: largest common norm of all gradients, > 0; none by default.
        penalty: keeps parameters where finished tasks have left them, such as ``mep.EWC(lam)``.
        ewc_lambda: stands for ``penalty=mep.EWC(ewc_lambda)``.
        cost: ``"cross_entropy"``, ``"mse"`` or a cost object.
        energy: ``mep.PredictionError(output=...)`` or ``mep.Hopfield()``; by the model.
        settler: ``mep.Sweep()`` by default, ``mep.FixedPoint()`` for ``mep.Hopfield()``.
        stencil: ``mep.one_sided`` by default.
        beta: ``"auto"``, a number > 0 or ``mep.AutoBeta(c)``.
        settle_steps: selects gradient settling with so many steps.
        settle_lr: selects gradient settling with this step size.
        gradient_method: ``"analytic"`` (default) or ``"autograd"``.
        blockwise: True updates every block during the nudged sweep, as soon as its own signal is
            there, so that no gradient outlives its block. Takes ``mep.Sweep(1)``; a residual above
            tolerance is known only afterwards and halves the nudge of the next step.
        memory_budget: bytes, or ``"4MB"`` (2^20 each): what a step may take besides parameters and
            the rule's state. The same update as ``blockwise=True``, segment by segment, with what
            lies between checkpoints computed again; ``mep.Sweep(1)`` by default. The plan is made
            by a first step of each shape, which also measures, on copies of one block at a time.
        state_dtype: of its checkpoints, such as ``torch.bfloat16``; the states' own by default.
        max_skipped: after more updates than this skipped in a row, because settling diverged,
            ``step`` raises. >= 0.

    Attributes:
        model, mode: as given.
        how: the frozen strategy of the estimates.
        last: the ``Estimate`` of the last EP step, None before the first.
        skipped: updates skipped so far because settling diverged or loss or gradients were not
            finite.
        unsettled: updates made on the way whose residual turned out to be above tolerance.
        easing, room: what batches that did not settle have led to: a weaker nudge, and memory for
            further sweeps.
        plan: how the last step kept to the memory budget; None without one.

    Raises:
        TypeError, ValueError: if an option or a parameter does not fit.
        mep.TraceError: if the model cannot be read as a chain.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> opt = EPOptimizer(model.parameters(), model=model, lr=0.1)
    >>> loss = opt.step(x=torch.randn(5, 4), target=torch.tensor([0, 1, 2, 0, 1]))
    >>> loss.shape, opt.last.status
    (torch.Size([]), 'converged')

    Source: Scellier & Bengio 2017, sec. 3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        model: nn.Module | None = None,
        mode: str = "ep",
        lr: float = 0.05,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        update: Rule | None = None,
        constraint: Constraint | None = None,
        clip_norm: float | None = None,
        penalty: Penalty | None = None,
        ewc_lambda: float | None = None,
        cost: str | Cost = "cross_entropy",
        energy: Energy | None = None,
        settler: Solver | None = None,
        stencil: Stencil | None = None,
        beta: float | str | AutoBeta | None = None,
        settle_steps: int | None = None,
        settle_lr: float | None = None,
        gradient_method: str | None = None,
        blockwise: bool = False,
        memory_budget: int | str | None = None,
        state_dtype: torch.dtype | None = None,
        max_skipped: int = 10,
    ) -> None:
        if not isinstance(max_skipped, int) or max_skipped < 0:
            raise ValueError(f"`max_skipped` must be a whole number >= 0, got {max_skipped!r}")
        options = {
            "energy": energy, "settler": settler, "settle_steps": settle_steps,
            "settle_lr": settle_lr, "stencil": stencil, "beta": beta,
            "gradient_method": gradient_method, "blockwise": blockwise or None,
            "memory_budget": memory_budget, "state_dtype": state_dtype,
        }  # fmt: skip
        chosen = chosen_of(model, mode, options)
        self.model = model
        self.mode = mode
        self._budget = budget_of(chosen)
        self.blockwise = chosen.pop("blockwise", False) or self._budget is not None
        self.easing, self.room = Easing(), Room()
        self._updating = Updating(update, constraint, clip_norm, penalty_of(penalty, ewc_lambda))
        self.max_skipped = max_skipped
        self.skipped = self.skipped_in_a_row = self.unsettled = 0
        self.last: Estimate | None = None
        self._buffers = Buffers()
        self.how: Settings = settings(cost=cost_of(cost), **with_settler(chosen))
        defaults = {
            "lr": lr, "lr_scale": 1.0, "momentum": momentum, "weight_decay": weight_decay,
            "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._updating.check_model(model, self.how.energy)
        if model is not None and (mode == "ep" or self._updating.observes):
            chain = chain_of(model, self.how.gradient_method, self.how.energy)
            feedback = self._feedback(model)
            if feedback and self.how.settler.feedback == KOLEN_POLLACK:
                check_learning(self.param_groups, feedback, self.rule)
            if self.blockwise:
                check_blockwise(self.how, chain, self._option)
                self._updating.check_blockwise(self._option, within=self._budget is not None)
            self.how.energy.check(chain, self.how.settler)

    @property
    def _option(self) -> str:
        """What makes blocks be updated on the way, for messages."""
        return "`blockwise=True`" if self._budget is None else "`memory_budget`"

    @property
    def rule(self) -> Rule:
        """The update rule."""
        return self._updating.rule

    @property
    def plan(self) -> Plan | None:
        """How the last step kept to the memory budget; None without one."""
        return self._budget and self._budget.plan

    @property
    def constraint(self) -> Constraint | None:
        """The constraint, or None."""
        return self._updating.constraint

    @property
    def penalty(self) -> Penalty | None:
        """The penalty, or None."""
        return self._updating.penalty

    def consolidate(self, loader: Loader | None = None) -> None:
        """Lets the penalty remember the task that has just been learned.

        Args:
            loader: the task's batches ``(x, target)``, for a penalty that takes curvature.

        Raises:
            ValueError: if there is no penalty, or it would stay zero. Nothing has changed then.
        """
        parameters = self._parameters()
        consolidate(self.penalty, self.model, parameters, self.state, loader, self.how)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its numbers and that its parameters are the model's.

        Raises:
            TypeError: if the parameters are a set.
            ValueError: if a number is out of range or a parameter is foreign.
        """
        self.rule.check({**self.defaults, **param_group})
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("`params` must be a list: a checkpoint needs an order, a set has none")
        params = [params] if isinstance(params, Tensor) else list(params)
        new = [p[1] if isinstance(p, tuple) else p for p in params]
        check_own(self.model, new)
        found = roles(self.model, [*self._parameters(), *new])
        if all(isinstance(p, Tensor) for p in new):  # torch itself refuses anything else
            self._updating.refuse(new, found)
        super().add_param_group({**param_group, "params": params})
        self._know(found)
        self._updating.prepare(new, found, self.state)

    def _know(self, found: Roles) -> None:
        """Takes note of the parameters' roles, and of whose gradients stay factors."""
        self._roles = found
        if self.penalty is not None:
            self.penalty.bind(self._parameters(), self.state)
        self._flat = FlatSteps(self._updating, self.room)
        self._factored = self._updating.factored(self._parameters(), found)
        self._folded = self._updating.folded(self._parameters(), found, on_the_way=self.blockwise)

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        x: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Any:
        """Takes one step.

        Args:
            closure: as in torch: reevaluates the model and returns the loss; uses ``.grad``.
            x: input, ``(B, *in)``: takes an EP step (or backprop, by ``mode``) on this batch.
            target: its target, as the cost takes it.

        Returns:
            The batch's mean cost before the update (a scalar tensor), or the closure's loss.

        Raises:
            TypeError, ValueError: if the batch does not fit; nothing has changed then.
            RuntimeError: if more than ``max_skipped`` updates in a row had to be skipped.
        """
        if closure is not None and not callable(closure):
            raise TypeError("`closure` must be a function; name a batch: step(x=..., target=...)")
        if x is None and target is None:
            return self._step_on_grad(closure)
        if x is None or target is None or closure is not None:
            raise ValueError(NO_BATCH)
        if self.model is None:
            raise ValueError("`step(x=, target=)` needs EPOptimizer(..., model=model)")
        if self.mode == "ep" and not self.blockwise and not autocasts(x):
            loss = self._step_flat(self.model, x, target)
            if loss is not None:
                return loss
        with torch.no_grad(), mixed(x) if self.mode == "ep" else nullcontext():
            # Other solvers take many steps: what each leaves is better freed. A budget counts it.
            few = isinstance(self.how.settler, (Sweep, Limit)) and self._budget is None
            with self._buffers.lend() if few else nullcontext():
                if self.blockwise:
                    return self._step_blockwise(self.model, x, target)
                return self._step_whole(self.model, x, target)

    def _step_on_grad(self, closure: Callable[[], Any] | None) -> Any:
        if self._budget is not None:
            raise ValueError(NO_GRAD)
        self._updating.check_grad()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = Gradients()
        for p in self._parameters():
            if p.grad is not None:
                gradients.put(p, p.grad)
        with torch.no_grad():
            self._update(gradients)
        return loss

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _eased(self) -> Settings:
        """The strategy of a step whose updates wait for its end."""
        return self.how.eased(self.easing) if self.how.backs_off else self.how

    def _step_flat(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor | None:
        """Takes a captured step; None if it is not for one, and nothing was done."""
        found = self._flat.take(model, x, target, self._eased, self.param_groups, self.state)
        if found is not None:
            self._buffers.clear()
            self._note(found)
            self._count(True)
        return found and found.loss

    def _step_whole(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        if self.mode == "backprop":
            observes = self._updating.observes
            batch = by_backprop(model, x, target, self.how, self._parameters(), with_free=observes)
        else:
            free = free_phase(model, x, target, self._eased, self._feedback(model))
            batch = by_contrast(free, self._eased, Gradients(self._factored, self._folded))
        self._note(batch.estimate)
        taken = False
        try:
            taken = self._update(batch.gradients, batch.usable, batch.free)
        finally:
            batch.keep_statistics(taken)
        return batch.loss

    def _note(self, estimate: Estimate | None) -> None:
        self.last = estimate or self.last
        if estimate is not None and self.how.backs_off:
            self.easing.learn(estimate.status)

    def _step_blockwise(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        refuse_mixed(self._option, model)
        feedback = self._feedback(model)
        updates = BlockUpdates(
            self._updating, self.param_groups, self._roles, self.state,
            self._factored | self._folded, learning(self.how, feedback),
        )  # fmt: skip
        how = self.how.eased(self.easing)
        if self._budget is not None:
            self.last = self._budget.contrast(model, x, target, how, updates, feedback)
        else:
            free = free_phase(model, x, target, how, feedback)
            if self._updating.observes and free.sound and not self._observe(free):
                self._count(False)
                return free.loss.mean()
            self.last = by_block(free, how, updates)
        self.easing.learn(self.last.status)
        self.unsettled += self.last.status != CONVERGED
        self._count(updates.whole)
        return self.last.loss

    def _update(
        self, gradients: Gradients, usable: bool = True, free: FreePhase | None = None
    ) -> bool:
        """Applies the rules unless something is not finite; returns whether it did."""
        usable = usable and gradients.finite()
        if usable and self._updating.observes and free is not None:
            usable = self._observe(free)
        self._count(usable)
        if not usable:
            return False
        self._apply(gradients, self.param_groups, free)
        return True

    def _apply(
        self, gradients: Gradients, groups: list[dict[str, Any]], free: FreePhase | None
    ) -> None:
        twins = learning(self.how, free.feedback if free else None)
        with phase("mep: update"):
            self._updating.apply(gradients, groups, self._roles, self.state, twins)
        torch.clear_autocast_cache()  # of weights as they were

    def _feedback(self, model: nn.Module) -> dict[int, Tensor] | None:
        return feedback_weights(model, self.how, self._parameters(), self.state)

    def _observe(self, free: FreePhase) -> bool:
        with full(free.loss.device):
            return self._updating.observe(
                self._parameters(), self._roles, self.state, partial(free_signals, free)
            )

    def _count(self, usable: bool) -> None:
        self.skipped_in_a_row = 0 if usable else self.skipped_in_a_row + 1
        self.skipped += not usable
        if self.skipped_in_a_row > self.max_skipped:
            raise RuntimeError(too_many_skipped(self.skipped_in_a_row))
