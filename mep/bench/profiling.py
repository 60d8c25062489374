"""Where the time of a step goes: by phase, and within each phase by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from mep.bench.plot import COLOURS, canvas, styled
from mep.bench.record import Record
from mep.bench.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot", "run", "table"]

_PREFIX = "mep: "
# What no torch operation accounts for: Python, and fused kernels, which torch does not see.
_PYTHON = "Python and kernels"
_REST = "the rest"  # checks, bookkeeping
_SHOWN = 5  # operations per phase


def run(
    step: Callable[[], Any], steps: int, config: Mapping[str, Any], command: str, warmup: int = 5
) -> Record:
    """Profile some steps of an optimizer with torch's profiler.

    Args:
        step: takes one step.
        steps: profiled steps, >= 1.
        config: every setting, for the record.
        command: the command line, for the record.
        warmup: steps before them.

    Returns:
        The record: a row per phase and operation with the milliseconds that a step spends in it
        and in nothing below; the summary has the phases. Profiling takes time itself, most of all
        for short operations: shares are to be read, not sums.
    """
    for _ in range(warmup):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            step()
    spent: Counter[tuple[str, str]] = Counter()
    for event in profiled.events() or ():
        if event.device_type.name == "CPU":
            framed = event.name.startswith((_PREFIX, "Optimizer."))
            operation = _PYTHON if framed else event.name
            spent[_phase(event), operation] += event.self_cpu_time_total
    rows = [
        {"phase": phase, "operation": operation, "ms": us / 1e3 / steps}
        for (phase, operation), us in spent.most_common()
    ]
    total = sum(row["ms"] for row in rows)
    phases = Counter[str]()
    for row in rows:
        phases[row["phase"]] += row["ms"]
    summary = [
        {"phase": phase, "ms": ms, "share": ms / total} for phase, ms in phases.most_common()
    ]
    return Record(command, dict(config), rows, {"phases": summary})


def _phase(event: Any) -> str:
    while event is not None:
        if event.name.startswith(_PREFIX):
            return event.name.removeprefix(_PREFIX)
        event = event.cpu_parent
    return _REST


def _largest(record: Record, phase: str) -> list[tuple[str, float]]:
    own = [(r["operation"], r["ms"]) for r in record.rows if r["phase"] == phase]
    return own[:_SHOWN]  # rows are sorted


def table(record: Record) -> Table:
    """The phases, and the operations that take most of each."""
    total = sum(entry["ms"] for entry in record.summary["phases"])
    lines = []
    for entry in record.summary["phases"]:
        lines.append([entry["phase"], "", f"{entry['ms']:.3f}", f"{100 * entry['share']:.1f} %"])
        lines += [
            ["", operation, f"{ms:.3f}", f"{100 * ms / total:.1f} %"]
            for operation, ms in _largest(record, entry["phase"])
        ]
    return Table(
        f"one step of {record.config['label']}",
        ["phase", "operation", "ms", "share"],
        lines,
        "ms: per step, as profiled, in the operation itself. settle: free phase and sweeps. "
        f"{_PYTHON}: what no torch operation accounts for. Profiling takes time itself.",
    )


@styled()
def plot(record: Record) -> Figure:
    """A bar per phase, cut into its largest operations."""
    figure, (ax,) = canvas(1, table(record).title)
    phases = [entry["phase"] for entry in record.summary["phases"]]
    for place, entry in enumerate(record.summary["phases"]):
        left = 0.0
        largest = _largest(record, entry["phase"])
        rest = entry["ms"] - sum(ms for _, ms in largest)
        for k, (operation, ms) in enumerate([*largest, ("others", rest)]):
            ax.barh(place, ms, left=left, color=COLOURS[k] if k < len(COLOURS) else "0.8")
            if ms > 0.1 * record.summary["phases"][0]["ms"]:
                name = operation.removeprefix("aten::").replace(" ", "\n")
                ax.text(left + ms / 2, place, name, ha="center", va="center", fontsize=8,
                        color="white" if k < len(COLOURS) else "black")  # fmt: skip
            left += ms
    ax.set_yticks(range(len(phases)), phases)
    ax.invert_yaxis()
    ax.set(xlabel="ms per step")
    return figure
