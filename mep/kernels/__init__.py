"""Fused arithmetic between two products. Knows tensors alone; every kernel has an eager twin.

Kernels need numba on a CPU (``pip install "mep-torch[fast]"``) and Triton on a GPU (``[gpu]``).
Without them, and inside ``eager()``, the eager twins do the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mep.kernels.coupled import CoupledPhase
from mep.kernels.layout import is_channels_last, laid_like, rows_of
from mep.kernels.library import native
from mep.kernels.rows import rows

if TYPE_CHECKING:
    from mep.kernels.captured import Captured
    from mep.kernels.cpu import Kernels
    from mep.kernels.gpu import GpuLoops
    from mep.kernels.library import Native
    from mep.kernels.loops import Loops
    from mep.kernels.ramp import Ramps
    from mep.kernels.rounds import Rounds
    from mep.kernels.segments import CapturedSegments

__all__ = [
    "DESCENT",
    "LIMIT",
    "SWEEP",
    "SWEEPS",
    "CoupledPhase",
    "available",
    "capture",
    "capture_segments",
    "cross_entropy",
    "eager",
    "is_channels_last",
    "kernels_of",
    "laid_like",
    "loops_of",
    "ramps_of",
    "rounds_of",
    "rows",
    "rows_of",
    "sample_squares",
]

# What a captured step has room for: no nudged phase, one sweep, any number, steps downhill.
LIMIT, SWEEP, SWEEPS, DESCENT = "limit", "sweep", "sweeps", "descent"
# With more classes torch's vectorised exponential takes less time than a scalar one.
_MOST_CLASSES = 32
# Numbers that all threads together may keep for sums of squares, and for gradients.
_MOST_SQUARES = 2**24

_eager: ContextVar[bool] = ContextVar("eager arithmetic", default=False)


def available() -> bool:
    """Returns whether numba is installed.

    >>> isinstance(available(), bool)
    True
    """
    return _has("numba")


@cache
def _has(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:  # it is not there, or does not go with what is
        return False
    return True


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


def ramps_of(*tensors: Tensor | None) -> Ramps | None:
    """Returns the arithmetic of ramps that settle for such tensors, or None.

    Args:
        tensors: of one shape, and in the same order in memory.
    """
    known = [t for t in tensors if t is not None]
    s = known[0]
    if s.dtype != torch.float32 or not s.is_cpu or _eager.get() or torch.is_grad_enabled():
        return None
    ordered = is_channels_last if is_channels_last(s) else Tensor.is_contiguous
    if not all(ordered(t) and t.dtype == s.dtype and t.shape == s.shape for t in known):
        return None
    return _ramps()


def rounds_of(phase: CoupledPhase) -> Rounds | None:
    """Returns room in which a perceptron's coupled states relax, or None without kernels for it.

    Args:
        phase: what relaxes.
    """
    found, s = native(), phase.start[0]
    if found is None or ramps_of(s) is None:
        return None
    if not all(t is None or (t.shape == size and _is_like(t, s)) for t, size in phase.shapes()):
        return None
    from mep.kernels.rounds import Rounds

    return Rounds(found, phase)


@cache
def _ramps() -> Ramps | None:
    if not available():
        return None
    from mep.kernels.ramp import Ramps

    return Ramps(native())


def loops_of(activation: str, weights: Sequence[Tensor]) -> Loops | GpuLoops | None:
    """Returns the passes over layers of one width, or None.

    Args:
        activation: before each of them.
        weights: of one dtype, ``(n, n)`` each, the last one ``(last, n)``.
    """
    if weights[0].is_cuda:
        return _gpu_loops_of(activation, weights)
    fused, found = kernels_of(activation, weights[0]), native()
    if fused is None or found is None or not all(_is_like(w, weights[0]) for w in weights):
        return None
    from mep.kernels.loops import Loops

    return Loops(found, fused.kind, weights)


def _gpu_loops_of(activation: str, weights: Sequence[Tensor]) -> GpuLoops | None:
    plain = all(_is_like(w, weights[0]) for w in weights) and weights[0].dtype == torch.float32
    if not plain or activation not in ("tanh", "relu") or _eager.get() or not _has("triton"):
        return None
    from mep.kernels.gpu import GpuLoops, most_width

    if max(*weights[0].shape, *weights[-1].shape) > most_width(weights[0].device):
        return None
    return GpuLoops(activation == "tanh", weights)


def capture(
    activations: Sequence[str],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    skips: Sequence[bool],
    x: Tensor,
    squared: bool,
    settling: str,
) -> Captured | None:
    """Returns what a perceptron's steps need, or None where there are no kernels for them.

    Args:
        activations: by name, those between layers.
        weights: ``(out, in)`` each.
        biases: ``(out,)`` each, or None.
        skips: whether a skip leads around a layer.
        x: an input like those to come, ``(B, in)``.
        squared: whether the cost is half the squared distance; cross-entropy otherwise.
        settling: what there is to be room for: ``LIMIT``, ``SWEEP``, ``SWEEPS`` or ``DESCENT``.
    """
    known = _known(activations, weights, biases, skips, x)
    if known is None or (not squared and len(weights[-1]) > _MOST_CLASSES):
        return None
    from mep.kernels.captured import Captured

    return Captured(*known, weights, biases, skips, len(x), squared, settling)


def capture_segments(
    activations: Sequence[str],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    skips: Sequence[bool],
    x: Tensor,
) -> tuple[CapturedSegments, list[int]] | None:
    """Returns the passes over segments of a perceptron, or None where there are no kernels for it.

    Args:
        activations: by name, those between layers.
        weights: ``(out, in)`` each.
        biases: ``(out,)`` each, or None.
        skips: whether a skip leads around a layer.
        x: an input like those to come, ``(B, in)``.

    Returns:
        The passes, and the activations' numbers.
    """
    known = _known(activations, weights, biases, skips, x)
    if known is None:
        return None
    from mep.kernels.segments import CapturedSegments

    found, numbers = known
    return CapturedSegments(found, len(x)), numbers


def _known(
    activations: Sequence[str],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    skips: Sequence[bool],
    x: Tensor,
) -> tuple[Native, list[int]] | None:
    """Returns what a perceptron's passes call, and its activations' numbers; None without."""
    numbers, found = _numbers(activations, x), native()
    if numbers is None or found is None or not _fit(weights, biases, skips, x):
        return None
    return found, numbers


def _numbers(activations: Sequence[str], x: Tensor) -> list[int] | None:
    """Returns the activations' numbers, or None if one has no kernel for states like this."""
    kinds = {name: kernels_of(name, x) for name in {*activations}}
    numbers = {name: kind.kind for name, kind in kinds.items() if kind is not None}
    return [numbers[name] for name in activations] if len(numbers) == len(kinds) else None


def _fit(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    skips: Sequence[bool],
    x: Tensor,
) -> bool:
    """Returns whether every layer takes what the one below it gives."""
    n = x.shape[1]
    for weight, bias, skip in zip(weights, biases, skips, strict=True):
        fits = weight.dim() == 2 and weight.shape[1] == n and _is_like(weight, x)
        fits = fits and (weight.shape[0] == n or not skip)
        n = weight.shape[0]
        if not fits or not (bias is None or (bias.shape == (n,) and _is_like(bias, x))):
            return False
    return True


def _is_like(tensor: Tensor, x: Tensor) -> bool:
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


def sample_squares(a: Tensor, e: Tensor, convolution: nn.Conv2d | None = None) -> Tensor | None:
    """Returns ``sum_n g_n^2`` of a weight at several positions, or None where there is no kernel.

    Args:
        a: what goes in, ``(B, positions, in)`` or ``(B, channels, height, width)``.
        e: the error of what comes out, ``(B, positions, out)`` or ``(B, channels, rows, columns)``.
        convolution: what leads from one to the other, of one group; a linear layer if None.
    """
    plain = all(t.dtype == torch.float32 and t.is_cpu and not t.requires_grad for t in (a, e))
    found = native() if plain and available() and not _eager.get() else None
    if found is None or not _may_square(a, e, convolution):
        return None
    from mep.kernels.squares import convolved, repeated

    a, e = a.resolve_neg().contiguous(), e.resolve_neg().contiguous()
    return repeated(found, a, e) if convolution is None else convolved(found, convolution, a, e)


def _may_square(a: Tensor, e: Tensor, convolution: nn.Conv2d | None) -> bool:
    """Returns whether shapes go together, and the gradients of a sample are small enough."""
    if convolution is None:
        fits = a.dim() == e.dim() == 3 and a.shape[:2] == e.shape[:2]
        weights = a.shape[-1] * e.shape[-1]
    else:
        channels = convolution.in_channels, convolution.out_channels
        fits = a.dim() == e.dim() == 4 and len(a) == len(e) and convolution.groups == 1
        fits = fits and (a.shape[1], e.shape[1]) == channels
        weights = convolution.weight.numel()
    few = torch.get_num_threads() * weights <= _MOST_SQUARES
    return fits and few and a.numel() > 0 and e.numel() > 0


@cache
def _kernels(activation: str) -> Kernels | None:
    if not available():
        return None
    from mep.kernels.cpu import kernels
    from mep.kernels.spread import spread

    alone, found = kernels(activation), native()
    return alone if alone is None or found is None else spread(alone, found)
