"""Names that users of earlier code know, in the words of this library."""

from __future__ import annotations

from typing import Any

from mep.settling import GradientDescent

__all__ = ["with_settler"]


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
