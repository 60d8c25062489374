"""The chain: a model as blocks, and the free phase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mep.blocks.block import Block, parameters_of
from mep.blocks.closed import ClosedBlock
from mep.blocks.dense import DenseBlock
from mep.blocks.fused import FusedBlock
from mep.blocks.layers import layer_of
from mep.blocks.local import LocalBlock
from mep.blocks.operations import Dropout, Pointwise, operation_of
from mep.blocks.pieces import Piece, pieces_of
from mep.blocks.run import runs_of
from mep.blocks.skip import SkipBlock, branch_of

__all__ = ["Chain", "TraceError", "trace"]

# Parameters of these belong to the block they precede: they scale a state, they do not predict one.
_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.PReLU,
)


class TraceError(ValueError):
    """A model that cannot be read as a chain; the message lists every reason and the remedy."""


class Chain:
    """A model as blocks ``f_1 ... f_L`` with ``s_i = f_i(s_{i-1})``, ``s_0 = x``.

    Attributes:
        blocks: the blocks, from input to output. They share the model's modules and parameters.
        runs: the same blocks, those together that are taken together.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.runs = runs_of(blocks)
        modules = (m for block in blocks for root in block.modules for m in root.modules())
        # Where a parameter is looked up: a step asks for one, and walking there takes longer.
        known = ((m._parameters, name, p) for m in modules for name, p in m._parameters.items())
        self._home, self._name = next((home, name) for home, name, p in known if p is not None)

    @property
    def parameter(self) -> Tensor:
        """A parameter of the chain: what it says of dtype and device holds for all."""
        found = self._home[self._name]
        return next(self.parameters()) if found is None else found

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @torch.no_grad()
    def free(self, x: Tensor) -> tuple[list[Tensor], list[Any]]:
        """Runs the free phase: the forward pass, which is the free equilibrium exactly.

        Args:
            x: input, shape ``(B, *in)``.

        Returns:
            The states ``s_1 ... s_L`` and each block's point at its input.

        Raises:
            ValueError: if a block cannot take its input; the message names the block.
        """
        states, points, s = [], [], x
        for run in self.runs:
            above, at = run.free(s, x)
            s = above[-1]
            states += above
            points += at
        return states, points

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every parameter of the chain once."""
        yield from parameters_of(self.blocks)


def trace(model: nn.Module, *, gradient_method: str = "analytic") -> Chain:
    """Reads a model as a chain of blocks.

    A block is the parameter-free modules and normalisations that come first and then one weighted
    module (Linear, Conv2d, a residual or attention block, any module with parameters), so states
    are pre-activations and the last one is the logits. Trailing parameter-free modules form a last
    block.

    Args:
        model: a module that takes one tensor and returns one tensor: a nested ``nn.Sequential``, or
            anything ``torch.fx`` can record.
        gradient_method: ``"analytic"`` uses closed forms where there are any, ``"autograd"``
            differentiates every block by local autograd (the reference).

    Returns:
        The chain, sharing the model's parameters.

    Raises:
        TraceError: if the model cannot be cut; the message lists every reason.
        TypeError: if ``model`` is no module.
        ValueError: if ``gradient_method`` is unknown.

    >>> chain = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> [block.describe() for block in chain]
    ['Linear(4, 8)', 'ReLU > Linear(8, 2)']

    Source: Whittington & Bogacz 2017 (the chain); here with pre-activation states.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
    if gradient_method not in ("analytic", "autograd"):
        raise ValueError(
            f"`gradient_method` must be 'analytic' or 'autograd', got {gradient_method!r}"
        )
    pieces, reasons = pieces_of(model)
    groups = _group(pieces)
    reasons += _stateful_sharing(groups)
    if not reasons and not any(True for _ in model.parameters()):
        reasons.append("it has no parameters")
    if reasons:
        raise TraceError(
            "the model cannot be cut into a chain of blocks:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    closed = gradient_method == "analytic"
    return Chain([_block(group, closed) for group in groups])


def _group(pieces: list[Piece]) -> list[list[Piece]]:
    """Closes a group at every weighted piece; what trails makes a last group."""
    groups: list[list[Piece]] = []
    open_group: list[Piece] = []
    for piece in pieces:
        open_group.append(piece)
        if _is_weighted(piece.module):
            groups.append(open_group)
            open_group = []
    return [*groups, open_group] if open_group else groups


def _is_weighted(module: nn.Module) -> bool:
    has_parameters = next(module.parameters(), None) is not None
    return has_parameters and not isinstance(module, _NORMALISATIONS)


def _stateful_sharing(groups: list[list[Piece]]) -> list[str]:
    """A module with running statistics in two blocks would have one update overwrite the other."""
    home: dict[int, str] = {}
    reasons = []
    for group in groups:
        name = group[-1].name
        for piece in group:
            for buffer in piece.module.buffers():
                if home.setdefault(id(buffer), name) != name:
                    reasons.append(
                        f"`{piece.name}` keeps buffers (running statistics) and is used in two "
                        f"blocks, `{home[id(buffer)]}` and `{name}`; give each block its own module"
                    )
    return list(dict.fromkeys(reasons))  # one per module, not one per buffer


def _block(group: list[Piece], closed: bool) -> Block:
    modules = [piece.module for piece in group]
    name = group[-1].name
    layer = layer_of(modules[-1])
    front = modules if layer is None else modules[:-1]
    operations = [operation_of(module) for module in front]
    known = [op for op in operations if op is not None]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    if closed and not hooked and len(known) == len(operations):
        if layer is not None and DenseBlock.fits(known, layer):
            return DenseBlock(name, modules, known, layer)
        if layer is not None and FusedBlock.fits(known, layer):
            return FusedBlock(name, modules, known, layer)
        return ClosedBlock(name, modules, known, layer)
    skip = _skip_block(name, modules) if closed and not hooked else None
    return LocalBlock(name, modules) if skip is None else skip


def _skip_block(name: str, modules: list[nn.Module]) -> SkipBlock | None:
    """Returns a residual block in closed form, or None."""
    parts = branch_of(modules[0]) if len(modules) == 1 else None
    if parts is None or any(m._forward_hooks or m._forward_pre_hooks for m in parts):
        return None
    branch = [_block(group, True) for group in _group([Piece(name, part) for part in parts])]
    closed = [block for block in branch if isinstance(block, ClosedBlock)]
    if len(closed) < len(branch) or not all(map(_keeps_shape, closed)):
        return None
    layers = [block.layer for block in closed if block.layer is not None]
    same = layers[0].weight.shape[1] == layers[-1].weight.shape[0]
    return SkipBlock(name, modules, branch) if same else None


def _keeps_shape(block: ClosedBlock) -> bool:
    """Returns whether a block, whatever its input, changes the number of features alone.

    Where a branch may change more, torch may broadcast. What ends without a layer may return its
    input itself, to which nothing can be added.
    """
    kept = all(isinstance(op, (Dropout, Pointwise)) for op in block.operations)
    if block.layer is None or not kept:
        return False
    m = block.layer.module
    if not isinstance(m, nn.Conv2d):
        return True
    sizes = zip(m.stride, m.padding, m.dilation, m.kernel_size, strict=True)
    return m.groups == 1 and all(s == 1 and 2 * int(p) == d * (k - 1) for s, p, d, k in sizes)
