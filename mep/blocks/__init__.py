"""Model -> Chain of Blocks: prediction, vjp, displacement and local gradient of every block."""

from mep.blocks.block import Block, sample_norm
from mep.blocks.buffers import Buffers, give
from mep.blocks.chain import Chain, TraceError, trace

__all__ = ["Block", "Buffers", "Chain", "TraceError", "give", "sample_norm", "trace"]
