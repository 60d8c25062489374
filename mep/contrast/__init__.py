"""Stencils and the estimator: nudged phases -> local signals -> gradients."""

from mep.contrast.blockwise import check_blockwise, contrast_blockwise
from mep.contrast.estimate import Estimate, Sink, contrast, estimate
from mep.contrast.fisher import free_signals, free_sweeps
from mep.contrast.flat import FlatSegments, Lesson
from mep.contrast.footprint import footprints, standing
from mep.contrast.inspect import energy, free_states, settle, state_gradients
from mep.contrast.layers import Layers, layers_of
from mep.contrast.phases import chain_of, check_input, energy_of, free_phase
from mep.contrast.segments import BlockSegments, Segments
from mep.contrast.settings import Settings, settings
from mep.contrast.stencils import (
    Stencil,
    centered,
    five_point,
    holomorphic,
    one_sided,
    random_sign,
)
from mep.contrast.streaming import contrast_streamed
from mep.contrast.strength import AutoBeta, Easing

__all__ = [
    "AutoBeta",
    "BlockSegments",
    "Easing",
    "Estimate",
    "FlatSegments",
    "Layers",
    "Lesson",
    "Segments",
    "Settings",
    "Sink",
    "Stencil",
    "centered",
    "chain_of",
    "check_blockwise",
    "check_input",
    "contrast",
    "contrast_blockwise",
    "contrast_streamed",
    "energy",
    "energy_of",
    "estimate",
    "five_point",
    "footprints",
    "free_phase",
    "free_signals",
    "free_states",
    "free_sweeps",
    "holomorphic",
    "layers_of",
    "one_sided",
    "random_sign",
    "settings",
    "settle",
    "standing",
    "state_gradients",
]
