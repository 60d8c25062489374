"""Couplings: a net of units with symmetric interactions, and how a chain is read as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mep.blocks import Chain, ClosedBlock, Point, TraceError, parameters_of
from mep.blocks.layers import Linear as Matrix
from mep.blocks.layers import layer_of
from mep.blocks.operations import AvgPool2d, Dropout, MaxPool2d, Reshape, Scaling, operation_of
from mep.couplings.kinds import unit_of
from mep.couplings.units import POTENTIALS, Linear, Relaxing, Unit
from mep.curvature import Signal

__all__ = ["Coupled", "Couplings", "Interaction", "Wiring", "block_of", "couplings_of", "identity"]


# What may stand between an activity and a layer.
_KEPT = (AvgPool2d, MaxPool2d, Reshape, Scaling)


@dataclass(frozen=True, eq=False)
class Interaction:
    """``-factor <rho(s_target), W g(rho(s_source)) + b>``, ``g`` the steps between.

    Args:
        source: number of the state below; 0 is the input.
        target: number of the state above, from 1. Its own source for a lateral interaction, whose
            factor is 1/2: of its weight only the symmetric part acts.
        block: ``g``, of pooling, reshaping and fixed factors, and the weighted layer.
        factor: see above.
        feedback: what carries activities back in the weight's place, of its shape; None for its own
            transpose. With another there is no energy any more.
    """

    source: int
    target: int
    block: ClosedBlock
    factor: float = 1.0
    feedback: Tensor | None = None

    @property
    def linear(self) -> bool:
        """Whether what is pulled does not depend on the activity that it is pulled to."""
        return all(isinstance(op, (AvgPool2d, Reshape, Scaling)) for op in self.block.operations)

    @property
    def is_matrix(self) -> bool:
        """Whether nothing but a weight's matrix, and its transpose, lies between two activities.

        Not of subclasses, which may send something else.
        """
        plain = self.feedback is None and self.factor == 1 and not self.block.operations
        known = type(self) in (Interaction, _Change) and type(self.block) is ClosedBlock
        return plain and known and type(self.block.layer) is Matrix

    def push(self, a: Tensor) -> tuple[Tensor, Point]:
        """Returns the current ``W g(a) + b`` into the target, and the point of ``a``."""
        return self.block.predict(a)

    def pull(self, point: Point, a: Tensor) -> Tensor:
        """Returns the current ``g^T W^T a`` into the source, of the target's activity."""
        if not a.is_complex():
            return self._pull(point, a)
        return torch.complex(*(self._pull(point, part.contiguous()) for part in (a.real, a.imag)))

    def _pull(self, point: Point, a: Tensor) -> Tensor:
        if self.feedback is None:
            return self.block.pull(point, self.block.product(point, a))
        return self.block.pull(point, self.block.product_through(point, a, self.feedback))

    def around(self, point: Point, above: Tensor | None) -> Interaction:
        """Returns the interaction of changes of both activities.

        Args:
            point: of the source's activity.
            above: the target's activity; None for a read-out, whose target has none.
        """
        return _Change(
            self.source, self.target, self.block, self.factor, self.feedback, point, above
        )

    def change(self, point: Point, t: Tensor) -> Tensor:
        """Returns ``g(a + t) - g(a)``; for complex changes ``g`` must be linear."""
        if not t.is_complex():
            return self.block.change(point, t)
        return torch.complex(*(self.block.change(point, part) for part in (t.real, t.imag)))

    def signals(
        self, seen: Tensor, error: Tensor, scale: float, *, bias: bool = True
    ) -> Iterator[Signal]:
        """Yields the signals of ``scale Re(dF/dtheta)``, summed over the batch.

        Args:
            seen: ``g`` of the source's activity, or a change of it.
            error: the target's activity, or a change of it, times any factor.
            scale: factor on the gradient.
            bias: whether the bias has seen its constant activity of 1, or no change of it.
        """
        factor = -self.factor * scale
        yield from self._signals(_real(seen), _real(error), factor, bias)
        if seen.is_complex() and error.is_complex():
            yield from self._signals(
                seen.imag.contiguous(), error.imag.contiguous(), -factor, False
            )

    def _signals(self, seen: Tensor, error: Tensor, scale: float, bias: bool) -> Iterator[Signal]:
        layer = self.block.layer
        unchanged = None if bias or layer is None else layer.bias
        for signal in self.block.signals(Point([seen], []), error, scale):
            if signal.parameter is not unchanged:
                yield signal


@dataclass(frozen=True, eq=False)
class _Change(Interaction):
    """An interaction of changes, around the activities it was made for."""

    point: Point | None = None
    above: Tensor | None = None

    def push(self, a: Tensor) -> tuple[Tensor, Point]:
        assert self.point is not None
        if not self.linear:
            return self.block.difference(self.point, a)
        layer, change = self.block.layer, self.change(self.point, a)
        if layer is None:
            return change, self.point
        if not change.is_complex():
            return layer.push(change), self.point
        parts = (layer.push(part.contiguous()) for part in (change.real, change.imag))
        return torch.complex(*parts), self.point

    def pull(self, point: Point, a: Tensor) -> Tensor:
        pulled = super().pull(point, a)
        if self.linear or self.above is None:
            return pulled
        assert self.point is not None
        # The way back is another one.
        return pulled + (self._pull(point, self.above) - self._pull(self.point, self.above))


def _real(t: Tensor) -> Tensor:
    return t.real.contiguous() if t.is_complex() else t


class Wiring:
    """Which interactions lead into and out of every state.

    Attributes:
        units: of the states ``s_1 ... s_n``.
        interactions: between them, and from the input.
        readout: makes the output of the last activity; None if the last state is the output.
        into, out_of: numbers of the interactions, per state.
        idle: by number from 0, what exerts nothing on anything: a state, or the input. None for
            those of which no such thing is known.
    """

    def __init__(
        self,
        units: Sequence[Relaxing],
        interactions: Sequence[Interaction],
        readout: Interaction | None,
        idle: Sequence[Tensor | None],
    ) -> None:
        self.units = list(units)
        self.interactions = list(interactions)
        self.readout = readout
        self.idle = list(idle)
        states = range(1, len(units) + 1)
        self.into = [[k for k, c in enumerate(interactions) if c.target == i] for i in states]
        self.out_of = [[k for k, c in enumerate(interactions) if c.source == i] for i in states]


class Couplings(Wiring):
    """States ``s_1 ... s_n`` of units, their interactions, and a read-out beside them.

    Attributes:
        advised: whether its user has been told that it does not settle.
        by_autograd: whether contrasts are differences of energies, differentiated (the reference).

    Args:
        units: one per state.
        interactions: between states, and from the input.
        readout: makes the output of the last activity; None if the last state is the output. Its
            factor is -1, for a cost is added to the energy.

    Raises:
        ValueError: if a state has no interaction from below, or the output is no linear unit.
    """

    units: list[Unit]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        units: Sequence[Unit],
        interactions: Sequence[Interaction],
        readout: Interaction | None = None,
    ) -> None:
        super().__init__(units, interactions, readout, [None] * (len(units) + 1))
        self.by_autograd = False
        self.advised = False
        for i, into in enumerate(self.into, 1):
            if not any(interactions[k].source < i for k in into):
                raise ValueError(f"state {i} has no interaction from below: where should it start?")
        if readout is None and not isinstance(self.units[-1], Linear):
            raise ValueError(
                "without a read-out the last state is the output, and its unit must be Linear(), "
                f"not {self.units[-1]}"
            )
        if readout is not None and readout.source != len(units):
            raise ValueError(f"a read-out reads state {len(units)}, not {readout.source}")

    @property
    def blocks(self) -> list[ClosedBlock]:
        """The blocks of all interactions, and of the read-out."""
        last = [] if self.readout is None else [self.readout]
        return [c.block for c in self.interactions + last]

    @property
    def parameter(self) -> Tensor:
        """A parameter: what it says of dtype and device holds for all."""
        return next(self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every parameter once."""
        yield from parameters_of(self.blocks)

    @property
    def analytic(self) -> bool:
        """Whether states may be complex."""
        every = [*self.interactions, *([] if self.readout is None else [self.readout])]
        return all(c.linear for c in every) and all(unit.analytic for unit in self.units)


@runtime_checkable
class Coupled(Protocol):
    """A model that says of itself what its states and interactions are."""

    def couplings(self) -> Couplings:
        """Returns them, sharing the model's parameters."""
        ...


def block_of(name: str, *modules: nn.Module) -> ClosedBlock:
    """Returns the block of some pooling and reshaping modules and then a weighted layer.

    Args:
        name: for messages.
        modules: in the order in which they are applied.

    Raises:
        mep.TraceError: if one of them has no closed form.

    >>> block_of("recurrent", nn.Linear(4, 4)).describe()
    'Linear(4, 4)'
    """
    layer = layer_of(modules[-1])
    operations = [operation_of(module) for module in modules[:-1]]
    if layer is None or None in operations:
        raise TraceError(f"`{name}` has no closed form: {modules}")
    return ClosedBlock(name, [*modules], [op for op in operations if op is not None], layer)


def identity(name: str) -> ClosedBlock:
    """Returns the block of an interaction that carries activities as they are.

    Args:
        name: for messages.
    """
    return ClosedBlock(name, [], [], None)


def couplings_of(chain: Chain, *, potential: str | None = None, readout: bool = False) -> Couplings:
    """Reads a chain as a net of symmetric couplings.

    Every weighted layer couples two states, and its transpose carries activities back. The
    activation that follows a layer is that of its units; pooling and reshaping between an activity
    and the next layer belong to the interaction, and so does a fixed factor.

    Args:
        chain: of closed-form blocks: Linear and Conv2d, each but the first behind a bounded
            activation.
        potential: ``"square"`` or ``"conjugate"``, the units' own energy; by default square for
            ramps and conjugate for smooth units.
        readout: whether the last layer is no part of the equilibrium: its output is then a plain
            function of the last activity. Otherwise the output is a state like the others, whose
            activity is itself.

    Raises:
        ValueError: if ``potential`` is unknown.
        mep.TraceError: if the chain does not fit, naming every reason.

    >>> from mep.blocks import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> found = couplings_of(trace(net))
    >>> len(found.units), [(c.source, c.target) for c in found.interactions]
    (2, [(0, 1), (1, 2)])

    Source: Scellier & Bengio 2017, sec. 3; with pooling: Ernoult et al. 2019; with a read-out:
    Laborieux et al. 2021.
    """
    if potential is not None and potential not in POTENTIALS:
        raise ValueError(f"`potential` must be one of {POTENTIALS}, got {potential!r}")
    reasons: list[str] = []
    blocks, units = [], []
    for number, block in enumerate(chain.blocks):
        if not isinstance(block, ClosedBlock) or block.layer is None:
            reasons.append(
                f"`{block.name}` ({block.describe()}) is no plain Linear or Conv2d layer behind "
                "activation and pooling (modules with hooks are none)"
            )
            continue
        other = [op for op in block.operations[number > 0 :] if not isinstance(op, _KEPT)]
        if other and (number > 0 or any(isinstance(op, Dropout) for op in other)):
            reasons.append(
                f"`{block.name}` ({block.describe()}): between an activity and a layer there may "
                "only be pooling, reshaping and a factor, for what comes back has to take the "
                "same way"
            )
        if number == 0:
            blocks.append(block)
            continue
        unit = unit_of(block.modules[0], potential)
        if unit is None:
            reasons.append(
                f"`{block.name}` ({block.describe()}) does not begin with a bounded activation: "
                "nn.Hardtanh(0, 1), nn.Tanh() or nn.Sigmoid()"
            )
            continue
        units.append(unit)
        blocks.append(ClosedBlock(block.name, block.modules[1:], block.operations[1:], block.layer))
    if readout and len(chain) < 2:
        reasons.append("a read-out needs a layer of states below it")
    if reasons:
        raise TraceError(
            "the model cannot be read as a net of symmetric couplings:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    interactions = [Interaction(k, k + 1, block) for k, block in enumerate(blocks)]
    if not readout:
        return Couplings([*units, Linear()], interactions)
    last = interactions.pop()
    return Couplings(units, interactions, replace(last, factor=-1.0))
