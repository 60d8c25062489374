"""The local signal of a weight: presynaptic activity and postsynaptic error.

It is what a contrast (or a backward pass) hands out, block by block. A consumer takes what it
needs: the dense gradient, the outer product's two factors, or statistics of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

__all__ = ["Factors", "Signal", "Stack", "finite_products", "squares", "stack_of"]


@dataclass(frozen=True, eq=False, slots=True)
class Stack:
    """What the signals of several weights of one shape are made of, as rows of one tensor each.

    Attributes:
        activities: ``(k, N, in)``.
        errors: ``(k, N, out)``.
    """

    activities: Tensor
    errors: Tensor


@dataclass(slots=True)
class Signal:
    """One contribution to one parameter's gradient.

    Attributes:
        parameter: whose gradient it is.
        scale: weight of the sum over the batch, ``1 / B`` and what else multiplies it.
        samples: number of samples ``B``.
        form: returns the dense gradient, a new tensor of the parameter's shape.
        rows: returns activity ``a`` ``(N, in)`` and error ``e`` ``(N, out)`` with the gradient
            ``scale e^T a``; ``N`` counts samples and positions, ``in`` the inputs of one unit
            (those of a patch for a convolution), and a bias has one input, which is 1. None where
            a gradient is no outer product.
        per_sample: returns the gradients of some samples, ``(n, *shape)``, without the scale; None
            where there is one row per sample, from which they follow.
        sample_squares: returns the sum of their squares over all samples where a kernel does so at
            once, else None.
        stack: the stack that ``rows`` come from, if there is one, and the place in it.
        formed: whether the dense gradient is known already, and ``form`` costs no product.
    """

    parameter: nn.Parameter
    scale: float
    samples: int
    form: Callable[[], Tensor]
    rows: Callable[[], tuple[Tensor, Tensor]] | None = None
    per_sample: Callable[[slice], Tensor] | None = None
    sample_squares: Callable[[], Tensor | None] | None = None
    stack: tuple[Stack, int] | None = None
    formed: bool = False


class Factors:
    """The gradient of one matrix as a sum of outer products, never formed unless asked for.

    ``G = sum_k scale_k e_k^T a_k``, shape ``(out, in)``: a convolution's kernel is flattened.

    Args:
        signals: of one parameter, each with ``rows``.

    >>> a, e = torch.ones(3, 2), torch.ones(3, 1)
    >>> weight = nn.Parameter(torch.zeros(1, 2))
    >>> signal = Signal(weight, 0.5, 3, lambda: 0.5 * e.T @ a, lambda: (a, e))
    >>> Factors([signal]).add_to(torch.zeros(1, 2))
    tensor([[1.5000, 1.5000]])
    """

    def __init__(self, signals: Iterable[Signal] = ()) -> None:
        self.signals = list(signals)

    @property
    def stack(self) -> Stack | None:
        """The stack that the gradient is a part of, if it is a part of one."""
        found = self.signals[0].stack
        return None if found is None or len(self.signals) > 1 else found[0]

    def dense(self) -> Tensor:
        """Returns the gradient, a new tensor of the parameter's shape."""
        total = self.signals[0].form()
        for signal in self.signals[1:]:
            total = total + signal.form()
        return total

    def add_to(self, matrix: Tensor, *, factor: float = 1.0, keep: float = 1.0) -> Tensor:
        """``M <- keep M + factor G`` in place, for a matrix ``(out, in)``; returns it."""
        for signal, a, e in self.rows():
            matrix.addmm_(e.t(), a, alpha=factor * signal.scale, beta=keep)
            keep = 1.0
        return matrix

    def scaled(self, factor: float) -> Factors:
        """Returns the gradient times a number."""
        return Factors(
            replace(s, scale=s.scale * factor, form=_times(s.form, factor)) for s in self.signals
        )

    def rows(self) -> Iterable[tuple[Signal, Tensor, Tensor]]:
        """Yields each signal with its activity and error."""
        for signal in self.signals:
            assert signal.rows is not None
            yield signal, *signal.rows()


def stack_of(gradients: Sequence[Factors]) -> tuple[Stack, float] | None:
    """Returns the stack whose weights these are, in order, and their scale; None if there is none.

    >>> a, e = torch.ones(2, 3, 4), torch.ones(2, 3, 1)
    >>> whole, weight = Stack(a, e), nn.Parameter(torch.zeros(1, 4))
    >>> one = [Factors([Signal(weight, 0.5, 3, lambda: a, stack=(whole, k))]) for k in range(2)]
    >>> stack_of(one) == (whole, 0.5), stack_of(one[1:]) is None
    (True, True)
    """
    stack, scale = gradients[0].stack, gradients[0].signals[0].scale
    if stack is None or not 1 < len(gradients) == len(stack.errors):
        return None
    for place, gradient in enumerate(gradients):
        signal = gradient.signals[0]
        if gradient.stack is not stack or signal.stack != (stack, place) or signal.scale != scale:
            return None
    return stack, scale


def finite_products(gradients: Iterable[Factors]) -> bool:
    """True if all gradients are sure to be finite, without forming any.

    >>> a = torch.tensor([[1e30, 0.0]])
    >>> signal = Signal(nn.Parameter(torch.zeros(2, 2)), 1.0, 1, lambda: a.T @ a, lambda: (a, a))
    >>> finite_products([Factors([signal])])
    False
    """
    signals = [signal for gradient in gradients for signal in gradient.signals]
    stacks = {id(s.stack[0]): s.stack[0] for s in signals if s.stack is not None}
    every = [t for stack in stacks.values() for t in (stack.activities, stack.errors)]
    alone = Factors(signal for signal in signals if signal.stack is None)
    every += [t for _, a, e in alone.rows() for t in (a, e)]
    # |G| <= |scale| |e| |a| for each product, and so with room to spare:
    total = sum(squares(t) for t in every) * sum(abs(signal.scale) for signal in signals)
    return total <= torch.finfo(every[0].dtype).max


def squares(tensor: Tensor) -> float:
    """Returns the sum of a tensor's squares, infinite where it overflows; shape is no matter.

    >>> squares(torch.tensor([[1.0], [2.0]]))
    5.0
    """
    flat = tensor.reshape(-1)
    return float(torch.dot(flat, flat))


def _times(form: Callable[[], Tensor], factor: float) -> Callable[[], Tensor]:
    return lambda: form().mul_(factor)
