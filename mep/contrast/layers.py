"""Multilayer perceptrons among chains: those that have compiled steps."""

from __future__ import annotations

from typing import Any

from torch import nn

from mep.blocks import Block, Chain, ClosedBlock, DenseBlock, Linear, Reshape, SkipBlock

__all__ = ["Layers", "Parameters", "layers_of"]

# Weights and biases, layer by layer.
Parameters = tuple[list[nn.Parameter], list[nn.Parameter | None]]


class Layers:
    """A chain of linear layers with activations between them, and skips around some.

    Args:
        chain: one of which ``layers_of`` has found that it is one.

    Attributes:
        flattens: whether the first layer takes an input of any shape.
        activations: by name, one below every layer but the first.
        skips: whether a skip leads around a layer.
    """

    def __init__(self, chain: Chain) -> None:
        first, others = chain.blocks[0], chain.blocks[1:]
        assert isinstance(first, ClosedBlock) and first.layer is not None
        self.flattens = bool(first.operations)
        dense = [block for block in map(_dense, others) if block is not None]
        # Where parameters are looked up: modules themselves take longer.
        modules = [first.layer.module, *(block.modules[-1] for block in dense)]
        self._homes = [module._parameters for module in modules]
        self.skips = [False, *(isinstance(block, SkipBlock) for block in others)]
        self.activations = [block.activation.name for block in dense]

    def __len__(self) -> int:
        return len(self.skips)

    def parameters(self, start: int = 0, stop: int | None = None) -> Parameters:
        """Returns weights and biases as they are now, of some layers or all."""
        homes = self._homes[start:stop]
        return [own["weight"] for own in homes], [own["bias"] for own in homes]  # pyright: ignore


def layers_of(chain: Any) -> Layers | None:
    """Returns the layers of a chain that is plain enough, else None.

    >>> import mep
    >>> layers_of(mep.trace(mep.models.mlp(4, [8, 8], 2, nn.Tanh))).activations
    ['tanh', 'tanh']
    """
    plain = (
        isinstance(chain, Chain)
        and _is_first(chain.blocks[0])
        and len(chain.blocks) > 1
        and all(_dense(block) is not None for block in chain.blocks[1:])
    )
    return Layers(chain) if plain else None


def _dense(block: Block) -> DenseBlock | None:
    """Returns an activation and its linear layer, also those that a skip leads around."""
    inner = block.branch[0] if isinstance(block, SkipBlock) and len(block.branch) == 1 else block
    return inner if isinstance(inner, DenseBlock) else None


def _is_first(block: Any) -> bool:
    """Returns whether a block is a linear layer, of the input as it is or flattened."""
    if type(block) is not ClosedBlock or type(block.layer) is not Linear:
        return False
    return all(isinstance(op, Reshape) and _flattens(op.module) for op in block.operations)


def _flattens(module: Any) -> bool:
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
