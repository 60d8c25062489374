"""EPOptimizer: the one place where estimating and updating meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mep.blocks import Buffers
from mep.contrast import (
    AutoBeta,
    Estimate,
    Settings,
    Stencil,
    chain_of,
    contrast,
    free_phase,
    settings,
)
from mep.contrast.phases import check_input
from mep.energies import Cost, Energy, cost_of
from mep.settling import DIVERGED, GradientDescent, Solver
from mep.updates import SGD

__all__ = ["EPOptimizer", "param_groups"]

_Gradients = dict[int, Tensor]  # by the parameter's id: hashing a tensor is slow


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
        rule: the update rule.
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
        self.rule = SGD()
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
        super().add_param_group({**param_group, "params": params})

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
        gradients: _Gradients = {}
        estimator = self._contrast if self.mode == "ep" else self._backprop
        with torch.no_grad(), self._buffers.lend():
            loss, usable, keep_statistics = estimator(self.model, x, target, gradients)
            keep_statistics(self._update(gradients, usable))
        return loss

    def _step_on_grad(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = (p for group in self.param_groups for p in group["params"])
        with torch.no_grad():
            self._update({id(p): p.grad for p in every if p.grad is not None})
        return loss

    def _contrast(
        self, model: nn.Module, x: Tensor, target: Tensor, gradients: _Gradients
    ) -> tuple[Tensor, bool, Callable[[bool], None]]:
        def collect(parameter: nn.Parameter, gradient: Tensor) -> None:
            known = gradients.get(id(parameter))
            gradients[id(parameter)] = gradient if known is None else known.add_(gradient)

        free = free_phase(model, x, target, self.how)
        self.last = contrast(free, self.how, collect)
        usable = self.last.status != DIVERGED
        return self.last.loss, usable, lambda taken: free.commit() if taken else None

    def _backprop(
        self, model: nn.Module, x: Tensor, target: Tensor, gradients: _Gradients
    ) -> tuple[Tensor, bool, Callable[[bool], None]]:
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
        owned = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        found = torch.autograd.grad(loss, owned, allow_unused=True) if owned else ()
        gradients.update({id(p): g for p, g in zip(owned, found, strict=True) if g is not None})
        return loss.detach(), math.isfinite(loss.item()), keep_statistics

    def _update(self, gradients: _Gradients, usable: bool = True) -> bool:
        """Applies the rule unless something is not finite; returns whether it did."""
        # Sums over a batch may overflow where every residual was finite.
        usable = usable and _all_finite(gradients.values())
        self._count(usable)
        if not usable:
            return False
        for group in self.param_groups:
            chosen = [p for p in group["params"] if id(p) in gradients]
            if chosen:
                states = [self.state[p] for p in chosen]
                self.rule.step(chosen, [gradients[id(p)] for p in chosen], states, group)
        return True

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

    def __getstate__(self) -> dict[str, Any]:
        # The base class keeps three entries only; a scheduler's patched `step` must not travel.
        kept = (
            "model",
            "mode",
            "rule",
            "how",
            "last",
            "max_skipped",
            "skipped",
            "skipped_in_a_row",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}


def _all_finite(gradients: Iterable[Tensor]) -> bool:
    """A sum is finite only if all terms are; it may overflow a little before they do."""
    return math.isfinite(sum(float(g.sum()) for g in gradients))


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


def param_groups(model: nn.Module, lr: float, *, depth_scale: bool = True) -> list[dict[str, Any]]:
    """Splits a model's parameters into groups that carry the depth rule.

    In an isometric chain a step of every layer moves the output by ``L`` times a layer's share, so
    hidden layers take steps of ``lr / L`` and the first and last block of ``lr``. The factor stands
    in the group's ``lr_scale``: schedulers change ``lr`` and keep it.

    Args:
        model: any model that ``mep.trace`` can read.
        lr: learning rate of the first and last block, >= 0.
        depth_scale: False gives every block ``lr_scale=1``.

    Returns:
        Two groups (one for chains of one or two blocks), each parameter once.

    Raises:
        mep.TraceError: if the model cannot be read as a chain.

    >>> [g["lr_scale"] for g in param_groups(nn.Sequential(*[nn.Linear(2, 2)] * 1), 0.1)]
    [1.0]

    Source: the 1/L step of deep residual scaling, Zhang et al. 2019 (Fixup), sec. 3.
    """
    chain = chain_of(model)
    ends = {id(p) for b in (chain.blocks[0], chain.blocks[-1]) for p in b.parameters()}
    every = list(model.parameters())
    outer = [p for p in every if id(p) in ends]
    hidden = [p for p in every if id(p) not in ends]
    groups = [{"params": outer, "lr": lr, "lr_scale": 1.0}]
    if hidden:
        scale = 1.0 / len(chain) if depth_scale else 1.0
        groups.append({"params": hidden, "lr": lr, "lr_scale": scale})
    return groups
