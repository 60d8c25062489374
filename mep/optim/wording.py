"""Options as they are given, in the words of this library, and what is said to those who err."""

from __future__ import annotations

from typing import Any

from torch import nn

from mep.contrast import energy_of
from mep.settling import GradientDescent

__all__ = ["NO_BATCH", "NO_GRAD", "chosen_of", "too_many_skipped", "with_settler"]

NO_BATCH = (
    "give both `x` and `target`, and no closure with them (Lightning adds one: use "
    "opt.optimizer.step(x=..., target=...) there)"
)
NO_GRAD = (
    "`memory_budget` and `.grad` exclude each other: gradients that are kept take more than that. "
    "Take steps by step(x=..., target=...)"
)


def too_many_skipped(count: int) -> str:
    """Says that so many updates in a row have been skipped, and what to do."""
    return (
        f"{count} updates in a row were skipped because settling diverged or loss or gradients "
        "were not finite; parameters are as after the last good step. Lower `lr` or `beta`, or use "
        "an isometric start from mep.init"
    )


def with_settler(chosen: dict[str, Any]) -> dict[str, Any]:
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


def chosen_of(model: nn.Module | None, mode: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that were given, if anything settles at all, and the model's energy.

    Args:
        model: the model, or None.
        mode: ``"ep"`` or ``"backprop"``.
        options: by name; None for those that were not given.

    Raises:
        TypeError, ValueError: if model or mode are no such thing, or nothing settles.
    """
    if mode not in ("ep", "backprop"):
        raise ValueError(f"`mode` must be 'ep' or 'backprop', got {mode!r}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
    chosen = {name: value for name, value in options.items() if value is not None}
    if chosen and (mode == "backprop" or model is None):
        why = "mode='backprop' does not settle" if model else "without `model` nothing settles"
        raise ValueError(f"{why}: drop {', '.join(sorted(chosen))}")
    if mode == "ep":
        chosen["energy"] = energy_of(model, chosen.get("energy"))
    return chosen
