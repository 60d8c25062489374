"""Fair timing: the arms take turns, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Findings", "interleave", "spread"]

Findings = Callable[[], Mapping[str, Any]]
Arm = Callable[[], Findings | None]


def interleave(
    arms: Mapping[str, Arm],
    rounds: int,
    warmup: int = 3,
    *,
    baseline: str,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Time the arms one after another within every round, in rotating order.

    The figure of merit is the ratio to the baseline of the *same* round: drifts slower than a
    round cancel from it.

    Args:
        arms: name -> what to time. It may return a function that reads off what was measured: it
            is called after the clock, and its findings are kept in the row.
        rounds: timed rounds, >= 1.
        warmup: rounds run first and not kept, >= 0.
        baseline: the arm the ratios refer to.
        clock: seconds; on an accelerator one that waits for it.

    Returns:
        One row per round and arm: ``round, arm, ms, ratio`` and the arm's own measurements.

    Raises:
        ValueError: for a count out of range or a baseline that is not an arm.

    Example:
        >>> rows = interleave({"a": lambda: None, "b": lambda: None}, rounds=2, baseline="a")
        >>> [row["ratio"] for row in rows if row["arm"] == "a"]
        [1.0, 1.0]
    """
    if baseline not in arms:
        raise ValueError(f"`baseline` must be one of the arms {list(arms)}, got {baseline!r}.")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"`rounds` must be >= 1 and `warmup` >= 0, got {rounds} and {warmup}.")
    names = list(arms)
    rows: list[dict[str, Any]] = []
    for index in range(-warmup, rounds):
        first = index % len(names)
        timed = {name: _time(arms[name], clock) for name in names[first:] + names[:first]}
        if index >= 0:
            rows += [_row(index, name, timed[name], timed[baseline]) for name in names]
    return rows


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and the quartiles around it.

    Args:
        values: at least one number.

    Returns:
        Median, lower quartile, upper quartile.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
        (3.0, 2.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


Timed = tuple[float, Mapping[str, Any]]


def _time(arm: Arm, clock: Callable[[], float]) -> Timed:
    started = clock()
    findings = arm()
    seconds = clock() - started
    return seconds, findings() if findings else {}


def _row(index: int, name: str, timed: Timed, baseline: Timed) -> dict[str, Any]:
    ratio = timed[0] / baseline[0] if baseline[0] > 0 else float("nan")
    return {"round": index, "arm": name, "ms": 1e3 * timed[0], "ratio": ratio, **timed[1]}
