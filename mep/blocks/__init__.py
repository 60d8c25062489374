"""Model -> Chain of Blocks: prediction, vjp, displacement and local gradient of every block."""

from mep.blocks.block import Block, parameters_of, sample_norm
from mep.blocks.buffers import Buffers, give
from mep.blocks.chain import Chain, TraceError, trace
from mep.blocks.closed import ClosedBlock, Point
from mep.blocks.dense import DenseBlock
from mep.blocks.layers import Linear
from mep.blocks.operations import Reshape, Scale
from mep.blocks.randomness import random_state, replayed
from mep.blocks.run import Feedback, product
from mep.blocks.skip import SkipBlock

__all__ = [
    "Block",
    "Buffers",
    "Chain",
    "ClosedBlock",
    "DenseBlock",
    "Feedback",
    "Linear",
    "Point",
    "Reshape",
    "Scale",
    "SkipBlock",
    "TraceError",
    "give",
    "parameters_of",
    "product",
    "random_state",
    "replayed",
    "sample_norm",
    "trace",
]
