"""Mixed precision: under ``torch.autocast`` a step runs on a twin of the model in bfloat16.

The model's own weights stay the masters: the twin's are copied from them before every step, and
gradients are handed to them in their own type.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mep.contrast.seen import Seen, unchanged
from mep.curvature import Signal

__all__ = ["Twin", "autocasts", "full", "mixed", "owned", "refuse_mixed", "twin_of", "wanted"]

_wanted: ContextVar[torch.dtype | None] = ContextVar("dtype of the twin", default=None)


def autocasts(x: Any) -> bool:
    """Returns whether ``torch.autocast`` is on where an input is.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocasts(torch.zeros(1))
    True
    """
    device = _device(x)
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _device(x: Any) -> str:
    return x.device.type if isinstance(x, Tensor) and not x.is_cpu else "cpu"


def mixed(x: Any) -> AbstractContextManager[None]:
    """Takes over from ``torch.autocast``, if that is on: free phases are those of a twin.

    Autocast itself is off while the context lasts: it would widen some operands of a product and
    not others.

    Args:
        x: an input, whose device is asked about.

    Raises:
        TypeError: for float16, in which nudges underflow.
    """
    if not autocasts(x):
        return nullcontext()
    device = _device(x)
    dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        raise TypeError(
            "float16 autocast is not supported: nudges underflow; use "
            f"torch.autocast({device!r}, torch.bfloat16)"
        )
    return _computing_in(dtype, device)


def full(device: torch.device) -> AbstractContextManager[None]:
    """Computes in full precision, whatever ``torch.autocast`` says."""
    return _computing_in(None, device.type)


@contextmanager
def _computing_in(dtype: torch.dtype | None, device: str) -> Iterator[None]:
    token = _wanted.set(dtype)
    try:
        with torch.autocast(device, enabled=False):
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


def refuse_mixed(option: str, model: nn.Module) -> None:
    """Refuses ``mixed`` for an option that changes weights while they are in use.

    Raises:
        ValueError: naming the option.
    """
    if wanted() is not None and _has_twin(model):
        raise ValueError(
            f"{option} updates weights during the nudged sweep, and autocast takes copies of them "
            "before: convert the model instead, model.bfloat16()"
        )


def _has_twin(model: nn.Module) -> bool:
    return any(p.dtype == torch.float32 for p in model.parameters())


class Twin:
    """A model in another type, with the original's weights and its hooks.

    Normalisations with running statistics stay as they are: averages would stall in few digits.

    Args:
        model: the original.
        dtype: of the twin.

    Attributes:
        model: the twin.
        dtype: see above.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._seen = [Seen(module) for module in model.modules()]
        norms = (module for module in model.modules() if isinstance(module, _NormBase))
        wide = {id(t) for module in norms for t in _tensors(module)}
        self._masters = _tensors(model)
        self._kinds = [(t.dtype, t.device) for t in self._masters]
        self._own = [self._copy(t, narrow=id(t) not in wide) for t in self._masters]
        pairs = [*zip(self._masters, self._own, strict=True)]
        self._master_of = {id(own): master for master, own in pairs}
        # What is copied has these for its own: the same tensors, and the original's very hooks.
        known: dict[int, Any] = {id(master): own for master, own in pairs}
        for module in model.modules():
            known |= {id(each): each for each in (module._forward_hooks, module._forward_pre_hooks)}
        self.model = copy.deepcopy(model, known)

    def _copy(self, t: Tensor, *, narrow: bool) -> Tensor:
        dtype = self.dtype if narrow and t.is_floating_point() else t.dtype
        own = torch.empty_like(t, dtype=dtype, requires_grad=False)
        return nn.Parameter(own, t.requires_grad) if isinstance(t, nn.Parameter) else own

    def is_of(self, model: nn.Module, dtype: torch.dtype) -> bool:
        """Returns whether it still is the twin of a model."""
        if dtype != self.dtype or not unchanged(self._seen):
            return False
        now = _tensors(model)
        same = len(now) == len(self._masters) and all(map(is_, now, self._masters))
        return same and [(t.dtype, t.device) for t in now] == self._kinds

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the original's weights and buffers."""
        for own, master in zip(self._own, self._masters, strict=True):
            own.copy_(master)
            if isinstance(own, nn.Parameter):
                own.requires_grad_(master.requires_grad)

    def given(self, x: Tensor) -> Tensor:
        """Returns an input in the twin's type, unless it holds whole numbers."""
        return x.to(self.dtype) if x.is_floating_point() else x

    def signal(self, signal: Signal) -> Signal:
        """Returns a signal of the original's weight, in that one's type."""
        master = self._master_of[id(signal.parameter)]
        form, rows, each = signal.form, signal.rows, signal.per_sample
        return replace(
            signal,
            parameter=master,
            form=lambda: form().to(master.dtype),
            rows=rows and (lambda: tuple(t.to(master.dtype) for t in rows())),
            per_sample=each and (lambda span: each(span).to(master.dtype)),
            sample_squares=None,  # of another type
            stack=None,  # of other rows
        )

    @torch.no_grad()
    def commit(self) -> None:
        """Gives running statistics back to the original; what has not changed keeps its digits."""
        for own, master in zip(self._own, self._masters, strict=True):
            if not isinstance(own, nn.Parameter):
                same = own == master.to(own.dtype)
                master.copy_(torch.where(same, master, own.to(master.dtype)))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def twin_of(model: nn.Module) -> Twin | None:
    """Returns the model's twin with its weights as they are now; None outside ``mixed``."""
    dtype = wanted()
    if dtype is None or not _has_twin(model):
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
