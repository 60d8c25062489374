"""Fused arithmetic between two products. Knows tensors alone; every kernel has an eager twin.

Kernels need numba on a CPU (``pip install "mep-torch[fast]"``) and Triton on a GPU (``[gpu]``).
Without them, and inside ``eager()``, the eager twins do the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mep.kernels.library import native
from mep.kernels.rows import rows

if TYPE_CHECKING:
    from mep.kernels.captured import Captured
    from mep.kernels.cpu import Kernels
    from mep.kernels.gpu import GpuLoops
    from mep.kernels.loops import Loops
    from mep.kernels.segments import CapturedSegments

__all__ = [
    "available",
    "capture",
    "capture_segments",
    "cross_entropy",
    "eager",
    "is_like",
    "kernels_of",
    "loops_of",
    "rows",
]

# With more classes torch's vectorised exponential takes less time than a scalar one.
_MOST_CLASSES = 32

_eager: ContextVar[bool] = ContextVar("eager arithmetic", default=False)


def available() -> bool:
    """Returns whether numba is installed.

    >>> isinstance(available(), bool)
    True
    """
    return _has("numba")


@cache
def _has(package: str) -> bool:
    return find_spec(package) is not None


@contextmanager
def eager() -> Iterator[None]:
    """Does without kernels while the context lasts: the reference they are compared with.

    >>> with eager():
    ...     kernels_of("tanh", torch.zeros(1)) is None
    True
    """
    token = _eager.set(True)
    try:
        yield
    finally:
        _eager.reset(token)


def kernels_of(activation: str, like: Tensor) -> Kernels | None:
    """Returns the kernels of an activation for tensors like this one, or None.

    Args:
        activation: its name, such as ``"tanh"``.
        like: gives dtype and device; there are kernels for float32 on a CPU.
    """
    if like.dtype != torch.float32 or not like.is_cpu or _eager.get():
        return None
    return _kernels(activation)


def loops_of(activation: str, weights: Sequence[Tensor]) -> Loops | GpuLoops | None:
    """Returns the passes over layers of one width, or None.

    Args:
        activation: before each of them.
        weights: of one dtype, ``(n, n)`` each, the last one ``(last, n)``.
    """
    if weights[0].is_cuda:
        return _gpu_loops_of(activation, weights)
    fused, found = kernels_of(activation, weights[0]), native()
    if fused is None or found is None or not all(is_like(w, weights[0]) for w in weights):
        return None
    from mep.kernels.loops import Loops

    return Loops(found, fused.kind, weights)


def _gpu_loops_of(activation: str, weights: Sequence[Tensor]) -> GpuLoops | None:
    plain = all(is_like(w, weights[0]) for w in weights) and weights[0].dtype == torch.float32
    if not plain or activation not in ("tanh", "relu") or _eager.get() or not _has("triton"):
        return None
    from mep.kernels.gpu import MOST_WIDTH, GpuLoops

    if max(*weights[0].shape, *weights[-1].shape) > MOST_WIDTH:
        return None
    return GpuLoops(activation == "tanh", weights)


def capture(
    activations: Sequence[str],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    skips: Sequence[bool],
    x: Tensor,
    squared: bool,
    limit: bool,
) -> Captured | None:
    """Returns what a perceptron's steps need, or None where there are no kernels for them.

    Args:
        activations: by name, those between layers.
        weights: ``(out, in)`` each.
        biases: ``(out,)`` each, or None.
        skips: whether a skip leads around a layer.
        x: an input like those to come, ``(B, in)``.
        squared: whether the cost is half the squared distance; cross-entropy otherwise.
        limit: whether there will be no nudged sweep.
    """
    kinds = [kernels_of(name, x) for name in activations]
    found, n = native(), x.shape[1]
    for weight, bias, skip in zip(weights, biases, skips, strict=True):
        fits = weight.dim() == 2 and weight.shape[1] == n and is_like(weight, x)
        fits = fits and (len(weight) == n or not skip)
        n = len(weight)
        if not fits or not (bias is None or (bias.shape == (n,) and is_like(bias, x))):
            return None
    if None in kinds or found is None or not (squared or n <= _MOST_CLASSES):
        return None
    from mep.kernels.captured import Captured

    numbers = [kind.kind for kind in kinds if kind is not None]
    return Captured(found, numbers, weights, biases, skips, len(x), squared, limit)


def capture_segments(
    activations: Sequence[str], x: Tensor
) -> tuple[CapturedSegments, list[int]] | None:
    """Returns the passes over segments of a perceptron, or None where there are no kernels for it.

    Args:
        activations: by name, those between layers.
        x: an input, ``(B, in)``; all parameters are like it.

    Returns:
        The passes, and the activations' numbers.
    """
    kinds, found = {name: kernels_of(name, x) for name in {*activations}}, native()
    numbers = {name: kind.kind for name, kind in kinds.items() if kind is not None}
    if len(numbers) < len(kinds) or found is None:
        return None
    from mep.kernels.segments import CapturedSegments

    return CapturedSegments(found, len(x)), [numbers[name] for name in activations]


def is_like(tensor: Tensor, x: Tensor) -> bool:
    """Returns whether a tensor's memory is what it says, and there is some."""
    plain = tensor.is_contiguous() and not tensor.is_neg() and tensor.numel() > 0
    return plain and tensor.dtype == x.dtype and tensor.device == x.device


def cross_entropy(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns ``-log softmax(s)_y`` and its gradient in ``s``, or None where there is no kernel.

    Args:
        s: ``(B, n)``.
        y: ``(B,)``, in ``[0, n)``.
    """
    fits = s.dtype == torch.float32 and s.is_cpu and s.dim() == 2 and s.shape[1] <= _MOST_CLASSES
    if not fits or _eager.get() or not available():
        return None
    from mep.kernels import cpu

    s, y = s.contiguous(), y.contiguous()
    value, gradient = torch.empty_like(s[:, 0]), torch.empty_like(s)
    cpu.cross_entropy(s.data_ptr(), y.data_ptr(), value.data_ptr(), gradient.data_ptr(), *s.shape)
    return value, gradient


@cache
def _kernels(activation: str) -> Kernels | None:
    if not available():
        return None
    from mep.kernels.cpu import kernels
    from mep.kernels.spread import spread

    alone, found = kernels(activation), native()
    return alone if alone is None or found is None else spread(alone, found)
