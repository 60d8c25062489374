"""Constraints on parameters. They know nothing of EP."""

from mep.constraints.constraint import Constraint

__all__ = ["Constraint"]
