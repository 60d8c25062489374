"""Equilibrium nets beside backprop: time, memory, gradients layer by layer, and disturbances."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track as progress
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import mep
from mep.bench.plot import canvas, styled, whole_numbers
from mep.bench.record import Record
from mep.bench.robustness import robustness
from mep.bench.table import Table, number
from mep.bench.timing import interleave, spread
from mep.contrast import free_phase, settings
from mep.data import Dataset
from mep.energies import cost_of
from mep.memory import label, show, track
from mep.models import EquilibriumNet
from mep.settling import Settled, settle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NETS", "EquilibriumConfig", "plot", "run", "table"]

PLAIN, TIME = "backprop, feedforward net", "backprop through time"
RECURRENT, EP = "recurrent backprop", "EP, centered (two nudged phases)"
SIGNED = "EP, random sign (one nudged phase)"
_MOMENTUM, _RATE = 0.9, 0.05
# Settled in float64 as far as 300 rounds take every sample: half of them would be there in 20.
_DEEP, _FEW = mep.FixedPoint(300, None), 16

NETS: dict[str, tuple[Callable[[int, int], EquilibriumNet], str]] = {
    "mlp": (lambda inputs, classes: mep.models.hopfield_mlp(inputs, (512, 512), classes), "mse"),
    "tanh": (
        lambda inputs, classes: mep.models.hopfield_mlp(
            inputs, (512, 512), classes, nn.Tanh, potential="conjugate", readout=True
        ),
        "cross_entropy",
    ),
    "looped": (
        lambda inputs, classes: mep.models.LoopedMLP(inputs, 512, classes), "cross_entropy",
    ),
    "cnn": (
        lambda inputs, classes: mep.models.hopfield_cnn(size=round(inputs**0.5)), "mse",
    ),
}  # fmt: skip
"""Name -> what makes the net for a number of inputs and classes, and its cost."""


@dataclass(frozen=True)
class EquilibriumConfig:
    """What is measured.

    Args:
        net: one of ``NETS``.
        updates: by EP before anything is measured: how fast a net settles depends on its weights.
        batch: samples per step, >= 1.
        beta: nudging strength of the centered estimate, > 0.
        tol: residual at which both phases stop.
        omega: share of its way to rest that a unit goes in a round, in (0, 2).
        rounds: timed rounds, >= 1.
        samples: test samples that disturbed nets are judged on.
        seed: of weights and data order.

    Raises:
        ValueError: for a value out of range.
    """

    net: str = "mlp"
    updates: int = 500
    batch: int = 128
    beta: float = 0.2
    tol: float = 1e-2
    omega: float = 1.0
    rounds: int = 20
    samples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.net not in NETS:
            raise ValueError(f"`net` must be one of {tuple(NETS)}, got {self.net!r}.")
        for name in ("batch", "rounds", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if self.updates < 0:
            raise ValueError(f"`updates` must be >= 0, got {self.updates}.")

    @property
    def options(self) -> dict[str, Any]:
        """How EP takes its gradient."""
        settler = mep.FixedPoint(tol=self.tol, omega=self.omega)
        return {"beta": self.beta, "stencil": mep.centered, "settler": settler}


def run(config: EquilibriumConfig, data: Dataset, command: str) -> Record:
    """Train a net and its feedforward twin for a while, then measure.

    Args:
        config: what is measured.
        data: the data set.
        command: the command line, for the record.

    Returns:
        The record: rows of every timed round; the summary has arms, phases, gradients by layer and
        disturbances.
    """
    make, cost = NETS[config.net]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = make(data.x_train[0].numel(), data.classes)
        twin = _feedforward(model)
        order = torch.randperm(len(data.x_train))
        _train(model, data, order, config, {"cost": cost, **config.options})
        _train(twin, data, order, config, {"cost": cost, "mode": "backprop"})
        # Copies: a view would be weighed with all that it is a view of.
        x, y = data.x_test[: config.batch].clone(), data.y_test[: config.batch].clone()
        arms = _arms(model, twin, cost, config, x, y)
        memory = {name: _measured(arm) for name, arm in arms.items()}
        turns = {name: arm.step for name, arm in arms.items()}
        rows = interleave(turns, config.rounds, 3, baseline=PLAIN)
        entries = []
        for name in arms:
            own = [row for row in rows if row["arm"] == name]
            middle, low, high = spread([row["ratio"] for row in own])
            entries.append({"arm": name, "ms": spread([row["ms"] for row in own])[0],
                            "ratio": middle, "ratio_quartiles": [low, high],
                            "extra": memory[name], **_settling(arms[name])})  # fmt: skip
        summary = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "arms": entries,
            "phases": _phases(model, cost, config, x, y),
            "layers": _layers(model, cost, config, x[:_FEW], y[:_FEW]),
            "robustness": _robustness(model, twin, cost, config, data),
        }
    return Record(command, {**asdict(config), "dataset": data.name, "cost": cost}, rows, summary)


def _feedforward(model: EquilibriumNet) -> nn.Sequential:
    """The same layers without feedback, with ReLU between them: as many parameters."""
    part = copy.deepcopy(model.net)
    if isinstance(part, nn.ModuleDict):
        names = ("flatten", "input", "activation", "recurrent", "activation", "output")
        layers = [part[name] for name in names]
    else:
        layers = list(part.children())
    bounded = (nn.Hardtanh, nn.Tanh, nn.Sigmoid)
    return nn.Sequential(*(nn.ReLU() if isinstance(m, bounded) else m for m in layers))


def _train(
    model: nn.Module,
    data: Dataset,
    order: Tensor,
    config: EquilibriumConfig,
    options: Mapping[str, Any],
) -> None:
    optimizer = mep.EPOptimizer(
        model.parameters(), model=model, lr=_RATE, momentum=_MOMENTUM, **options
    )
    name = "EP" if isinstance(model, EquilibriumNet) else "feedforward twin"
    for step in progress(range(config.updates), f"training, {name}", transient=True):
        start = step * config.batch % max(1, len(order) - config.batch)
        part = order[start : start + config.batch]
        optimizer.step(x=data.x_train[part], target=data.y_train[part])


@dataclass
class _Arm:
    """A model and an optimizer whose steps on a batch leave it as it is."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    cost: str
    x: Tensor
    y: Tensor

    def step(self) -> None:
        if isinstance(self.optimizer, mep.EPOptimizer):
            self.optimizer.step(x=self.x, target=self.y)
            return
        self.optimizer.zero_grad()
        cost_of(self.cost).mean(self.model(self.x), self.y).backward()
        self.optimizer.step()


def _arms(
    model: EquilibriumNet, twin: nn.Module, cost: str, config: EquilibriumConfig, x: Tensor,
    y: Tensor,
) -> dict[str, _Arm]:  # fmt: skip
    found = {}
    for name, backward in ((PLAIN, None), (TIME, "through time"), (RECURRENT, "recurrent")):
        net = copy.deepcopy(twin if backward is None else model)
        if isinstance(net, EquilibriumNet):
            net.backward = str(backward)
        sgd = torch.optim.SGD(net.parameters(), lr=0.0, momentum=_MOMENTUM, fused=True)
        found[name] = _Arm(net, sgd, cost, x, y)
    signs = mep.random_sign(torch.Generator().manual_seed(config.seed))
    for name, stencil in ((EP, mep.centered), (SIGNED, signs)):
        net = copy.deepcopy(model)
        options = {"cost": cost, **config.options, "stencil": stencil}
        ep = mep.EPOptimizer(net.parameters(), model=net, lr=0.0, momentum=_MOMENTUM, **options)
        found[name] = _Arm(net, ep, cost, x, y)
    return found


def _measured(arm: _Arm) -> int:
    """Bytes of a step besides parameters and momentum, at the worst moment."""
    arm.step()  # makes the momentum
    with track(arm.model, arm.optimizer) as usage:
        for state in arm.optimizer.state.values():
            label(state["momentum_buffer"], "optimizer state")
        arm.step()
    return usage.extra


def _settling(arm: _Arm) -> dict[str, Any]:
    """How the last step has settled: the worst over its phases."""
    last = getattr(arm.optimizer, "last", None)
    if last is None:
        return {"residual": None, "residual_aggregate": None, "rounds": None}
    return {"residual": last.median, "residual_aggregate": last.aggregate, "rounds": last.sweeps}


def _phases(
    model: EquilibriumNet, cost: str, config: EquilibriumConfig, x: Tensor, y: Tensor
) -> list[dict[str, Any]]:
    """Rounds and residuals of the free phase and of both nudged ones."""
    how = settings(cost=cost, energy=mep.Hopfield(), **config.options)
    with torch.no_grad():
        free = free_phase(model, x, y, how)
        found = [("free", free.settled)]
        for beta, _ in how.nodes(config.beta):
            settled = settle(free.nudged(beta), how.settler)
            free.learn(beta, settled)
            found.append((f"beta = {beta:g}", settled))
    return [_phase(name, settled) for name, settled in found]


def _phase(name: str, settled: Settled) -> dict[str, Any]:
    return {"phase": name, "rounds": settled.steps, "residual": settled.median,
            "residual_q95": settled.q95, "residual_aggregate": settled.aggregate,
            "status": settled.status, "history": settled.history[1:]}  # fmt: skip


def _layers(
    model: EquilibriumNet, cost: str, config: EquilibriumConfig, x: Tensor, y: Tensor
) -> list[dict[str, Any]]:
    """Every parameter's estimate beside backprop through time, to the last digit and as run."""
    wide = copy.deepcopy(model).double()
    wide.settler, wide.backward = _DEEP, "through time"
    cost_of(cost).mean(wide(x.double()), y).backward()
    truth = _gradients(wide)
    exact = {"beta": 1e-4, "stencil": mep.centered, "settler": _DEEP}
    deep = _estimated(wide, x.double(), y, {"cost": cost, **exact})
    run = _estimated(copy.deepcopy(model), x, y, {"cost": cost, **config.options})
    rows = []
    for name, g in truth.items():
        rows.append({
            "parameter": name,
            "error": float((deep[name] - g).norm() / g.norm()),
            "cosine": float(torch.cosine_similarity(run[name].double().flatten(), g.flatten(), 0)),
        })  # fmt: skip
    return rows


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _estimated(
    model: nn.Module, x: Tensor, y: Tensor, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    model.zero_grad()
    mep.estimate(model, x, y, **options)
    return _gradients(model)


def _robustness(
    model: EquilibriumNet, twin: nn.Sequential, cost: str, config: EquilibriumConfig, data: Dataset
) -> list[dict[str, Any]]:
    x, y = data.x_test[: config.batch], data.y_test[: config.batch]

    def gradients(net: nn.Module) -> Tensor:
        found = _estimated(net, x, y, {"cost": cost, **config.options})
        return parameters_to_vector(found.values())

    exact = copy.deepcopy(model)
    cost_of(cost).mean(exact(x), y).backward()
    truth = parameters_to_vector(_gradients(exact).values())
    kept = slice(config.samples)
    found = robustness(model, twin, data.x_test[kept], data.y_test[kept], gradients, truth)
    model.zero_grad()
    return found


def table(record: Record) -> Table:
    """One line per arm; phases, gradients and the like in the note."""
    config, summary = record.config, record.summary
    phases = "; ".join(
        f"{p['phase']}: {p['rounds']} rounds, residual {number(p['residual'])} "
        f"(aggregate {number(p['residual_aggregate'])})"
        for p in summary["phases"]
    )
    worst = max(layer["error"] for layer in summary["layers"])
    least = min(layer["cosine"] for layer in summary["layers"])
    return Table(
        f"{config['net']}, {config['dataset']}, {summary['parameters']:,} parameters, batch "
        f"{config['batch']}, after {config['updates']} updates",
        ["arm", "ms", "x feedforward", "extra memory", "rounds", "residual", "aggregate"],
        [
            [e["arm"], f"{e['ms']:.2f}",
             "{:.2f} [{:.2f}, {:.2f}]".format(e["ratio"], *e["ratio_quartiles"]), show(e["extra"]),
             number(e["rounds"], "d"), number(e["residual"]), number(e["residual_aggregate"])]
            for e in summary["arms"]
        ],
        f"ms: median time of a step, SGD with momentum. x feedforward: median over "
        f"{config['rounds']} interleaved rounds, and quartiles, relative to backprop on a ReLU net "
        f"of as many parameters. extra memory: besides parameters and momentum. rounds, residual: "
        "the worst over the phases of a step. EP, beta = "
        f"{config['beta']}: {phases}. Gradient against backprop through time, worst parameter: "
        f"relative error {worst:.1e} settled in float64 at beta = 1e-4, cosine {least:.4f} as run.",
    )  # fmt: skip


@styled()
def plot(record: Record) -> Figure:
    """How the phases settle, and what disturbances do."""
    summary = record.summary
    kinds = list(dict.fromkeys(row["kind"] for row in summary["robustness"]))
    figure, axes = canvas(1 + len(kinds), table(record).title)
    for phase in summary["phases"]:
        history = phase["history"]
        axes[0].plot(range(1, 1 + len(history)), history, marker="o", label=phase["phase"])
    axes[0].axhline(record.config["tol"], color="#888888", linestyle=":", linewidth=1)
    axes[0].set(yscale="log", xlabel="rounds of relaxation", ylabel="median residual")
    whole_numbers(axes[0])
    axes[0].legend(loc="best", fontsize=8)
    for ax, kind in zip(axes[1:], kinds, strict=True):
        rows = [row for row in summary["robustness"] if row["kind"] == kind]
        for net in dict.fromkeys(row["net"] for row in rows):
            own = [row for row in rows if row["net"] == net]
            ax.plot([row["level"] for row in own], [100 * row["accuracy"] for row in own],
                    marker="o", label=f"{net} net, accuracy")  # fmt: skip
        measured = [row for row in rows if row["cosine"] is not None]
        if measured:
            ax.plot([row["level"] for row in measured], [100 * row["cosine"] for row in measured],
                    "--", marker="s", label="cosine of the gradient to backprop x 100")  # fmt: skip
        ax.set(xlabel=kind, ylabel="test accuracy / %")
        ax.legend(loc="best", fontsize=8)
    return figure
