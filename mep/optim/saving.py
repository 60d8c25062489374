"""What travels with an optimizer: checkpoints, copies, pickles."""

from __future__ import annotations

from typing import Any

import torch

from mep.blocks import Buffers
from mep.contrast.flat import Room
from mep.optim.groups import roles

__all__ = ["Saved"]


class _Numbers(list[int]):
    """Numbers of parameters: torch looks each up among all, which takes hours at 200,000."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(numbers)
        self._known = {*numbers}

    def __contains__(self, number: object) -> bool:
        return number in self._known


class Saved(torch.optim.Optimizer):
    """The part of an ``EPOptimizer`` that is saved and restored; attributes are its own."""

    def state_dict(self: Any) -> dict[str, Any]:
        """Returns torch's state dict with the count of skipped updates."""
        counts = {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "easing": self.easing.factor,
            "further": self.room.further,
        }
        return {**super().state_dict(), "ep": counts}

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` returned; what ``torch.optim.SGD`` does not save stays."""
        for group in state_dict["param_groups"]:
            self.rule.check({**self.defaults, **group})  # before anything is loaded
        groups = [{**g, "params": _Numbers(g["params"])} for g in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group in self.param_groups:
            group.setdefault("lr_scale", self.defaults["lr_scale"])
        counts = state_dict.get("ep", {})
        self.skipped = counts.get("skipped", 0)
        self.skipped_in_a_row = counts.get("skipped_in_a_row", 0)
        self.easing.factor = counts.get("easing", 1.0)
        self.room.further = counts.get("further", False)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super().__setstate__({"room": Room(), **state})
        self._buffers = Buffers()
        self._know(roles(self.model, self._parameters()))  # a copy has parameters of its own

    def __getstate__(self: Any) -> dict[str, Any]:
        # The base class keeps three entries only; a scheduler's patched `step` must not travel.
        kept = (
            "model", "mode", "_updating", "easing", "room", "blockwise", "_budget", "how",
            "last", "max_skipped", "skipped", "skipped_in_a_row", "unsettled",
        )  # fmt: skip
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}
