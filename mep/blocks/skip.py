"""The residual block in closed form: a skip around blocks that have one themselves."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from mep.blocks.block import Block
from mep.blocks.graph import Run, module_of, works_in_place
from mep.curvature import Signal

__all__ = ["SkipBlock", "branch_of"]


class SkipBlock(Block):
    """``f(s) = s + g(s)`` with ``g`` a chain of blocks, so that ``J^T e = e + J_g^T e``.

    Args:
        name: path of the last weighted module in the model.
        modules: the module that computes all of it.
        branch: the blocks of ``g``; the last one ends with a weighted layer.

    Source: He et al. 2016, eq. 1.
    """

    kind = "closed form"

    def __init__(self, name: str, modules: list[nn.Module], branch: list[Block]) -> None:
        super().__init__(name, modules)
        self.branch = branch

    def predict(self, s: Tensor) -> tuple[Tensor, list[Any]]:
        points, f = [], s
        for block in self.branch:
            f, point = block.predict(f)
            points.append(point)
        if f.shape != s.shape:
            raise ValueError(f"a skip around what makes {tuple(f.shape)} of {tuple(s.shape)}")
        return f.add_(s), points

    def product(self, point: list[Any], e: Tensor) -> Tensor:
        return e

    def pull(self, point: list[Any], product: Tensor) -> Tensor:
        first, at = self.branch[0], point[0]
        return first.pull(at, first.product(at, self._above(point, product)[0])).add_(product)

    def difference(self, point: list[Any], d: Tensor) -> tuple[Tensor, list[Any]]:
        moved, delta = [], d
        for block, at in zip(self.branch, point, strict=True):
            delta, at_moved = block.difference(at, delta)
            moved.append(at_moved)
        return delta.add_(d), moved

    def signals(self, point: list[Any], e: Tensor, scale: float) -> Iterator[Signal]:
        for block, at, error in zip(self.branch, point, self._above(point, e), strict=True):
            yield from block.signals(at, error, scale)

    def describe(self) -> str:
        return f"x + ({' > '.join(block.describe() for block in self.branch)})"

    def _above(self, point: list[Any], e: Tensor) -> list[Tensor]:
        """Returns the errors above all blocks of the branch."""
        errors = [e]
        for block, at in zip(self.branch[:0:-1], point[:0:-1], strict=True):
            errors.append(block.pull(at, block.product(at, errors[-1])))
        return errors[::-1]


def branch_of(module: nn.Module) -> list[nn.Module] | None:
    """Returns the modules of ``g`` if a recorded module computes ``s + g(s)``, else None.

    >>> import mep
    >>> part = mep.trace(mep.models.deep_mlp(3, 8, residual=True)).blocks[1]
    >>> part.describe()
    'x + (ReLU > Linear(8, 8))'
    """
    if not isinstance(module, fx.GraphModule):
        return None
    s, *steps, total, end = module.graph.nodes
    if s.op != "placeholder" or end.args != (total,) or not steps or total.kwargs:
        return None
    if total.op != "call_function" or total.target not in (operator.add, torch.add):
        return None
    parts, before = [], s
    for node in steps:
        # What comes before the first layer may be a view of s, which the skip leads past.
        if works_in_place(node, module) and not any(
            any(True for _ in p.parameters()) for p in parts
        ):
            return None
        part = module_of(module, Run(before, [node]))
        if part is None:
            return None
        parts.append(part)
        before = node
    if {*total.args} != {s, before} or len(total.args) != 2:
        return None
    return parts
