"""EPOptimizer: the one place where estimating and updating meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mep.blocks import Buffers
from mep.constraints import Constraint
from mep.contrast import (
    AutoBeta,
    Estimate,
    Settings,
    Stencil,
    chain_of,
    contrast,
    free_phase,
    free_signals,
    settings,
)
from mep.contrast.phases import check_input
from mep.curvature import Signal
from mep.energies import Cost, Energy, FreePhase, cost_of
from mep.optim.gradients import Gradients
from mep.optim.groups import roles
from mep.optim.updating import Updating
from mep.settling import DIVERGED, GradientDescent, Solver
from mep.updates import Rule

__all__ = ["EPOptimizer"]


@dataclass
class _Step:
    """What one batch has given: loss, gradients, whether they can be used, and what is left to do.

    ``keep_statistics`` takes whether an update was made; ``free`` is the free phase, where there
    is one.
    """

    loss: Tensor
    gradients: Gradients
    usable: bool
    keep_statistics: Callable[[bool], None]
    free: FreePhase | None


class EPOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose ``step(x=, target=)`` settles, contrasts and updates.

    ``theta <- rule(theta, g)`` with ``g`` the estimate that ``mep.estimate`` describes. Without a
    batch, ``step()`` applies the same rule to ``.grad``, so backprop with the very same rule is
    ``loss.backward(); opt.step()``. ``step(x=, target=)`` neither reads nor writes ``.grad``.

    What a scheduler may change (``lr``, ``momentum``, ``weight_decay``, ``lr_scale``) stands in the
    parameter groups; what shapes the computation is fixed at construction. No loss scaling is
    needed in float32 and bfloat16: do not use a ``GradScaler``, it would divide an EP gradient
    that was never multiplied.

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
        cost: ``"cross_entropy"``, ``"mse"`` or a cost object.
        energy: ``mep.PredictionError(output=...)``.
        settler: ``mep.Sweep()`` by default.
        stencil: ``mep.one_sided`` by default.
        beta: ``"auto"``, a number > 0 or ``mep.AutoBeta(c)``.
        settle_steps: selects gradient settling with so many steps.
        settle_lr: selects gradient settling with this step size.
        gradient_method: ``"analytic"`` (default) or ``"autograd"``.
        max_skipped: after more updates than this skipped in a row, because settling diverged,
            ``step`` raises. >= 0.

    Attributes:
        model, mode: as given.
        how: the frozen strategy of the estimates.
        last: the ``Estimate`` of the last EP step, None before the first.
        skipped: updates skipped so far because settling diverged or loss or gradients were not
            finite.

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
        cost: str | Cost = "cross_entropy",
        energy: Energy | None = None,
        settler: Solver | None = None,
        stencil: Stencil | None = None,
        beta: float | str | AutoBeta | None = None,
        settle_steps: int | None = None,
        settle_lr: float | None = None,
        gradient_method: str | None = None,
        max_skipped: int = 10,
    ) -> None:
        if mode not in ("ep", "backprop"):
            raise ValueError(f"`mode` must be 'ep' or 'backprop', got {mode!r}")
        if not isinstance(max_skipped, int) or max_skipped < 0:
            raise ValueError(f"`max_skipped` must be a whole number >= 0, got {max_skipped!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
        options = {
            "energy": energy,
            "settler": settler,
            "settle_steps": settle_steps,
            "settle_lr": settle_lr,
            "stencil": stencil,
            "beta": beta,
            "gradient_method": gradient_method,
        }
        chosen = {name: value for name, value in options.items() if value is not None}
        if chosen and (mode == "backprop" or model is None):
            why = "mode='backprop' does not settle" if model else "without `model` nothing settles"
            raise ValueError(f"{why}: drop {', '.join(sorted(chosen))}")
        self.model = model
        self.mode = mode
        self._updating = Updating(update, constraint, clip_norm)
        self.max_skipped = max_skipped
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.last: Estimate | None = None
        self._buffers = Buffers()
        self.how: Settings = settings(cost=cost_of(cost), **_with_settler(chosen))
        defaults = {
            "lr": lr,
            "lr_scale": 1.0,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)
        if mode == "ep" and model is not None:
            chain_of(model, self.how.gradient_method)  # refuse an unreadable model at once

    @property
    def rule(self) -> Rule:
        """The update rule."""
        return self._updating.rule

    @property
    def constraint(self) -> Constraint | None:
        """The constraint, or None."""
        return self._updating.constraint

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
        if self.model is not None:
            own = {id(p) for p in self.model.parameters()}
            foreign = sum(id(p[1] if isinstance(p, tuple) else p) not in own for p in params)
            if foreign:
                raise ValueError(
                    f"{foreign} of {len(params)} parameters do not belong to `model`; "
                    "pass model.parameters()"
                )
        new = [p[1] if isinstance(p, tuple) else p for p in params]
        found = roles(self.model, [*self._parameters(), *new])
        if all(isinstance(p, Tensor) for p in new):  # torch itself refuses anything else
            self._updating.refuse(new, found)
        super().add_param_group({**param_group, "params": params})
        self._roles = found
        self._updating.prepare(new, found, self.state)

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
            raise ValueError(
                "give both `x` and `target`, and no closure with them (Lightning's wrapper adds "
                "one: call opt.optimizer.step(x=..., target=...) there)"
            )
        if self.model is None:
            raise ValueError("`step(x=, target=)` needs EPOptimizer(..., model=model)")
        estimator = self._contrast if self.mode == "ep" else self._backprop
        with torch.no_grad(), self._buffers.lend():
            found = estimator(self.model, x, target)
            found.keep_statistics(self._update(found.gradients, found.usable, found.free))
        return found.loss

    def _step_on_grad(self, closure: Callable[[], Any] | None) -> Any:
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

    def _contrast(self, model: nn.Module, x: Tensor, target: Tensor) -> _Step:
        gradients = Gradients(self._updating.factored(self._parameters(), self._roles))
        free = free_phase(model, x, target, self.how)
        self.last = contrast(free, self.how, gradients.collect)
        usable = self.last.status != DIVERGED
        return _Step(
            self.last.loss, gradients, usable, lambda taken: free.commit() if taken else None, free
        )

    def _backprop(self, model: nn.Module, x: Tensor, target: Tensor) -> _Step:
        check_input(model, x)
        buffers = [(b, b.clone()) for b in model.buffers()]

        def keep_statistics(taken: bool) -> None:
            """Neither bad input nor a skipped update moves a running statistic."""
            for buffer, before in buffers if not taken else ():
                buffer.data.copy_(before)

        try:
            with torch.enable_grad():
                loss = self.how.cost.mean(model(x), target)
        except Exception:
            keep_statistics(False)
            raise
        gradients = Gradients()
        owned = [p for p in self._parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, owned, allow_unused=True) if owned else ()
        for p, g in zip(owned, found, strict=True):
            if g is not None:
                gradients.put(p, g)
        free = free_phase(model, x, target, self.how) if self._updating.observes else None
        return _Step(loss.detach(), gradients, math.isfinite(loss.item()), keep_statistics, free)

    def _update(self, gradients: Gradients, usable: bool = True, free: Any = None) -> bool:
        """Applies the rules unless something is not finite; returns whether it did."""
        usable = usable and gradients.finite()
        self._count(usable)
        if not usable:
            return False
        if self._updating.observes:
            self._observe(free)
        self._updating.apply(gradients, self.param_groups, self._roles, self.state)
        return True

    def _observe(self, free: FreePhase | None) -> None:
        def signals(targets: str) -> dict[int, list[Signal]]:
            if free is None:
                name = type(self.rule).__name__
                raise ValueError(
                    f"`update={name}(...)` needs local signals, which `.grad` does not carry: "
                    "take steps by step(x=..., target=...)"
                )
            return free_signals(free, targets)

        self._updating.observe(self._parameters(), self._roles, self.state, signals)

    def _count(self, usable: bool) -> None:
        self.skipped_in_a_row = 0 if usable else self.skipped_in_a_row + 1
        self.skipped += not usable
        if self.skipped_in_a_row > self.max_skipped:
            raise RuntimeError(
                f"{self.skipped_in_a_row} updates in a row were skipped because settling diverged "
                "or loss or gradients were not finite; parameters are as after the last good step. "
                "Lower `lr` or `beta`, or use an isometric start from mep.init"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict with the count of skipped updates."""
        counts = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return {**super().state_dict(), "ep": counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` returned; what ``torch.optim.SGD`` does not save stays."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("lr_scale", self.defaults["lr_scale"])
        counts = state_dict.get("ep", {})
        self.skipped = counts.get("skipped", 0)
        self.skipped_in_a_row = counts.get("skipped_in_a_row", 0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers = Buffers()
        self._roles = roles(self.model, self._parameters())  # a copy has parameters of its own

    def __getstate__(self) -> dict[str, Any]:
        # The base class keeps three entries only; a scheduler's patched `step` must not travel.
        kept = (
            "model",
            "mode",
            "_updating",
            "how",
            "last",
            "max_skipped",
            "skipped",
            "skipped_in_a_row",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}


def _with_settler(chosen: dict[str, Any]) -> dict[str, Any]:
    """Replaces ``settle_steps`` and ``settle_lr`` by the solver that they select."""
    names = {"settle_steps": "max_steps", "settle_lr": "lr"}
    given = {names[name]: value for name, value in chosen.items() if name in names}
    if not given:
        return chosen
    if "settler" in chosen:
        raise ValueError(
            "`settle_steps` and `settle_lr` select gradient settling; with `settler=` give "
            "mep.GradientDescent(max_steps=..., lr=...) instead"
        )
    rest = {name: value for name, value in chosen.items() if name not in names}
    return {**rest, "settler": GradientDescent(**given)}
