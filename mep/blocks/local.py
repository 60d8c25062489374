"""The local-autograd block: any module, differentiated inside the block only.

It is the general path and the reference for the closed forms: every evaluation runs the modules
themselves, and every derivative comes from a graph that lives no longer than the call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from mep.blocks.block import Block, sample_norm
from mep.blocks.layers import Layer, layer_of
from mep.blocks.randomness import random_state, replayed
from mep.curvature import Signal

__all__ = ["LocalBlock"]


@dataclass
class _Learned:
    """What one backward pass through a block has found.

    Attributes:
        error: the error that was sent through.
        gradients: of the parameters that learn, None for one that had no part.
        layers: inner weights with a closed form that were used once, by id: those with ``rows``.
    """

    error: Tensor
    gradients: Sequence[Tensor | None]
    layers: set[int]


@dataclass
class _Point:
    """One evaluation.

    Attributes:
        state: the input ``s``.
        rng: the random state in front of the evaluation if it drew numbers, else None. Every
            later evaluation of the step starts from it, so that all phases share one mask.
        buffers: the buffers as the free evaluation left them, committed once per step.
        prediction: ``f(s)``, where it is known.
        learned: what a backward pass has found, until it is handed out.
    """

    state: Tensor
    rng: Tensor | None
    buffers: dict[str, Tensor]
    prediction: Tensor | None = None
    learned: _Learned | None = None


class LocalBlock(Block):
    """``f(s)`` by running modules in sequence; derivatives by autograd inside the block.

    Args:
        name: path of the weighted module in the model.
        modules: the modules in the order in which they are applied.
    """

    kind = "local autograd"

    def __init__(self, name: str, modules: list[nn.Module]) -> None:
        super().__init__(name, modules)
        self._body = nn.Sequential(*modules)

    def predict(self, s: Tensor) -> tuple[Tensor, _Point]:
        # A recorded subgraph's own flag is as old as the recording: its children's count.
        if not any(m.training for top in self.modules for m in top.modules()):
            out = self._body(_copy(s))
            return out, _Point(s, None, {}, out.detach())
        buffers = self._copy_buffers()
        before = random_state(s.device)
        out = functional_call(self._body, buffers, (_copy(s),))
        drew = not torch.equal(before, random_state(s.device))
        return out, _Point(s, before if drew else None, buffers, out.detach())

    def product(self, point: _Point, e: Tensor) -> Tensor:
        return e

    def pull(self, point: _Point, product: Tensor) -> Tensor:
        with torch.enable_grad():
            s = point.state.detach().requires_grad_()
            out = self._evaluate(point, s)
            return torch.autograd.grad(out, s, product)[0]

    def difference(self, point: _Point, d: Tensor) -> tuple[Tensor, _Point]:
        s = point.state
        if point.rng is None:
            # Subtracting two predictions rounds a small nudge away; in double it survives.
            wide, wide_d = s.double(), d.double()
            delta = self._evaluate(point, wide + wide_d) - self._evaluate(point, wide)
        else:
            # A wider type could draw another dropout mask from the same random state.
            delta = self._evaluate(point, s + d) - self._evaluate(point, s)
        return delta.to(s.dtype), _Point(s + d, point.rng, point.buffers)

    def advance(
        self, point: _Point, d: Tensor, product: Tensor, e: Tensor, beta: float = 0.0
    ) -> tuple[Tensor, _Point, Tensor]:
        f = point.prediction
        if f is None or f.dtype not in (torch.float32, torch.float64):
            return super().advance(point, d, product, e, beta)
        if beta:
            d.add_(e, alpha=beta)
        moved = _Point(point.state + d, point.rng, point.buffers)
        # What learns is told the same error: one graph serves for the force and for the gradients.
        out, pulled = self._learn(moved, product, pull=True)
        assert pulled is not None
        delta = out - f
        if point.rng is None and f.dtype == torch.float32 and _is_rough(delta, f):
            delta, _ = self.difference(point, d)
        return delta, moved, sample_norm(pulled - e)

    def signals(self, point: _Point, e: Tensor, scale: float) -> Iterator[Signal]:
        wanted = self._learning()
        if not wanted:
            return
        if point.learned is None or point.learned.error is not e:
            self._learn(point, e, pull=False)
        # Handed out, and made again for the next who asks: a point may outlive its signals.
        learned, point.learned = point.learned, None
        assert learned is not None
        evaluate = partial(self._evaluate, point, point.state)
        rows, each = _Rows(self._body, evaluate, e), _Each(evaluate, wanted, e)
        for parameter, gradient in zip(wanted, learned.gradients, strict=True):
            if gradient is not None:
                # autograd may hand out one tensor twice (for x + (a + b)): everyone gets his own
                form = partial(torch.mul, gradient.contiguous(), scale)
                inner = partial(rows.of, parameter) if id(parameter) in learned.layers else None
                alone = partial(each.of, parameter)
                yield Signal(parameter, scale, e.shape[0], form, inner, alone, formed=True)

    def _learning(self) -> list[nn.Parameter]:
        return [p for p in self._body.parameters() if p.requires_grad]

    def _learn(self, point: _Point, e: Tensor, *, pull: bool) -> tuple[Tensor, Tensor | None]:
        """Sends an error through the block, once; the point keeps what is learned from it.

        Returns:
            The prediction, and ``J^T e`` if that is wanted.
        """
        s, wanted = point.state.detach(), self._learning()
        with torch.enable_grad(), _watched(self._body, _uses_of) as uses:
            out = self._evaluate(point, s.requires_grad_(pull))
            below = [s] if pull else []
            found = torch.autograd.grad(out, [*below, *wanted], e, allow_unused=True)
        once = {key for key, count in Counter(map(id, uses)).items() if count == 1}
        point.learned = _Learned(e, found[len(below) :], once)
        return out.detach(), found[0] if pull else None

    def commit(self, point: _Point) -> None:
        own = dict(self._body.named_buffers())
        for name, value in point.buffers.items():
            own[name].copy_(value)

    def _evaluate(self, point: _Point, s: Tensor) -> Tensor:
        """Runs the modules with the point's random state and without touching any buffer."""
        tensors = self._copy_buffers()
        if s.is_floating_point() and s.dtype != point.state.dtype:
            tensors |= dict(self._body.named_parameters())
            tensors = {k: t.to(s.dtype) if t.is_floating_point() else t for k, t in tensors.items()}

        with replayed(point.rng, s.device):
            return functional_call(self._body, tensors, (_copy(s),))

    def _copy_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self._body.named_buffers()}


class _Each:
    """Gradients of single samples, by one backward pass each.

    Args:
        evaluate: returns the block's output, ``(B, *out)``.
        wanted: the parameters.
        e: the error, ``(B, *out)``.
    """

    def __init__(
        self, evaluate: Callable[[], Tensor], wanted: list[nn.Parameter], e: Tensor
    ) -> None:
        self._evaluate, self._wanted, self._e = evaluate, wanted, e
        self._span: slice | None = None
        self._found: dict[int, Tensor] = {}

    def of(self, parameter: nn.Parameter, span: slice) -> Tensor:
        """Returns one parameter's gradients of some samples."""
        if span != self._span:  # the parameters of a block are asked for one after another
            self._span, self._found = span, self._look(span)
        return self._found[id(parameter)]

    def _look(self, span: slice) -> dict[int, Tensor]:
        found: dict[int, list[Tensor]] = {id(p): [] for p in self._wanted}
        with torch.enable_grad():
            out = self._evaluate()
            for n in range(*span.indices(len(self._e))):
                gradients = torch.autograd.grad(
                    out[n], self._wanted, self._e[n], retain_graph=True, allow_unused=True,
                    materialize_grads=True,
                )  # fmt: skip
                for p, gradient in zip(self._wanted, gradients, strict=True):
                    found[id(p)].append(gradient)
        return {key: torch.stack(values) for key, values in found.items()}


class _Rows:
    """Activity and error of inner weights, by one more pass through the block.

    Whoever wants those of one weight has to ask before any of the block's parameters moves.

    Args:
        body: the block's modules.
        evaluate: returns the block's output, ``(B, *out)``.
        e: the error, ``(B, *out)``.
    """

    def __init__(self, body: nn.Module, evaluate: Callable[[], Tensor], e: Tensor) -> None:
        self._body, self._evaluate, self._e = body, evaluate, e
        self._found: dict[int, Callable[[], tuple[Tensor, Tensor]]] | None = None

    def of(self, weight: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Returns those of one weight, which is used once."""
        if self._found is None:  # all of them are asked for one after another
            with torch.enable_grad(), _watched(self._body, _kept_of) as seen:
                out = self._evaluate()
                outputs = [output for _, _, output in seen]
                errors = torch.autograd.grad(out, outputs, self._e, allow_unused=True)
            self._found = {
                id(layer.weight): partial(layer.rows, a, e)
                for (layer, a, _), e in zip(seen, errors, strict=True)
                if e is not None
            }
        if id(weight) not in self._found:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} is used apart from its own module, whose "
                "output has no part in the result: its gradient is no product of the two"
            )
        return self._found[id(weight)]()


_Note = Callable[[Layer, tuple, dict[str, Any], Tensor], tuple[Any, Tensor]]


def _uses_of(
    layer: Layer, given: tuple, named: dict[str, Any], output: Tensor
) -> tuple[nn.Parameter, Tensor]:
    """Which weight is used."""
    return layer.weight, output


def _kept_of(
    layer: Layer, given: tuple, named: dict[str, Any], output: Tensor
) -> tuple[tuple[Layer, Tensor, Tensor], Tensor]:
    """Layer, input and output; what follows may write over the output, and gets a copy."""
    return (layer, (given[0] if given else named["input"]).detach(), output), output.clone()


@contextmanager
def _watched(body: nn.Module, note: _Note) -> Iterator[list[Any]]:
    """Takes notes whenever an inner weight that has a closed form is used."""
    seen: list[Any] = []

    def watch(module: nn.Module) -> RemovableHandle | None:
        layer = layer_of(module)
        if layer is None or not layer.is_product or not layer.weight.requires_grad:
            return None

        def hook(_: nn.Module, given: tuple, named: dict[str, Any], output: Any) -> Any:
            noted, output = note(layer, given, named, output)
            seen.append(noted)
            return output

        return module.register_forward_hook(hook, with_kwargs=True)

    handles = [watch(module) for module in body.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()


def _is_rough(delta: Tensor, f: Tensor) -> bool:
    """Returns whether rounding may be more than about a thousandth of a difference of predictions.

    Of the whole batch's, and where products are not rounded to fewer digits than they are kept in.
    """
    if f.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        return True
    rounding = torch.finfo(f.dtype).eps * torch.linalg.vector_norm(f)
    return not bool(torch.linalg.vector_norm(delta) > 1e3 * rounding)


def _copy(s: Tensor) -> Tensor:
    """A module may work in place; the state belongs to the settling."""
    return s.clone()
