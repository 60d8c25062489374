"""Model -> Chain of Blocks: prediction, vjp, displacement and local gradient of every block."""

from mep.blocks.block import Block
from mep.blocks.chain import Chain, TraceError, trace

__all__ = ["Block", "Chain", "TraceError", "trace"]
