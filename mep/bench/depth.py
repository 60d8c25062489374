"""Very deep plain nets by EP within a memory budget, and controls that say whether depth works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import mep
from mep.bench.deep import Training, train
from mep.bench.plot import canvas, styled
from mep.bench.record import Record
from mep.bench.regime import label, measure
from mep.bench.table import Table, number, percent
from mep.contrast import contrast_blockwise, free_phase, settings
from mep.memory import show
from mep.training import accuracy, atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mep.curvature import Signal
    from mep.data import Dataset

__all__ = ["ARMS", "DepthConfig", "plot", "run", "table"]

EP, BACKPROP, IDENTITY, FROZEN = "ep", "backprop", "identity", "frozen"
ARMS = (EP, BACKPROP, IDENTITY, FROZEN)
_NAMES = {EP: "EP", BACKPROP: "backprop", IDENTITY: "EP, hidden layers held at I",
          FROZEN: "EP, only the top tenth"}  # fmt: skip
_LOOKS = 14
_MOMENTUM = 0.9
_PROBE = 32  # samples on which regime and gradient norms are measured


@dataclass(frozen=True)
class DepthConfig:
    """What is trained; the same numbers at every depth.

    Args:
        arms: some of ``ARMS``: the net, the same by backprop, and two controls.
        depths: numbers of weighted layers, each >= 3.
        seeds: of weights and data order.
        steps: updates, >= 1.
        width: units per hidden layer, >= 1.
        batch: samples per update, >= 1.
        lr: learning rate of first and last layer; hidden ones take ``lr / depth``.
        warmup: steps over which the rate rises; it falls to zero in a line from then on.
        memory: budget of an EP step, as ``EPOptimizer(memory_budget=)`` takes it; None for as much
            as it takes.
        c: relative strength of the nudge.

    Raises:
        ValueError: for a value out of range.
    """

    arms: tuple[str, ...] = (EP, IDENTITY)
    depths: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0,)
    steps: int = 1400
    width: int = 128
    batch: int = 128
    lr: float = 0.1
    warmup: int = 100
    memory: str | None = "16MB"
    c: float = 0.05

    def __post_init__(self) -> None:
        for name in ("steps", "width", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if not self.depths or min(self.depths) < 3:
            raise ValueError(f"`depths` must be one or more numbers >= 3, got {self.depths}.")
        if not self.arms or not set(self.arms) <= set(ARMS):
            raise ValueError(f"`arms` must be some of {ARMS}, got {self.arms}.")
        if not self.seeds:
            raise ValueError("`seeds` must not be empty.")
        if not self.lr > 0 or self.warmup < 0:
            raise ValueError(f"`lr` must be > 0 and `warmup` >= 0, got {self.lr}, {self.warmup}.")


def run(config: DepthConfig, data: Dataset, out: str | Path, command: str) -> Record:
    """Train every arm at every depth, and go on where a killed run has stopped.

    Every arm of one depth and seed starts from the same weights, meets the same batches in the
    same order and takes steps of the same rule: SGD with Nesterov momentum 0.9.

    Args:
        config: what is trained.
        data: the data set.
        out: folder for checkpoints and finished parts.
        command: the command line, for the record.

    Returns:
        The record: a row per run and look; the summary has a line per depth and arm.
    """
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for depth in config.depths:
        for seed in config.seeds:
            for arm in config.arms:
                looks, facts = _part(config, data, arm, depth, seed, Path(out))
                shared = {"arm": arm, "depth": depth, "seed": seed}
                rows += [{**shared, **look} for look in looks]
                runs.append({**shared, **facts})
    kept = {**asdict(config), "data": data.name}
    return Record(command, kept, rows, {"runs": runs, "arms": _summary(config, rows, runs)})


def _part(
    config: DepthConfig, data: Dataset, arm: str, depth: int, seed: int, out: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    name = f"{arm}-depth{depth}-seed{seed}"
    identity = {
        key: value
        for key, value in asdict(config).items()
        if key not in ("arms", "depths", "seeds")
    } | {"data": data.name, "arm": arm, "depth": depth, "seed": seed}
    part, checkpoint = out / f"part-{name}.pt", out / f"checkpoint-{name}.pt"
    if part.exists():
        known = torch.load(part, weights_only=True)
        if known["identity"] == identity:
            return known["rows"], known["facts"]
    training = _training(config, data, arm, depth, seed, identity)
    rows, facts = train(training, data, checkpoint)
    facts = {**facts, **_findings(config, data, training.model, arm, depth)}
    known = {"identity": identity, "rows": rows, "facts": facts}
    atomic_write(part, partial(torch.save, known))
    checkpoint.unlink(missing_ok=True)
    return rows, facts


def _training(
    config: DepthConfig, data: Dataset, arm: str, depth: int, seed: int, identity: dict[str, Any]
) -> Training:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = mep.models.deep_mlp(depth, config.width, data.x_train[0].numel(), data.classes)
    model = _arm(whole, arm, depth)
    own = {id(p) for p in model.parameters() if p.requires_grad}
    groups = mep.param_groups(whole, config.lr)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) in own]
    how: dict[str, Any] = {"mode": "backprop"}
    if arm != BACKPROP:
        how = {"memory_budget": config.memory, "settler": mep.Sweep(1),
               "beta": mep.AutoBeta(config.c)}  # fmt: skip
    optimizer = mep.EPOptimizer(
        [group for group in groups if group["params"]], model=model, lr=config.lr,
        momentum=_MOMENTUM, nesterov=True, **how,
    )  # fmt: skip
    look = max(1, config.steps // _LOOKS)
    rate = partial(_rate, config.steps, config.warmup)
    title = f"{_NAMES[arm]}, {depth} layers, seed {seed}"
    return Training(title, identity, model, optimizer, config.steps, config.batch, seed, look, rate)


def _rate(steps: int, warmup: int, k: int) -> float:
    return min(1.0, (k + 1) / warmup if warmup else 1.0) * (1 - k / steps)


def _arm(whole: nn.Sequential, arm: str, depth: int) -> nn.Sequential:
    """The net itself, or a smaller one that computes what it does with some layers held.

    A ReLU behind a ReLU and the identity changes nothing: layers held at I are left out.
    """
    if arm in (EP, BACKPROP):
        return whole
    flatten, first, *_ = whole
    top = [m for m in whole if isinstance(m, nn.Linear)][1:]
    if arm == IDENTITY:
        top = top[-1:]
    else:
        first.requires_grad_(False)
        top = top[-max(1, depth // 10) :]
    return nn.Sequential(flatten, first, *(m for layer in top for m in (nn.ReLU(), layer)))


def _findings(
    config: DepthConfig, data: Dataset, model: nn.Module, arm: str, depth: int
) -> dict[str, Any]:
    """What the trained net is asked."""
    x, y = data.x_test[:_PROBE], data.y_test[:_PROBE]
    if arm == BACKPROP:
        return {}
    nudge, settler = mep.AutoBeta(config.c), mep.Sweep(1)
    found: dict[str, Any] = {
        "trained": measure(mep.diagnose(model, x, y, beta=nudge, settler=settler))
    }
    norms = _gradient_norms(model, x, y, nudge)
    quartiles = torch.tensor(norms).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    found["gradient_norms"] = [norms[0], *quartiles, norms[-1]]
    found["silent_layers"] = sum(not norm > 0 for norm in norms)
    if arm == EP:
        found["reset"] = _reset_accuracy(model, data, depth)
    return found


def _gradient_norms(model: nn.Module, x: Tensor, y: Tensor, nudge: mep.AutoBeta) -> list[float]:
    """Norm of the EP gradient of every weight matrix, without keeping any gradient."""
    norms: list[float] = []

    def note(signals: list[Signal]) -> None:
        norms.extend(float(s.form().norm()) for s in signals if s.parameter.dim() > 1)

    how = settings(beta=nudge, settler=mep.Sweep(1))
    contrast_blockwise(free_phase(model, x, y, how), how, note)
    return norms


@torch.no_grad()
def _reset_accuracy(model: nn.Module, data: Dataset, depth: int) -> float:
    """Accuracy with the middle eight tenths put back to the identity; the model is used up."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    mep.init.identity_(nn.ModuleList(layers[max(1, depth // 10) : depth - max(1, depth // 10)]))
    return accuracy(model, data.x_test, data.y_test, 2000)


def _summary(
    config: DepthConfig, rows: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    found = []
    for depth in config.depths:
        control = _reached(rows, IDENTITY, depth)
        for arm in config.arms:
            reached = _reached(rows, arm, depth)
            own = [r for r in rows if (r["arm"], r["depth"]) == (arm, depth)]
            facts = [r for r in runs if (r["arm"], r["depth"]) == (arm, depth)]
            gains = [reached[s] - control[s] for s in reached if s in control]
            entry: dict[str, Any] = {
                "arm": arm, "depth": depth, "accuracy": mean(reached.values()),
                "spread": _spread(list(reached.values())),
                "over_identity": mean(gains) if gains else None,
                "over_identity_spread": _spread(gains),
                "ms": median(r["ms"] for r in own if r["ms"] is not None),
                "extra": max(f["extra"] for f in facts), "planned": facts[0]["planned"],
                "skipped": sum(r["skipped"] for r in own if r["step"] == config.steps),
            }  # fmt: skip
            for key in ("residual", "aggregate", "settled", "sweeps", "c"):
                values = [r[key] for r in own if key in r and r["step"] > 1]
                entry |= {key: mean(values)} if values else {}
            if arm != BACKPROP:
                entry["regimes"] = sorted({f["trained"]["regime"] for f in facts})
                entry["cosine"] = median(f["trained"]["cosine"] for f in facts)
                entry["silent_layers"] = max(f["silent_layers"] for f in facts)
                entry["gradient_norms"] = facts[0]["gradient_norms"]
            if arm == EP:
                entry["reset"] = mean(f["reset"] for f in facts)
            found.append(entry)
    return found


def _reached(rows: Sequence[Mapping[str, Any]], arm: str, depth: int) -> dict[int, float]:
    """Accuracy at the end, by seed."""
    own = [r for r in rows if (r["arm"], r["depth"]) == (arm, depth)]
    return {r["seed"]: r["accuracy"] for r in own}  # the last look wins


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def table(record: Record) -> Table:
    """One line per depth and arm."""
    config = record.config
    return Table(
        f"{config['data']}, width {config['width']}, {config['steps']} steps of {config['batch']}, "
        f"budget {config['memory'] or 'none'}, seeds {', '.join(map(str, config['seeds']))}",
        [
            "arm", "layers", "test accuracy", "over identity", "middle reset", "extra memory",
            "planned", "ms", "residual", "aggregate", "settled", "c", "cosine", "silent",
        ],
        [_line(entry) for entry in record.summary["arms"]],
        "over identity: points above the same net with its hidden layers held at I. middle reset: "
        "with the middle eight tenths of the layers put back to I. extra memory: peak of a step "
        "besides parameters and optimizer state; planned: as predicted. residual (median) and "
        "aggregate: means over all steps; settled: share of steps below 1e-2. cosine to backprop "
        "and layers without gradient (silent): of the trained net, on 32 test samples.",
    )  # fmt: skip


def _line(entry: Mapping[str, Any]) -> list[str]:
    gain, spread = entry["over_identity"], entry["over_identity_spread"]
    points = "-" if gain is None else f"{100 * gain:+.2f}"
    points += f" ± {100 * spread:.2f}" if spread is not None and gain is not None else ""
    return [
        label(_NAMES[entry["arm"]], entry.get("regimes", ())), str(entry["depth"]),
        percent(entry["accuracy"], entry["spread"]), points,
        percent(entry["reset"]) if "reset" in entry else "-", show(entry["extra"]),
        show(entry["planned"]) if entry["planned"] else "-", f"{entry['ms']:.0f}",
        number(entry.get("residual")), number(entry.get("aggregate")),
        percent(entry["settled"]) if "settled" in entry else "-", number(entry.get("c"), ".2g"),
        number(entry.get("cosine"), ".5f"), str(entry.get("silent_layers", "-")),
    ]  # fmt: skip


@styled()
def plot(record: Record) -> Figure:
    """Test accuracy against steps, and the gradient's norm through the trained nets."""
    figure, (curves, norms) = canvas(2, table(record).title)
    styles = dict(zip(ARMS, ("-", "--", ":", "-."), strict=True))
    for k, depth in enumerate(record.config["depths"]):
        for arm in record.config["arms"]:
            own = [r for r in record.rows if (r["arm"], r["depth"]) == (arm, depth)]
            # The last look is at all of the samples.
            own = [r for r in own if r["step"] < record.config["steps"]]
            steps = sorted({r["step"] for r in own})
            reached = [100 * mean(r["accuracy"] for r in own if r["step"] == s) for s in steps]
            name = f"{_NAMES[arm]}, {depth} layers"
            curves.plot(steps, reached, styles[arm], color=f"C{k % 5}", label=name)
    curves.set(xlabel="steps", ylabel="accuracy on 2000 test samples / %", ylim=(80, 100))
    curves.legend(loc="lower right", fontsize=8)
    for k, entry in enumerate(e for e in record.summary["arms"] if e["arm"] == EP):
        first, *middle, last = entry["gradient_norms"]
        norms.plot(
            [0.25, 0.5, 0.75], middle, "o", color=f"C{k % 5}", label=f"{entry['depth']} layers"
        )
        norms.plot([0, 1], [first, last], "s", color=f"C{k % 5}")
    norms.set(xticks=[0, 0.25, 0.5, 0.75, 1], yscale="log", ylabel="norm of the EP gradient")
    norms.set_xticklabels(["first", "quartile", "median", "quartile", "last"])
    norms.legend(loc="best", fontsize=8)
    return figure
