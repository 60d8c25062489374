"""A step within a memory budget."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mep.blocks import Chain
from mep.contrast import (
    Estimate,
    Settings,
    chain_of,
    check_input,
    contrast_streamed,
    footprints,
    free_phase,
    standing,
)
from mep.memory import Plan, parse, plan
from mep.optim.blockwise import BlockUpdates, by_block
from mep.settling import Sweep

__all__ = ["Budget", "budget_of"]


class Budget:
    """What a step may take in memory, and the plan that keeps to it.

    Args:
        size: bytes, or a string such as ``"4MB"``.
        state_dtype: of checkpoints; None for the states' own.

    Raises:
        TypeError, ValueError: if an argument does not fit.

    Attributes:
        plan: of the last step.
    """

    def __init__(self, size: int | str, state_dtype: torch.dtype | None) -> None:
        self.size = parse(size, "memory_budget")
        if state_dtype is not None and not getattr(state_dtype, "is_floating_point", False):
            raise TypeError(
                f"`state_dtype` must be a floating point dtype or None, got {state_dtype!r}"
            )
        self.state_dtype = state_dtype
        self.plan: Plan | None = None
        self._planned_for: tuple | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "plan": None, "_planned_for": None}  # a copy's chain is its own

    def contrast(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        how: Settings,
        updates: BlockUpdates,
        feedback: Mapping[int, Tensor] | None,
    ) -> Estimate:
        """Settles and updates within the budget.

        Raises:
            ValueError: if the batch does not fit the model, or no plan fits the budget; nothing
                has changed then.
        """
        chain = chain_of(model, how.gradient_method)
        check_input(chain, x)
        self.plan = self._plan(chain, x, target, updates)
        if not self.plan.levels:
            return by_block(free_phase(model, x, target, how, feedback), how, updates, within=True)
        return contrast_streamed(
            chain, x, target, how, self.plan, updates.collect, updates.make,
            state_dtype=self.state_dtype, feedback=feedback,
        )  # fmt: skip

    def _plan(self, chain: Chain, x: Tensor, target: Tensor, updates: BlockUpdates) -> Plan:
        # Whatever changes a model makes a new chain of it.
        wanted = weakref.ref(chain), x.shape, x.dtype, target.shape, target.dtype
        if self.plan is None or self._planned_for != wanted:
            found = footprints(chain, x, updates.measure)
            dtype = chain.parameter.dtype
            share = (self.state_dtype or dtype).itemsize / dtype.itemsize
            base = standing(x, target, found[-1].state)
            self.plan = plan(found, self.size, base=base, share=share)
            self._planned_for = wanted
        return self.plan


def budget_of(chosen: dict[str, Any]) -> Budget | None:
    """Takes the options of a budget out of those chosen, and settles by one sweep by default.

    Raises:
        TypeError, ValueError: if they do not fit.
    """
    size, dtype = chosen.pop("memory_budget", None), chosen.pop("state_dtype", None)
    if size is None:
        if dtype is not None:
            raise ValueError("`state_dtype` is that of checkpoints: give `memory_budget`, too")
        return None
    if "blockwise" in chosen:
        raise ValueError("`memory_budget` updates block by block as it is: drop `blockwise`")
    if not {"settler", "settle_steps", "settle_lr"} & set(chosen):
        chosen["settler"] = Sweep(1)
    return Budget(size, dtype)
