"""Passes over many layers of one width on a GPU: a few samples stay on chip from layer to layer.

The kernels of ``loops``, in Triton. One launch takes all layers, where a launch for every operation
and layer takes longer than the arithmetic: every program keeps the states of some samples in
registers and reads one weight after the other. With ``TRITON_INTERPRET=1`` they run on a CPU, one
program after the other, which is how they are tested where there is no GPU.
"""

# Triton gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from triton import language as tl

__all__ = ["GpuLoops", "most_width"]

# Bytes on chip that a weight of 128 rows and columns takes, with what goes along.
_ON_CHIP = 100_000
_SAMPLES = 16  # of a program; the least that a product takes


@triton.jit
def _tanh(x):
    """The same quotient as on a CPU, to 4e-7 of the value: an exponential would lose small ones."""
    c = tl.minimum(tl.maximum(x, -7.9988117), 7.9988117)
    q = c * c
    odd = q * -2.76076847742355e-16 + 2.00018790482477e-13
    odd = q * odd + -8.60467152213735e-11
    odd = q * odd + 5.12229709037114e-08
    odd = q * odd + 1.48572235717979e-05
    odd = q * odd + 6.37261928875436e-04
    odd = q * odd + 4.89352455891786e-03
    even = q * 1.19825839466702e-06 + 1.18534705686654e-04
    even = q * even + 2.26843463243900e-03
    even = q * even + 4.89352518554385e-03
    return tl.where(x == x, c * (odd / even), x)  # whatever a clamp makes of a NaN


@triton.jit
def _value(x, TANH: tl.constexpr):
    return _tanh(x) if TANH else tl.where(x <= 0, 0.0, x)


@triton.jit
def _slope(y, TANH: tl.constexpr):
    return 1.0 - y * y if TANH else tl.where(y <= 0, 0.0, 1.0)


@triton.jit
def _change(s, y, d, TANH: tl.constexpr):
    """``phi(s + d) - phi(s)`` without cancellation."""
    if TANH:
        t = _tanh(d)
        near = t * (1.0 - y * y) / (1.0 + y * t)
        # On its way to the other end of tanh a unit's quotient loses digits.
        change = tl.where(y * d < -0.5, _tanh(s + d) - y, near)
    else:
        moved = d + (s - y)
        change = tl.where(moved <= -y, -y, moved)
    return change


@triton.jit
def _at(table, k):
    """Returns the place in memory that a table of addresses names."""
    return tl.load(table + k).to(tl.pointer_type(tl.float32))


@triton.jit
def _product(a, weight, rows, columns, n, units, TRANSPOSED: tl.constexpr):
    """``a W^T``, or ``a W``, of a weight with ``rows`` rows and ``n`` columns."""
    if TRANSPOSED:
        inside = (units[None, :] < rows) & (columns[:, None] < n)
        w = tl.load(weight + units[None, :] * n + columns[:, None], mask=inside, other=0.0)
    else:
        inside = (columns[:, None] < rows) & (units[None, :] < n)
        w = tl.load(weight + columns[:, None] * n + units[None, :], mask=inside, other=0.0)
    return tl.dot(a, w, input_precision="ieee")


@triton.jit
def _free(
    s_, y_, f_, weights, biases, batch, n, last, depth,
    TANH: tl.constexpr, B: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``y <- phi(s)``, ``f <- W y + b`` layer after layer, where ``f`` is the next ``s``."""
    samples, units = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, N)
    here = samples[:, None] < batch
    own, inside = samples[:, None] * n + units[None, :], here & (units[None, :] < n)
    s = tl.load(_at(s_, 0) + own, mask=inside, other=0.0)
    for k in range(depth):
        rows = tl.where(k == depth - 1, last, n)
        y = _value(s, TANH)
        tl.store(_at(y_, k) + own, y, mask=inside)
        s = _product(y, _at(weights, k), rows, units, n, units, True)
        bias = tl.load(biases + k)
        given = units < tl.where(bias == 0, 0, rows)
        s += tl.load(bias.to(tl.pointer_type(tl.float32)) + units, mask=given, other=0.0)[None, :]
        above = samples[:, None] * rows + units[None, :]
        tl.store(_at(f_, k) + above, s, mask=here & (units[None, :] < rows))


@triton.jit
def _descend(
    y_, p_, e_, weights, top, sums, batch, n, last, depth,
    TANH: tl.constexpr, B: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``p <- W^T e_above``, ``e <- phi'(s) p`` from the last layer down, and all ``||e||^2``."""
    samples, units = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, N)
    here = samples[:, None] < batch
    own, inside = samples[:, None] * n + units[None, :], here & (units[None, :] < n)
    above = samples[:, None] * last + units[None, :]
    e = tl.load(top + above, mask=here & (units[None, :] < last), other=0.0)
    squares = tl.zeros((B,), dtype=tl.float64)
    for down in range(depth):
        k = depth - 1 - down
        rows = tl.where(k == depth - 1, last, n)
        p = _product(e, _at(weights, k), rows, units, n, units, False)
        tl.store(_at(p_, k) + own, p, mask=inside)
        y = tl.load(_at(y_, k) + own, mask=inside, other=0.0)
        e = _slope(y, TANH) * p
        tl.store(_at(e_, k) + own, e, mask=inside)
        squares += tl.sum(e * e, axis=1).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit
def _climb(
    s_, y_, p_, e_, new, norms, above_, weights, moved, beta, batch, n, last, depth,
    TANH: tl.constexpr, B: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``d <- W (phi(s + d) - phi(s))`` layer after layer, each but the first with ``+ beta e``."""
    samples, units = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, N)
    here = samples[:, None] < batch
    own, inside = samples[:, None] * n + units[None, :], here & (units[None, :] < n)
    d = tl.load(moved + own, mask=inside, other=0.0)
    for k in range(depth):
        rows = tl.where(k == depth - 1, last, n)
        s = tl.load(_at(s_, k) + own, mask=inside, other=0.0)
        y = tl.load(_at(y_, k) + own, mask=inside, other=0.0)
        p = tl.load(_at(p_, k) + own, mask=inside, other=0.0)
        e = tl.load(_at(e_, k) + own, mask=inside, other=0.0)
        d += tl.where(k == 0, 0.0, beta) * e
        # The displacement above the layer before is whole now.
        tl.store(_at(above_, tl.where(k == 0, 0, k - 1)) + own, d, mask=inside & (k > 0))
        change = _change(s, y, d, TANH)
        y_new = y + change
        tl.store(_at(new, k) + own, y_new, mask=inside)
        force = tl.where(inside, _slope(y_new, TANH) * p - e, 0.0)
        tl.store(_at(norms, k) + samples, tl.sqrt(tl.sum(force * force, axis=1)), samples < batch)
        change = tl.where(inside, change, 0.0)
        d = _product(change, _at(weights, k), rows, units, n, units, True)
        above = samples[:, None] * rows + units[None, :]
        tl.store(_at(above_, k) + above, d, mask=here & (units[None, :] < rows))


def most_width(device: torch.device) -> int:
    """Returns the largest width of a weight that fits on a device's chip."""
    if device.type != "cuda":  # interpreted
        return 128
    own = torch.cuda.get_device_properties(device)
    return 128 if getattr(own, "shared_memory_per_block_optin", 0) >= _ON_CHIP else 64


class GpuLoops:
    """The passes of one activation over layers of one width: as ``Loops``, on a GPU.

    Args:
        tanh: whether the activation is tanh; ReLU otherwise.
        weights: ``(n, n)`` each, the last one ``(last, n)``; ``n`` and ``last`` are
            ``most_width`` at the most.
    """

    def __init__(self, tanh: bool, weights: Sequence[Tensor]) -> None:
        self._device = weights[0].device
        self._weights = self._table(weights)
        last, n = weights[-1].shape
        self._shape = {"n": n, "last": last, "depth": len(weights)}
        width = max(16, triton.next_power_of_2(max(n, last)))
        self._form = {"TANH": tanh, "B": _SAMPLES, "N": width}

    def free(
        self, s: list[Tensor], y: list[Tensor], f: list[Tensor], biases: Sequence[Tensor | None]
    ) -> None:
        """``y <- phi(s)``, ``f <- W y + b``."""
        tables = [*map(self._table, (s, y, f)), self._weights, self._table(biases)]
        self._take(_free, len(s[0]), *tables)

    def descend(self, y: list[Tensor], above: Tensor, p: list[Tensor], e: list[Tensor]) -> Tensor:
        """``p <- W^T e_above``, ``e <- phi'(s) p``; returns the sum of all ``||e||^2``."""
        sums = torch.empty(self._programs(len(above)), dtype=torch.float64, device=self._device)
        tables = [*map(self._table, (y, p, e)), self._weights, above, sums]
        self._take(_descend, len(above), *tables)
        return sums.sum()

    def climb(
        self,
        s: list[Tensor],
        y: list[Tensor],
        d: Tensor,
        beta: float,
        p: list[Tensor],
        e: list[Tensor],
        change: Tensor,
        y_new: list[Tensor],
        norm: list[Tensor],
        above: list[Tensor],
    ) -> None:
        """``d_above <- W (phi(s + d) - phi(s))``, below all but the first ``d <- d + beta e``."""
        tables = [*map(self._table, (s, y, p, e, y_new, norm, above)), self._weights, d]
        self._take(_climb, len(d), *tables, beta)

    def _take(self, kernel, batch: int, *arguments: Tensor | float) -> None:
        # Triton launches on the present device, whichever the tensors are on.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            kernel[(self._programs(batch),)](*arguments, batch, **self._shape, **self._form)

    def _programs(self, batch: int) -> int:
        return triton.cdiv(batch, _SAMPLES)

    def _table(self, tensors: Sequence[Tensor | None]) -> Tensor:
        found = [0 if t is None else t.data_ptr() for t in tensors]
        return torch.tensor(found, dtype=torch.int64, device=self._device)
