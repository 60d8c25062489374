"""A tracker of live bytes: what is in memory at the worst moment, by kind and by phase."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["KINDS", "Usage", "label", "phase", "show_use", "track", "watched"]

PARAMETERS, STATE = "parameters", "optimizer state"
KINDS: tuple[str, ...] = (PARAMETERS, STATE, "gradients", "states", "other")
_LASTING = (PARAMETERS, STATE)

_watching: list[track] = []


class phase:
    """Names a part of a step for trackers and profilers; nothing happens while none looks on.

    The innermost name counts.

    Args:
        name: such as ``"mep: settle"``.

    >>> with phase("mep: settle"):
    ...     pass
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._record: Any = None

    def __enter__(self) -> None:
        for tracker in _watching:
            tracker.begin(self._name)
        if torch.autograd.profiler._is_profiler_enabled:
            self._record = record_function(self._name)
            self._record.__enter__()

    def __exit__(self, *problem: Any) -> None:
        for tracker in _watching:
            tracker.end()
        if self._record is not None:
            self._record.__exit__(*problem)


def watched() -> bool:
    """Returns whether a tracker or a profiler looks on.

    >>> with track():
    ...     watched()
    True
    """
    return bool(_watching) or torch.autograd.profiler._is_profiler_enabled


def label(tensor: Tensor, kind: str) -> Tensor:
    """Tells the trackers that look on what a tensor is, and returns it.

    >>> label(torch.zeros(2), "gradients")
    tensor([0., 0.])
    """
    for tracker in _watching:
        tracker.label(tensor, kind)
    return tensor


def show_use(tensors: Iterable[Tensor], kind: str) -> None:
    """Tells the trackers that look on of tensors that are used without an operation of torch's.

    >>> with track() as usage:
    ...     show_use([torch.zeros(256)], "states")
    >>> usage.peak["states"]
    1024
    """
    for tracker in _watching:
        for tensor in tensors:
            tracker.label(tensor, kind)


@dataclass
class Usage:
    """What a tracker has seen, in bytes.

    Attributes:
        peak: live bytes by kind at the moment when most was live besides parameters and optimizer
            state.
        phases: by the name of a phase, the most that was live besides these two during it.
        allocator: largest number of bytes that torch's CUDA allocator held; None on CPU.
    """

    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    phases: dict[str, int] = field(default_factory=dict)
    allocator: int | None = None

    @property
    def extra(self) -> int:
        """Peak of everything but parameters and optimizer state."""
        return sum(size for kind, size in self.peak.items() if kind not in _LASTING)


class track(TorchDispatchMode):
    """Tracks live storages while the context lasts: exact, deterministic, on any device.

    Counted is every tensor storage that an operation reads or makes, from then until it dies; each
    once, however many views there are. What a kernel needs inside is not seen, nor is memory that
    the allocator keeps for later. Every operation takes some ten microseconds longer.

    Args:
        model: its parameters and buffers count as ``"parameters"``, their ``.grad`` as
            ``"gradients"``.
        optimizer: its state counts as ``"optimizer state"``. State that a first step makes counts
            as other until that step ends: take one step before.
        samples: batch size; what has one row per sample counts as ``"states"`` (activities,
            errors, displacements, what a graph has saved).

    Raises:
        ValueError: if ``samples`` is not positive.

    >>> with track() as usage:
    ...     x = torch.zeros(256) + 1
    >>> usage.extra
    2048

    Source: the idea of torch's own memory tracker, following storages by weak references.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        samples: int | None = None,
    ) -> None:
        super().__init__()
        if samples is not None and samples < 1:
            raise ValueError(f"`samples` must be >= 1, got {samples}")
        self.usage = Usage()
        self._model = model
        self._optimizer = optimizer
        self._samples = samples
        self._live: dict[int, tuple[int, str]] = {}
        self._now = dict.fromkeys(KINDS, 0)
        self._extra = 0
        self._open: list[str] = []
        self._hooks: list[Any] = []
        self._finalizers: dict[int, weakref.finalize] = {}

    def __enter__(self) -> Usage:  # type: ignore[override]
        if self._model is not None:
            for parameter in self._model.parameters():
                self._see(parameter, PARAMETERS)
                if parameter.grad is not None:
                    self._see(parameter.grad, "gradients")
                if parameter.is_leaf and parameter.requires_grad and _storage(parameter):
                    hook = parameter.register_post_accumulate_grad_hook(self._label_gradient)
                    self._hooks.append(hook)
            for buffer in self._model.buffers():
                self._see(buffer, PARAMETERS)
        if self._optimizer is not None:
            self._label_state(self._optimizer)
            self._hooks.append(self._optimizer.register_step_post_hook(self._label_state))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        _watching.append(self)
        super().__enter__()
        return self.usage

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        _watching.remove(self)
        for hook in self._hooks:
            hook.remove()
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._model = self._optimizer = None
        if torch.cuda.is_available():
            self.usage.allocator = torch.cuda.max_memory_allocated()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._see(value)
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._see(value)
        return out

    def begin(self, name: str) -> None:
        """Opens a phase; ``mep.memory.phase`` does."""
        self._open.append(name)
        self._note_phase()

    def end(self) -> None:
        """Closes the innermost phase."""
        if self._open:
            self._open.pop()
            self._note_phase()

    @property
    def live(self) -> int:
        """Bytes that are live now, besides parameters and optimizer state."""
        return self._extra

    @property
    def most(self) -> int:
        """The most that was, since the tracker was entered or reset."""
        return self.usage.extra

    def reset(self) -> int:
        """Forgets the peak: it is what is live now, which is returned."""
        self.usage.peak = dict(self._now)
        return self._extra

    def label(self, tensor: Tensor, kind: str) -> None:
        """Moves a storage to another kind; one that has not been seen yet is counted as that kind.

        What has been counted towards a peak before it was called a parameter or optimizer state
        stays counted there.

        Raises:
            ValueError: for an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}")
        self._see(tensor, kind)
        storage = _storage(tensor)
        if storage is None:
            return
        size, known = self._live[storage._cdata]
        if known == kind:
            return
        at_peak = self._now == self.usage.peak
        self._live[storage._cdata] = size, kind
        self._now[known] -= size
        self._now[kind] += size
        self._extra = sum(n for k, n in self._now.items() if k not in _LASTING)
        if at_peak and kind not in _LASTING:  # it was the tensor that made the peak
            self.usage.peak = dict(self._now)

    def _label_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.label(parameter.grad, "gradients")

    def _label_state(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for tensor in _tensors(optimizer.state.values()):
            self.label(tensor, STATE)

    def _see(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = _storage(tensor)
        if storage is None:
            return
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is None:
            # By weak references both ways: neither keeps the other alive.
            self._finalizers[key] = weakref.finalize(storage, _gone, weakref.ref(self), key)
            self._finalizers[key].atexit = False
            kind = kind or self._kind_of(tensor)
            self._live[key] = size, kind
            self._add(kind, size)
        elif known[0] != size:  # resized
            self._live[key] = size, known[1]
            self._add(known[1], size - known[0])

    def _kind_of(self, tensor: Tensor) -> str:
        rows = tensor.shape[0] if tensor.dim() else None
        floats = tensor.is_floating_point()
        return "states" if floats and rows is not None and rows == self._samples else "other"

    def forget(self, key: int) -> None:
        """Takes note that a storage has died."""
        size, kind = self._live.pop(key)
        self._finalizers.pop(key, None)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self._now[kind] += size
        if kind in _LASTING:
            return
        self._extra += size
        if self._extra > self.usage.extra:
            self.usage.peak = dict(self._now)
        self._note_phase()

    def _note_phase(self) -> None:
        if self._open:
            name = self._open[-1]
            self.usage.phases[name] = max(self._extra, self.usage.phases.get(name, 0))


def _gone(tracker: weakref.ref[track], key: int) -> None:
    alive = tracker()
    if alive is not None:
        alive.forget(key)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """Returns where a tensor's bytes lie; None if it has none (meta), or several (sparse)."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.is_nested:
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError, ValueError):  # a wrapper, or not there yet
        return None


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    return (leaf for leaf in tree_iter(list(values)) if isinstance(leaf, Tensor))
