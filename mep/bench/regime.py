"""How a run's regime is recorded and named; every EP figure carries these numbers."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mep.diagnostics import Diagnosis

__all__ = ["LIMIT", "describe", "label", "measure", "pool"]

LIMIT = "limit (= backprop)"
"""The name of the limit in every table and plot: its gradient is backprop's by algebra."""

# The least favourable first: a set of runs is called by its worst member.
_REGIMES = ("limit", "not settled", "finite nudge")


def measure(diagnosis: Diagnosis) -> dict[str, Any]:
    """The numbers of a diagnosis that a record keeps.

    Args:
        diagnosis: from `mep.diagnose`.

    Returns:
        ``regime, residual`` (median), ``residual_q95, residual_aggregate, cosine, c, beta,
        sweeps, displacement, displacement_ratio, layers_with_gradient, dtype``.
    """
    same = (
        "regime", "cosine", "c", "beta", "sweeps", "displacement", "displacement_ratio",
        "layers_with_gradient", "dtype",
    )  # fmt: skip
    return {
        **{key: getattr(diagnosis, key) for key in same},
        "residual": diagnosis.median,
        "residual_q95": diagnosis.q95,
        "residual_aggregate": diagnosis.aggregate,
    }


def pool(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One set of numbers for several runs: medians, and the least favourable regime.

    Example:
        >>> runs = [{"regime": "limit", "c": 0.1}, {"regime": "finite nudge", "c": 0.3}]
        >>> pool([{**run, "residual": 0, "residual_aggregate": 0, "cosine": 1} for run in runs])
        {'regime': 'limit', 'residual': 0.0, 'residual_aggregate': 0.0, 'cosine': 1.0, 'c': 0.2}
    """
    if not measured:
        return {}
    worst = min((run["regime"] for run in measured), key=_REGIMES.index)
    keys = ("residual", "residual_aggregate", "cosine", "c")
    return {"regime": worst} | {key: _median([run[key] for run in measured]) for key in keys}


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None


def label(subject: str, regimes: Collection[str]) -> str:
    """A short name for a curve or a line: the arm with the regimes it was found in.

    Example:
        >>> label("EP", ["finite nudge"]), label("backprop", [])
        ('EP (finite nudge)', 'backprop')
    """
    if subject == LIMIT or not regimes:
        return subject
    names = [LIMIT if regime == "limit" else regime for regime in dict.fromkeys(regimes)]
    return f"{subject} ({', '.join(names)})"


def describe(summary: Mapping[str, Any]) -> str:
    """An arm's name with its regime, nudging strength and residuals, or just its name.

    Args:
        summary: has ``subject`` and, unless that is backprop, what `pool` returns.

    Returns:
        The words under which any figure of the arm is quoted.

    Example:
        >>> ours = {"subject": "EP", "regime": "finite nudge", "c": 0.05}
        >>> describe({**ours, "residual": 3e-3, "residual_aggregate": 2e-2})
        'EP (finite nudge, c = 0.05, residual 3e-03, aggregate 2e-02)'
    """
    if summary["subject"] == LIMIT or "regime" not in summary:
        return summary["subject"]
    if summary["regime"] == "limit":
        return f"{summary['subject']}, {LIMIT}"
    strength = f"c = {summary['c']:.2g}" if summary["c"] is not None else "fixed beta"
    return (
        f"{summary['subject']} ({summary['regime']}, {strength}, "
        f"residual {summary['residual']:.0e}, aggregate {summary['residual_aggregate']:.0e})"
    )
