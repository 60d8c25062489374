"""Memory: a tracker of live bytes, and plans that keep a step within a budget."""

from mep.memory.plan import Footprint, Plan, Update, plan, spans
from mep.memory.size import parse, show
from mep.memory.tracker import KINDS, Usage, label, phase, show_use, track, watched

__all__ = [
    "KINDS",
    "Footprint",
    "Plan",
    "Update",
    "Usage",
    "label",
    "parse",
    "phase",
    "plan",
    "show",
    "show_use",
    "spans",
    "track",
    "watched",
]
