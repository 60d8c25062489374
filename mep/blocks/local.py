"""The local-autograd block: any module, differentiated inside the block only.

It is the general path and the reference for the closed forms: every evaluation runs the modules
themselves, and every derivative comes from a graph that lives no longer than the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mep.blocks.block import Block
from mep.curvature import Signal

__all__ = ["LocalBlock"]


@dataclass
class _Point:
    """One evaluation.

    Attributes:
        state: the input ``s``.
        rng: the random state in front of the evaluation if it drew numbers, else None. Every
            later evaluation of the step starts from it, so that all phases share one mask.
        buffers: the buffers as the free evaluation left them, committed once per step.
    """

    state: Tensor
    rng: Tensor | None
    buffers: dict[str, Tensor]


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
            return self._body(_copy(s)), _Point(s, None, {})
        buffers = self._copy_buffers()
        before = _rng_state(s.device)
        out = functional_call(self._body, buffers, (_copy(s),))
        drew = not torch.equal(before, _rng_state(s.device))
        return out, _Point(s, before if drew else None, buffers)

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

    def signals(self, point: _Point, e: Tensor, scale: float) -> Iterator[Signal]:
        wanted = [p for p in self._body.parameters() if p.requires_grad]
        if not wanted:
            return
        with torch.enable_grad():
            out = self._evaluate(point, point.state)
            found = torch.autograd.grad(out, wanted, e * scale, allow_unused=True)
        for parameter, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                # autograd may hand out one tensor twice (for x + (a + b)): everyone gets his own
                own = partial(gradient.clone, memory_format=torch.contiguous_format)
                yield Signal(parameter, scale, e.shape[0], own)

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

        def run() -> Tensor:
            return functional_call(self._body, tensors, (_copy(s),))

        return run() if point.rng is None else _replay(point.rng, s.device, run)

    def _copy_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self._body.named_buffers()}


def _copy(s: Tensor) -> Tensor:
    """A module may work in place; the state belongs to the settling."""
    return s.clone()


def _rng_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _replay(rng: Tensor, device: torch.device, run: Callable[[], Tensor]) -> Tensor:
    """Runs a function from a given random state and puts the present one back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else [], device_type="cuda"):
        if cuda:
            torch.cuda.set_rng_state(rng, device)
        else:
            torch.set_rng_state(rng)
        return run()
