"""Pointwise activations in closed form: value, transposed slope and exact difference.

The difference ``phi(s + d) - phi(s)`` is what carries a nudge through a chain (design: nudged
phases are displacements). Subtracting two values would round a small nudge away, so every
activation here states the difference in a form whose relative error stays at rounding level
however small ``d`` is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Activation", "of_module", "sigmoid_difference", "tanh_difference"]

_kernel = torch.ops.aten

# Where ``move`` may write: the difference, the new value, and something to throw away.
_Room = tuple[Tensor | None, Tensor | None, Tensor | None]
_NO_ROOM: _Room = (None, None, None)


@dataclass(frozen=True)
class Activation:
    """One pointwise nonlinearity ``y = phi(x)``.

    Attributes:
        name: for reports.
        value: ``x -> phi(x)``.
        pull: ``(x, y, g) -> phi'(x) g``, by the kernels torch's own backward uses.
        move: ``(x, y, d, x_new) -> (phi(x + d) - phi(x), phi(x + d))`` with ``x_new = x + d``; the
            difference is free of cancellation.
        reads_input: False if ``pull`` looks at ``y`` and ``g`` alone; ``x`` need not be kept then.
        writes: True if ``value`` and ``pull`` take ``out=``, a tensor to write into, and ``move``
            takes ``room=``: three tensors, for the difference, the new value and for anything
            (which may be ``x_new``).
        bound: the largest ``|phi|``, infinite if there is none.
        box: for ramps (slope 1 inside, 0 outside), the two kinks; None for everything else.
    """

    name: str
    value: Callable[..., Tensor]
    pull: Callable[..., Tensor]
    move: Callable[..., tuple[Tensor, Tensor]]
    reads_input: bool = True
    writes: bool = False
    bound: float = math.inf
    box: tuple[float, float] | None = None


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def _ramp_difference(x: Tensor, d: Tensor) -> Tensor:
    """``relu(x + d) - relu(x)``: exactly ``d`` or 0 where the kink is not crossed."""
    return torch.maximum(d, -x).add_(x.clamp(max=0))


def tanh_difference(y: Tensor, y_new: Tensor, d: Tensor, room: _Room = _NO_ROOM) -> Tensor:
    """``tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)``."""
    one = _one(d.dtype, d.device)
    rest = torch.addcmul(one, y, y_new, value=-1, out=room[0])
    return rest.mul_(torch.tanh(d, out=room[2]))


def _with_sum(
    difference: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Completes a difference by the new value, where nothing cheaper than their sum is known."""

    def move(x: Tensor, y: Tensor, d: Tensor, x_new: Tensor) -> tuple[Tensor, Tensor]:
        delta = difference(x, y, d)
        return delta, y + delta

    return move


def sigmoid_difference(y: Tensor, y_new: Tensor, d: Tensor) -> Tensor:
    """The same identity at half the argument, written in sigmoids."""
    return torch.tanh(d / 2) * (y * (1 - y_new) + y_new * (1 - y))


@cache
def _relu() -> Activation:
    def value(x: Tensor, out: Tensor | None = None) -> Tensor:
        # clamp can write into `out`, but its own derivative at 0 is 1
        return torch.relu(x) if out is None else torch.clamp(x, min=0, out=out)

    def pull(x: Tensor, y: Tensor, g: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return _kernel.threshold_backward(g, y, 0)
        return _kernel.threshold_backward.grad_input(g, y, 0, grad_input=out)

    def move(
        x: Tensor, y: Tensor, d: Tensor, x_new: Tensor, room: _Room = _NO_ROOM
    ) -> tuple[Tensor, Tensor]:
        y_new = torch.clamp(x_new, min=0, out=room[1])
        # max(d + min(x, 0), -max(x, 0)): exactly d or 0 where the kink is not crossed
        delta = torch.sub(x, y, out=room[0]).add_(d)
        return torch.maximum(delta, torch.neg(y, out=room[2]), out=delta), y_new

    return Activation(
        "relu", value, pull, move, reads_input=False, writes=True, box=(0.0, math.inf)
    )


@cache
def _tanh() -> Activation:
    def pull(x: Tensor, y: Tensor, g: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return _kernel.tanh_backward(g, y)
        return _kernel.tanh_backward.grad_input(g, y, grad_input=out)

    def move(
        x: Tensor, y: Tensor, d: Tensor, x_new: Tensor, room: _Room = _NO_ROOM
    ) -> tuple[Tensor, Tensor]:
        y_new = torch.tanh(x_new, out=room[1])
        return tanh_difference(y, y_new, d, room), y_new

    return Activation("tanh", torch.tanh, pull, move, reads_input=False, writes=True, bound=1.0)


@cache
def _sigmoid() -> Activation:
    return Activation(
        "sigmoid",
        torch.sigmoid,
        lambda x, y, g: _kernel.sigmoid_backward(g, y),
        _with_sum(lambda x, y, d: sigmoid_difference(y, torch.sigmoid(x + d), d)),
    )


@cache
def _silu() -> Activation:
    def difference(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        p, p_new = torch.sigmoid(x), torch.sigmoid(x + d)
        return d * p_new + x * sigmoid_difference(p, p_new, d)

    return Activation(
        "silu", F.silu, lambda x, y, g: _kernel.silu_backward(g, x), _with_sum(difference)
    )


@cache
def _softplus(beta: float, threshold: float) -> Activation:
    def difference(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        near = torch.log1p(torch.sigmoid(beta * x) * torch.expm1((beta * d).clamp(-1, 1))) / beta
        linear, linear_new = beta * x > threshold, beta * (x + d) > threshold
        far = F.softplus(x + d, beta, threshold) - y
        # torch's softplus jumps a little where it turns linear: a crossing is subtracted plainly.
        curved = torch.where(((beta * d).abs() < 1) & ~(linear | linear_new), near, far)
        return torch.where(linear & linear_new, d, curved)

    return Activation(
        "softplus",
        lambda x: F.softplus(x, beta, threshold),
        lambda x, y, g: _kernel.softplus_backward(g, x, beta, threshold),
        _with_sum(difference),
    )


@cache
def _leaky_relu(slope: float) -> Activation:
    return Activation(
        "leaky_relu",
        lambda x: F.leaky_relu(x, slope),
        lambda x, y, g: _kernel.leaky_relu_backward(g, x, slope, False),
        _with_sum(lambda x, y, d: slope * d + (1 - slope) * _ramp_difference(x, d)),
    )


@cache
def _elu(alpha: float) -> Activation:
    def difference(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        positive = _ramp_difference(x, d)
        return positive + alpha * torch.exp(x.clamp(max=0)) * torch.expm1(d - positive)

    return Activation(
        "elu",
        lambda x: F.elu(x, alpha),
        lambda x, y, g: _kernel.elu_backward(g, alpha, 1, 1, False, x),
        _with_sum(difference),
    )


@cache
def _hardtanh(low: float, high: float) -> Activation:
    return Activation(
        "hardtanh",
        lambda x: F.hardtanh(x, low, high),
        lambda x, y, g: _kernel.hardtanh_backward(g, x, low, high),
        _with_sum(lambda x, y, d: _ramp_difference(x - low, d) - _ramp_difference(x - high, d)),
        box=(low, high),
    )


@cache
def _gelu_tanh() -> Activation:
    c, k = math.sqrt(2 / math.pi), 0.044715

    def pull(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        return _kernel.gelu_backward(g, x, approximate="tanh")

    def difference(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        x_new = x + d
        t, t_new = torch.tanh(c * (x + k * x**3)), torch.tanh(c * (x_new + k * x_new**3))
        inner = c * d * (1 + k * (x_new * x_new + x_new * x + x * x))
        return 0.5 * (d * (1 + t_new) + x * tanh_difference(t, t_new, inner))

    return Activation("gelu", lambda x: F.gelu(x, approximate="tanh"), pull, _with_sum(difference))


@cache
def _gelu() -> Activation:
    density = 1 / math.sqrt(2 * math.pi)
    # Three-point Gauss-Legendre on [0, 1]: its error d^6 / 2e6 is below double rounding for
    # |d| < 0.05, and from there on plain subtraction loses less than two digits.
    nodes = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 8 / 18), (0.5 + math.sqrt(0.15), 5 / 18))

    def cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def difference(x: Tensor, y: Tensor, d: Tensor) -> Tensor:
        p_new = cdf(x + d)
        near = torch.zeros_like(x)
        for node, weight in nodes:
            near += weight * torch.exp(-0.5 * (x + node * d) ** 2)
        rise = torch.where(d.abs() < 0.05, density * d * near, p_new - cdf(x))
        return d * p_new + x * rise

    return Activation(
        "gelu", F.gelu, lambda x, y, g: _kernel.gelu_backward(g, x), _with_sum(difference)
    )


@cache
def _identity() -> Activation:
    return Activation("identity", lambda x: x, lambda x, y, g: g, lambda x, y, d, x_new: (d, x_new))


_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: _relu(),
    nn.Tanh: lambda m: _tanh(),
    nn.Sigmoid: lambda m: _sigmoid(),
    nn.SiLU: lambda m: _silu(),
    nn.Softplus: lambda m: _softplus(m.beta, m.threshold),
    nn.LeakyReLU: lambda m: _leaky_relu(m.negative_slope),
    nn.ELU: lambda m: _elu(m.alpha),
    nn.Hardtanh: lambda m: _hardtanh(m.min_val, m.max_val),
    nn.ReLU6: lambda m: _hardtanh(0.0, 6.0),
    nn.GELU: lambda m: _gelu_tanh() if m.approximate == "tanh" else _gelu(),
    nn.Identity: lambda m: _identity(),
}


def of_module(module: nn.Module) -> Activation | None:
    """Returns the closed form of an activation module, or None if it has none here.

    Equal modules have one and the same, made once: a deep net has thousands. Subclasses do not
    match: they may compute something else.

    >>> of_module(torch.nn.ReLU()).name
    'relu'
    """
    make = _MODULES.get(type(module))
    return make(module) if make else None
