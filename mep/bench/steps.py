"""What is timed: nets, and one update of each by every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mep
from mep.bench.regime import LIMIT
from mep.bench.stepping import tanh_net
from mep.bench.timing import Findings

__all__ = ["ARMS", "BACKPROP", "EAGER", "EP", "FLOOR", "NETS", "Case", "arms_of", "case_of"]

BACKPROP, EP, FLOOR = "backprop", "EP", "bare products"
ARMS = {
    "backprop": BACKPROP,
    "foreach": "backprop, foreach SGD",
    "fused": "backprop, fused SGD",
    "compiled": "backprop, compiled",
    "ep": EP,
    "limit": LIMIT,
    "settle10": "EP, 10 gradient steps",
    "settle30": "EP, 30 gradient steps",
    "autograd10": "EP, 10 gradient steps, by autograd",
    "floor": FLOOR,
}
EAGER = ("backprop", "foreach", "fused")  # the fastest of these is what others are compared with

# At rate 0 an update does all its arithmetic, and every round times the same network.
_LR, _MOMENTUM = 0.0, 0.9


def _relu_net(depth: int, width: int) -> nn.Module:
    model = mep.models.deep_mlp(depth, width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-4 * torch.randn_like(parameter)
    return model


class _Transformer(nn.Module):
    """Blocks of attention and a feedforward net over the rows of an image."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(28, width)
        self.blocks = nn.Sequential(*[
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, activation=F.gelu, batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        ])  # fmt: skip
        self.last = nn.Linear(28 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.flatten(self.blocks(self.first(torch.flatten(x, 1, 2))), 1))


NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "tanh": tanh_net,
    "relu": _relu_net,
    "cnn": lambda depth, width: mep.models.deep_cnn(depth, width),
    "residual": lambda depth, width: mep.models.deep_mlp(depth, width, residual=True),
    "transformer": _Transformer,
}


@dataclass
class Case:
    """A net and a batch.

    Attributes:
        net: one of ``NETS``.
        depth: number of weighted layers, or of blocks of a transformer.
        width: units per hidden layer, or channels.
        batch: samples.
        make: returns the net, the same every time.
        x: input.
        y: target.
    """

    net: str
    depth: int
    width: int
    batch: int
    make: Callable[[], nn.Module]
    x: Tensor
    y: Tensor

    @property
    def name(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"net": self.net, "depth": self.depth, "width": self.width, "batch": self.batch}


def case_of(net: str, depth: int, width: int, batch: int, seed: int, device: torch.device) -> Case:
    """Returns a case with random data and weights."""

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return NETS[net](depth, width).to(device)

    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 28, 28, generator=draw).to(device)
    y = torch.randint(10, (batch,), generator=draw).to(device)
    return Case(net, depth, width, batch, make, x, y)


def arms_of(
    case: Case, chosen: tuple[str, ...], *, sweeps: int, c: float
) -> dict[str, Callable[[], Findings | None]]:
    """Returns one update by every chosen method, each with its own copy of the net.

    Args:
        case: net and batch.
        chosen: keys of ``ARMS``.
        sweeps: at most so many per nudged phase of EP.
        c: relative nudging strength.
    """
    nudge = mep.AutoBeta(c=c)
    settlers = {
        "ep": mep.Sweep(max_sweeps=sweeps),
        "limit": mep.Limit(),
        "settle10": mep.GradientDescent(max_steps=10),
        "settle30": mep.GradientDescent(max_steps=30),
        "autograd10": mep.GradientDescent(max_steps=10),
    }
    found: dict[str, Callable[[], Findings | None]] = {}
    for key in chosen:
        if key == "floor":
            found[ARMS[key]] = _products(case)
        elif key in settlers:
            method = "autograd" if key.startswith("autograd") else "analytic"
            found[ARMS[key]] = _ep(case, settlers[key], nudge, method)
        else:
            found[ARMS[key]] = _backprop(case, key)
    return found


def _backprop(case: Case, key: str) -> Callable[[], None]:
    model = case.make()
    fused = {"fused": True}
    how = {"foreach": {"foreach": True}, "fused": fused, "compiled": fused}.get(key, {})
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR, momentum=_MOMENTUM, **how)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    loss = torch.compile(loss_of) if key == "compiled" else loss_of

    def step() -> None:
        optimizer.zero_grad()
        loss(case.x, case.y).backward()
        optimizer.step()

    return step


def _ep(
    case: Case, settler: Any, nudge: mep.AutoBeta, gradient_method: str
) -> Callable[[], Findings]:
    model = case.make()
    optimizer = mep.EPOptimizer(
        model.parameters(), model=model, settler=settler, beta=nudge, lr=_LR, momentum=_MOMENTUM,
        gradient_method=gradient_method,
    )  # fmt: skip

    def findings() -> Mapping[str, Any]:
        last = optimizer.last
        assert last is not None  # an EP step has just been taken
        return {"residual": last.median, "sweeps": last.sweeps, "status": last.status}

    def step() -> Findings:
        optimizer.step(x=case.x, target=case.y)
        return findings

    return step


def _products(case: Case) -> Callable[[], None]:
    """The matrix products that an update of a plain net by EP cannot do without.

    Of ``L`` layers: ``L`` for the free phase, ``L - 1`` each for errors and displacements (nothing
    is below the first, whose prediction does not move), ``L`` for the contrast.

    Raises:
        ValueError: for a net that is not plain.
    """
    if case.net not in ("tanh", "relu"):
        raise ValueError(f"the floor of bare products is that of plain nets, not of {case.net!r}.")
    with torch.no_grad():
        weights = [m.weight.detach() for m in case.make().modules() if isinstance(m, nn.Linear)]
        x = case.x.flatten(1)
        below = [x, *(torch.zeros(case.batch, len(w)).to(x) for w in weights[:-1])]
        above = [torch.zeros(case.batch, len(w)).to(x) for w in weights]
        gradients = [torch.empty_like(w) for w in weights]

    def step() -> None:
        with torch.no_grad():
            for w, a, s in zip(weights, below, above, strict=True):
                torch.mm(a, w.t(), out=s)
            for w, a, e in zip(weights[:0:-1], below[:0:-1], above[:0:-1], strict=True):
                torch.mm(e, w, out=a)
            for w, a, s in zip(weights[1:], below[1:], above[1:], strict=True):
                torch.mm(a, w.t(), out=s)
            for g, a, e in zip(gradients, below, above, strict=True):
                torch.mm(e.t(), a, out=g)

    return step
