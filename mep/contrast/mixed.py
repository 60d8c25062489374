"""Mixed precision: under ``torch.autocast`` a step runs on a twin of the model in bfloat16.

The model's own weights stay the masters: the twin's are copied from them before every step, and
gradients are handed to them in their own type.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mep.contrast.seen import Seen
from mep.curvature import Signal

__all__ = ["Twin", "full", "mixed", "owned", "refuse_mixed", "twin_of", "wanted"]

_wanted: ContextVar[torch.dtype | None] = ContextVar("dtype of the twin", default=None)


@contextmanager
def mixed(x: Any) -> Iterator[None]:
    """Takes over from ``torch.autocast``, if that is on: free phases are those of a twin.

    Autocast itself is off while the context lasts: it would widen some operands of a product and
    not others.

    Args:
        x: an input, whose device is asked about.

    Raises:
        TypeError: for float16, in which nudges underflow.
    """
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        raise TypeError(
            "float16 autocast is not supported: nudges underflow; use "
            f"torch.autocast({device!r}, torch.bfloat16)"
        )
    token = _wanted.set(dtype)
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _wanted.reset(token)


@contextmanager
def full(device: torch.device) -> Iterator[None]:
    """Computes in full precision, whatever ``torch.autocast`` says."""
    token = _wanted.set(None)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _wanted.reset(token)


def wanted() -> torch.dtype | None:
    """Returns the type that a step is to be computed in, inside ``mixed``; None for the model's.

    >>> with torch.autocast("cpu", torch.bfloat16), mixed(torch.zeros(1)):
    ...     wanted(), torch.is_autocast_enabled("cpu")
    (torch.bfloat16, False)
    """
    return _wanted.get()


def refuse_mixed(option: str) -> None:
    """Refuses ``mixed`` for an option that changes weights while they are in use.

    Raises:
        ValueError: naming the option.
    """
    if wanted() is not None:
        raise ValueError(
            f"{option} updates weights during the nudged sweep, and autocast takes copies of them "
            "before: convert the model instead, model.bfloat16()"
        )


class Twin:
    """A model in another type, with the original's weights.

    Normalisations with running statistics stay as they are: averages would stall in few digits.

    Args:
        model: the original.
        dtype: of the twin.

    Attributes:
        model: the twin.
        dtype: see above.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = copy.deepcopy(model), dtype
        self._seen = [Seen(module) for module in model.modules()]
        for module in self.model.modules():
            if not isinstance(module, _NormBase):
                module._apply(self._narrowed, recurse=False)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        self._masters = {id(own): (own, master) for own, master in pairs}
        self._buffers = [*zip(self.model.buffers(), model.buffers(), strict=True)]

    def is_of(self, model: nn.Module, dtype: torch.dtype) -> bool:
        """Returns whether it still is the twin of a model."""
        same = [master for _, master in self._masters.values()]
        if dtype != self.dtype or not all(seen.unchanged() for seen in self._seen):
            return False
        return all(a is b for a, b in zip(same, model.parameters(), strict=True))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the original's weights and buffers."""
        pairs = [*self._masters.values()]
        for own, master in pairs:
            own.requires_grad_(master.requires_grad)
        pairs += self._buffers
        for own, master in pairs:
            own.copy_(master)

    def given(self, t: Any) -> Any:
        """Returns an input or a target in the twin's type, unless it holds whole numbers."""
        return t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

    def signal(self, signal: Signal) -> Signal:
        """Returns a signal of the original's weight, in that one's type."""
        _, master = self._masters[id(signal.parameter)]
        form, rows, each = signal.form, signal.rows, signal.per_sample
        return replace(
            signal,
            parameter=master,
            form=lambda: form().to(master.dtype),
            rows=rows and (lambda: tuple(t.to(master.dtype) for t in rows())),
            per_sample=each and (lambda span: each(span).to(master.dtype)),
            stack=None,  # of other rows
        )

    @torch.no_grad()
    def commit(self) -> None:
        """Gives running statistics back to the original; what has not changed keeps its digits."""
        for own, master in self._buffers:
            same = own == master.to(own.dtype)
            master.copy_(torch.where(same, master, own.to(master.dtype)))

    def _narrowed(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t


def twin_of(model: nn.Module) -> Twin | None:
    """Returns the model's twin with its weights as they are now; None outside ``mixed``."""
    dtype = wanted()
    if dtype is None or all(p.dtype != torch.float32 for p in model.parameters()):
        return None
    known = _twins.get(model)
    if known is None or not known.is_of(model, dtype):
        known = _twins[model] = Twin(model, dtype)
    known.refresh()
    return known


_twins: WeakKeyDictionary[nn.Module, Twin] = WeakKeyDictionary()


def owned(free: Any, signal: Signal) -> Signal:
    """Returns a free phase's signal as the model's own weights take it."""
    return signal if free.twin is None else free.twin.signal(signal)
