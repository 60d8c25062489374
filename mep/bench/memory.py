"""Memory of one training step against depth: EP within a budget beside the leanest backprop."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track as progress

import mep
from mep.bench.plot import canvas, styled
from mep.bench.record import Record
from mep.bench.stepping import BACKPROP, CHECKPOINTED, IN_BACKWARD, PLAIN, STREAMED, Stepper
from mep.bench.table import Table, number
from mep.bench.timing import interleave, spread
from mep.memory import label, parse, show, track
from mep.training import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MemoryConfig", "plot", "run", "table"]

MB = 2**20
TRAINED, OUT = "trained", "out of memory"


@dataclass(frozen=True)
class MemoryConfig:
    """What is measured.

    Args:
        depths: numbers of weighted layers, each >= 3.
        budgets: of the streamed arms, as ``EPOptimizer(memory_budget=)`` takes them.
        width: units per hidden layer, >= 1.
        batch: samples per step, >= 1.
        rounds: interleaved rounds of timing per arm and depth; 0 for none.
        capped: depth at which every arm is run in a process that may take no more than start-up,
            parameters, momentum and ``spare``; 0 for none.
        spare: bytes, as a size.
        seed: of weights and batch.

    Raises:
        TypeError, ValueError: for a value out of range.
    """

    depths: tuple[int, ...] = (10, 100, 500, 1000, 2000, 5000, 10000)
    budgets: tuple[str, ...] = ("1MB", "4MB", "20MB")
    width: int = 128
    batch: int = 32
    rounds: int = 7
    capped: int = 5000
    spare: str = "64MB"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 3:
            raise ValueError(f"`depths` must be one or more numbers >= 3, got {self.depths}.")
        for name in ("width", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if self.rounds < 0 or self.capped < 0:
            raise ValueError("`rounds` and `capped` must be >= 0.")
        for budget in self.budgets:
            parse(budget, "budgets")
        parse(self.spare, "spare")

    @property
    def arms(self) -> list[str]:
        """All arms, the baseline first."""
        streamed = [f"{STREAMED} {budget}" for budget in self.budgets]
        return [BACKPROP, CHECKPOINTED, IN_BACKWARD, PLAIN, *streamed]


def run(config: MemoryConfig, out: str | Path, command: str) -> Record:
    """Measure every arm at every depth, each in a fresh process, then time it beside backprop.

    Finished parts are kept in ``out`` and not done again.

    Args:
        config: what is measured.
        out: folder for the parts.
        command: the command line, for the record.

    Returns:
        The record: a row per depth and arm, rows of every timed round, and how the arms fared in
        a process of limited memory.
    """
    cases = [(depth, arm) for depth in config.depths for arm in config.arms]
    rows: list[dict[str, Any]] = []
    for depth, arm in progress(cases, "memory", transient=True):
        rows += _part(config, Path(out), depth, arm, _one)
    for arm in progress(config.arms if config.capped else [], "limited memory", transient=True):
        rows += _part(config, Path(out), config.capped, arm, _limited)
    summary = {part: [r for r in rows if r["part"] == part] for part in ("memory", "capped")}
    return Record(command, asdict(config), rows, summary)


def _part(
    config: MemoryConfig,
    out: Path,
    depth: int,
    arm: str,
    work: Callable[[MemoryConfig, int, str], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Returns the rows of one piece of work, done now or before."""
    lists = ("depths", "budgets", "capped")
    shared = {key: value for key, value in asdict(config).items() if key not in lists}
    path = out / f"part{work.__name__}-{arm.replace(', ', '-').replace(' ', '-')}-{depth}.pt"
    if path.exists():
        known = torch.load(path, weights_only=True)
        if known["config"] == shared:
            return known["rows"]
    rows = work(config, depth, arm)
    atomic_write(path, partial(torch.save, {"config": shared, "rows": rows}))
    return rows


def _one(config: MemoryConfig, depth: int, arm: str) -> list[dict[str, Any]]:
    found = {"part": "memory", "depth": depth, "arm": arm}
    found |= _in_a_process(partial(_measure, config, depth, arm))
    rows: list[dict[str, Any]] = [found]
    if config.rounds and found["status"] == TRAINED:
        timed = _time(config, depth, arm)
        rows += [{"part": "time", "depth": depth, **row} for row in timed]
        middle, low, high = spread([row["ratio"] for row in timed if row["arm"] == arm])
        found |= {"ratio": middle, "ratio_quartiles": [low, high]}
    return rows


def _limited(config: MemoryConfig, depth: int, arm: str) -> list[dict[str, Any]]:
    try:
        found = _in_a_process(partial(_capped, config, arm))
    except (MemoryError, BrokenProcessPool):  # no memory even to say so
        found = {"status": OUT}
    return [{"part": "capped", "depth": depth, "arm": arm, **found}]


def _in_a_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs in a process of its own, which starts with nothing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), work).result()


def _with_threads(threads: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return work()


def _measure(config: MemoryConfig, depth: int, arm: str) -> dict[str, Any]:
    _start_up(arm)
    before = _resident("VmRSS")
    try:
        one = Stepper(arm, depth, config.width, config.batch, config.seed)
        one.step()  # makes the momentum
    except ValueError as error:  # a budget that no plan keeps to
        return {"status": "refused", "why": str(error)}
    _forget_peak()
    one.step()
    resident = _resident("VmHWM")
    with track(one.model, one.optimizer, samples=config.batch) as usage:
        for momentum in one.state.values():
            label(momentum, "optimizer state")
        one.step()
    found: dict[str, Any] = {
        "status": TRAINED, "extra": usage.extra, "phases": usage.phases, "kinds": usage.peak,
        "resident": resident - before - one.lasting if resident and before else None,
    }  # fmt: skip
    if isinstance(one.optimizer, mep.EPOptimizer) and one.optimizer.last is not None:
        last, plan = one.optimizer.last, one.optimizer.plan
        found |= {"residual": last.median, "aggregate": last.aggregate, "sweeps": last.sweeps}
        if plan is not None:
            found |= {"planned": plan.peak, "lengths": plan.lengths, "passes": plan.passes}
    return found


def _time(config: MemoryConfig, depth: int, arm: str) -> list[dict[str, Any]]:
    shape = depth, config.width, config.batch, config.seed
    steppers = {name: Stepper(name, *shape) for name in dict.fromkeys((BACKPROP, arm))}
    arms = {name: stepper.step for name, stepper in steppers.items()}
    return interleave(arms, config.rounds, 2, baseline=BACKPROP)


def _capped(config: MemoryConfig, arm: str) -> dict[str, Any]:
    """Takes three steps in a process that may take no more memory than it should need."""
    _start_up(arm)
    started = _resident("VmData")
    if started is None:
        return {"status": "not possible here"}
    small, smaller = (Stepper(BACKPROP, n, config.width, 1, config.seed).lasting for n in (4, 3))
    lasting = smaller + (config.capped - 3) * (small - smaller)
    limit = started + lasting + parse(config.spare, "spare")
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    steps, status = 0, TRAINED
    try:
        one = Stepper(arm, config.capped, config.width, config.batch, config.seed)
        for _ in range(3):
            one.step()
            steps += 1
    except MemoryError:
        status = OUT
    except ValueError:
        status = "refused"
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        status = OUT
    finally:  # what is told needs memory, too
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, hard))
    return {"status": status, "steps": steps, "limit": limit, "used": _resident("VmData")}


def _start_up(arm: str) -> None:
    """Takes steps on a tiny net: code and threads that this brings to life are no net's fault."""
    square = torch.ones(512, 512)  # large enough for all threads
    torch.mm(square, square)
    # So little that a net of 60 layers is taken segment by segment, as those to come are.
    streamed = arm.startswith(STREAMED)
    small = Stepper(f"{STREAMED} 16kB", 60, 8, 2, 0) if streamed else Stepper(arm, 3, 8, 2, 0)
    for _ in range(2):
        small.step()


def _resident(name: str) -> int | None:
    """Returns a figure of this process in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _forget_peak() -> None:
    """Makes the largest resident set so far the present one, where the system lets."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def table(record: Record) -> Table:
    """One line per depth and arm."""
    config = record.config
    capped = {r["arm"]: r["status"] for r in record.summary["capped"]}
    note = (
        "extra: peak of live tensors besides parameters and momentum, the batch included; planned: "
        "as predicted; resident: growth of the resident set besides the same, Python's own objects "
        "included. settle, contrast, update: the same peak within each phase. time: relative to "
        "eager backprop in the same process, interleaved. MB = 2^20 bytes."
    )
    if capped:
        fates = "; ".join(f"{arm}: {status}" for arm, status in capped.items())
        note += (
            f" In a process limited to start-up, parameters, momentum and {config['spare']}, "
            f"{config['capped']} layers: {fates}."
        )
    return Table(
        f"one step, width {config['width']}, batch {config['batch']}",
        ["arm", "layers", "extra", "planned", "resident", "settle", "contrast", "update",
         "time", "residual"],
        [_line(row) for row in record.summary["memory"]],
        note,
    )  # fmt: skip


def _line(row: Mapping[str, Any]) -> list[str]:
    if row["status"] != TRAINED:
        return [row["arm"], str(row["depth"]), row["status"], *["-"] * 7]
    phases = [row["phases"].get(f"mep: {name}") for name in ("settle", "contrast", "update")]
    return [
        row["arm"], str(row["depth"]),
        *(show(size) if size else "-" for size in (row["extra"], row.get("planned"),
                                                   row["resident"], *phases)),
        f"{row['ratio']:.2f}" if "ratio" in row else "-", number(row.get("residual")),
    ]  # fmt: skip


@styled()
def plot(record: Record) -> Figure:
    """Extra memory and time against depth."""
    figure, (memory, time) = canvas(2, table(record).title)
    rows = [row for row in record.summary["memory"] if row["status"] == TRAINED]
    for k, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        own = [row for row in rows if row["arm"] == arm]
        depths = [row["depth"] for row in own]
        style: dict[str, Any] = {"color": f"C{k % 5}", "marker": "o"}
        style["linestyle"] = "-" if k < 4 else "--"
        memory.plot(depths, [row["extra"] / MB for row in own], label=arm, **style)
        timed = [row for row in own if "ratio" in row]
        time.plot([r["depth"] for r in timed], [r["ratio"] for r in timed], label=arm, **style)
    for axes, quantity in ((memory, "extra memory / MB"), (time, "time relative to backprop")):
        axes.set(xscale="log", xlabel="weighted layers", ylabel=quantity)
    memory.set_yscale("log")
    memory.legend(loc="upper left", fontsize=7)
    time.set_ylim(bottom=0)
    return figure
