"""Measured comparisons, each: run -> `Record` -> table and plot."""

from mep.bench.record import Record, environment
from mep.bench.report import publish
from mep.bench.table import Table
from mep.bench.timing import interleave, spread

__all__ = ["Record", "Table", "environment", "interleave", "publish", "spread"]
