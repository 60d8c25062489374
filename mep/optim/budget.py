"""A step within a memory budget."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mep.blocks import Chain
from mep.contrast import (
    BlockSegments,
    Estimate,
    FlatSegments,
    Layers,
    Segments,
    Settings,
    chain_of,
    check_input,
    contrast_streamed,
    footprints,
    free_phase,
    layers_of,
    standing,
)
from mep.memory import Plan, parse, plan
from mep.optim.blockwise import BlockUpdates, by_block
from mep.optim.lessons import Lessons, plain_rule
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
        self._compiled = False  # whether the plan is one of compiled passes
        self._layers: tuple[weakref.ref[Chain], Layers | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy's chain is its own.
        return {**vars(self), "plan": None, "_planned_for": None, "_layers": None}

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
        flat = None if feedback else self._flat(chain, x, updates)
        self.plan = self._plan(chain, x, target, updates, flat)
        if not self.plan.levels:
            return by_block(free_phase(model, x, target, how, feedback), how, updates, within=True)
        segments: Segments = BlockSegments(chain, updates.collect, updates.make, feedback)
        if flat is not None and self._compiled:
            segments = flat
        return contrast_streamed(
            segments, x, target, how, self.plan, state_dtype=self.state_dtype
        )  # fmt: skip

    def _flat(self, chain: Chain, x: Tensor, updates: BlockUpdates) -> FlatSegments | None:
        """Returns compiled passes, for a batch and a rule that have them."""
        if self._layers is None or self._layers[0]() is not chain:
            self._layers = weakref.ref(chain), layers_of(chain)
        layers, rule = self._layers[1], plain_rule(updates.updating)
        if layers is None or rule is None:
            return None
        lessons = Lessons(layers, rule, updates)
        return FlatSegments.of(layers, x, lessons.take) if lessons.fit() else None

    def _plan(
        self,
        chain: Chain,
        x: Tensor,
        target: Tensor,
        updates: BlockUpdates,
        flat: FlatSegments | None,
    ) -> Plan:
        # Whatever changes a model makes a new chain of it.
        batch = x.shape, x.dtype, x.is_contiguous(), target.shape, target.dtype
        wanted = weakref.ref(chain), batch, flat and hash((*flat.widths,))
        if self.plan is None or self._planned_for != wanted:
            found = footprints(chain, x, updates.measure)
            dtype = chain.parameter.dtype
            share = (self.state_dtype or dtype).itemsize / dtype.itemsize
            base = standing(x, target, found[-1].state)
            self.plan, self._compiled = plan(found, self.size, base=base, share=share), False
            if self.plan.levels and flat is not None:
                base, found = base + flat.standing, flat.footprints()
                with suppress(ValueError):  # of small batches, bookkeeping takes more than states
                    self.plan = plan(found, self.size, base=base, share=share, least=1)
                    self._compiled = True
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
