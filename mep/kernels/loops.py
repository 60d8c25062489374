"""Passes over many layers of one width that do not come back to Python between two of them.

Samples do not see each other: every thread takes some of them through all layers. What a pass needs
is a row of 8-byte numbers, its *job*: the functions of ``Native``, numbers and addresses, and then
tables of addresses, one for every layer. The last layer has ``last`` outputs, all others have as
many as inputs, ``n``.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from mep.kernels.cpu import activate, compiled, doubles, floats, nudge, pull
from mep.kernels.native import Native

__all__ = ["Loops"]

# Multiplications of a pass below which waking another thread takes longer than doing them.
_LEAST_WORK = 500_000
_LEAST_ROWS = 8
_HEAD = 12  # numbers before the tables
_N, _T = ord("N"), ord("T")


@intrinsic
def _sgemm(typingctx, sgemm, form, m, n, k, a, b, c):
    """``c <- a op(b)`` by the BLAS function at an address, row by row in memory.

    ``a`` is ``(m, k)`` and ``c`` ``(m, n)``; ``form`` is the letter of ``op``: with T ``b`` is
    ``(n, k)``, with N ``(k, n)``. BLAS reads column by column: it is asked for ``c^T``.
    """

    def generate(context, builder, signature, args):
        sgemm, form, m, n, k, a, b, c = args
        byte = ir.IntType(8)
        pointer = byte.as_pointer()

        def kept(value):
            return builder.bitcast(cgutils.alloca_once_value(builder, value), pointer)

        def at(address):
            return builder.inttoptr(address, pointer)

        one, zero = (ir.Constant(ir.FloatType(), x) for x in (1.0, 0.0))
        turned = builder.icmp_signed("==", form, ir.Constant(form.type, _T))
        leading = builder.select(turned, k, n)
        function = ir.FunctionType(ir.VoidType(), [pointer] * 13).as_pointer()
        builder.call(
            builder.inttoptr(sgemm, function),
            [
                kept(builder.trunc(form, byte)), kept(ir.Constant(byte, _N)), kept(n), kept(m),
                kept(k), kept(one), at(b), kept(leading), at(a), kept(k), kept(zero), at(c),
                kept(n),
            ],
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@intrinsic
def _ask(typingctx, function):
    """Calls a C function ``int f(void)`` at an address."""

    def generate(context, builder, signature, args):
        form = ir.FunctionType(ir.IntType(32), []).as_pointer()
        found = builder.call(builder.inttoptr(args[0], form), [])
        return builder.sext(found, ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def _set(typingctx, function, number):
    """Calls a C function ``int f(int)`` at an address."""

    def generate(context, builder, signature, args):
        short = ir.IntType(32)
        form = ir.FunctionType(short, [short]).as_pointer()
        found = builder.call(builder.inttoptr(args[0], form), [builder.trunc(args[1], short)])
        return builder.sext(found, ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@njit(inline="always")
def _share(head):
    """Returns the first of this thread's rows, and how many there are."""
    place, team, batch = head[2], head[3], head[5]
    if place == 0:
        return 0, batch
    lane, lanes = _ask(place), _ask(team)
    first = batch * lane // lanes
    return first, batch * (lane + 1) // lanes - first


@njit(inline="always")
def _alone(limit):
    """From here on this thread's products take no other thread; returns what to go back to."""
    return _set(limit, 1) if limit != 0 else 0


@njit(inline="always")
def _as_before(limit, number):
    if limit != 0:
        _set(limit, number)


def _free(job):
    """``y <- phi(s)``, ``f <- W y + b`` layer after layer, where ``f`` is the next ``s``."""
    head = numba.carray(job, (_HEAD,))
    sgemm, limit, kind, n, last, depth = head[0], head[1], head[4], head[6], head[7], head[8]
    s, y, f, weights, biases = numba.carray(job, (_HEAD + 5 * depth,))[_HEAD:].reshape(5, depth)
    lo, rows = _share(head)
    before, bias, out, at = _alone(limit), 0, n, 4 * lo * n
    for k in range(depth):
        activate(kind, s[k] + at, bias, y[k] + at, rows, n)
        out = last if k + 1 == depth else n
        _sgemm(sgemm, _T, rows, out, n, y[k] + at, weights[k], f[k] + 4 * lo * out)
        bias = biases[k]
    _as_before(limit, before)
    if bias != 0:
        above = numba.carray(floats(f[depth - 1] + 4 * lo * out), (rows, out))
        shift = numba.carray(floats(bias), (out,))
        for b in range(rows):
            for j in range(out):
                above[b, j] += shift[j]


def _descend(job):
    """``p <- W^T e_above``, ``e <- phi'(s) p`` from the last layer down, and all ``||e||^2``."""
    head = numba.carray(job, (_HEAD,))
    sgemm, limit, kind, n, last, depth = head[0], head[1], head[4], head[6], head[7], head[8]
    y, p, e, weights = numba.carray(job, (_HEAD + 4 * depth,))[_HEAD:].reshape(4, depth)
    lo, rows = _share(head)
    before, total, at = _alone(limit), 0.0, 4 * lo * n
    above = head[9] + 4 * lo * last
    for k in range(depth - 1, -1, -1):
        height = last if k + 1 == depth else n
        _sgemm(sgemm, _N, rows, n, height, above, weights[k], p[k] + at)
        total += pull(kind, y[k] + at, p[k] + at, e[k] + at, rows, n)
        above = e[k] + at
    _as_before(limit, before)
    lane = 0 if head[2] == 0 else _ask(head[2])
    numba.carray(doubles(head[10]), (lane + 1,))[lane] = total


def _climb(job):
    """``d <- W (phi(s + d) - phi(s))`` layer after layer, each but the first with ``+ beta e``."""
    head = numba.carray(job, (_HEAD,))
    sgemm, limit, kind, n, last, depth = head[0], head[1], head[4], head[6], head[7], head[8]
    s, y, p, e, y_new, norm, above, weights = numba.carray(job, (_HEAD + 8 * depth,))[
        _HEAD:
    ].reshape(8, depth)
    lo, rows = _share(head)
    before, share, at = _alone(limit), 0.0, 4 * lo * n
    d, change = head[9] + at, head[11] + at
    beta = numba.carray(doubles(head[10]), (1,))[0]
    for k in range(depth):
        nudge(
            kind, s[k] + at, y[k] + at, d, share, p[k] + at, e[k] + at, change, y_new[k] + at,
            norm[k] + 4 * lo, rows, n,
        )  # fmt: skip
        out = last if k + 1 == depth else n
        d = above[k] + 4 * lo * out
        _sgemm(sgemm, _T, rows, out, n, change, weights[k], d)
        share = beta
    _as_before(limit, before)


class Loops:
    """The passes of one activation, by number, over layers of one width.

    Args:
        found: the functions of torch's libraries.
        kind: number of the activation.
        weights: ``(n, n)`` each, the last one ``(last, n)``.
    """

    def __init__(self, found: Native, kind: int, weights: Sequence[Tensor]) -> None:
        self._native, self._kind = found, kind
        self._weights = _addresses(weights)
        self._last, self._width = weights[-1].shape
        self._multiplications = (len(weights) - 1) * weights[0].numel() + weights[-1].numel()

    def free(
        self, s: list[Tensor], y: list[Tensor], f: list[Tensor], biases: Sequence[Tensor | None]
    ) -> None:
        """``y <- phi(s)``, ``f <- W y + b``."""
        own = [0 if b is None else b.data_ptr() for b in biases]
        tables = [*map(_addresses, (s, y, f)), self._weights, own]
        self._take(_free, len(s[0]), tables)

    def descend(self, y: list[Tensor], above: Tensor, p: list[Tensor], e: list[Tensor]) -> float:
        """``p <- W^T e_above``, ``e <- phi'(s) p``; returns the sum of all ``||e||^2``."""
        totals = np.zeros(torch.get_num_threads())
        tables = [*map(_addresses, (y, p, e)), self._weights]
        self._take(_descend, len(above), tables, above.data_ptr(), totals.ctypes.data)
        return float(totals.sum())

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
        number = np.array([beta])
        tables = [*map(_addresses, (s, y, p, e, y_new, norm, above)), self._weights]
        self._take(_climb, len(d), tables, d.data_ptr(), number.ctypes.data, change.data_ptr())

    def _take(self, loop: Any, batch: int, tables: list[list[int]], *others: int) -> None:
        """Calls a loop for all rows, in as many threads as torch may take."""
        found, depth = self._native, len(tables[0])
        work = batch * self._multiplications
        threads = min(torch.get_num_threads(), batch // _LEAST_ROWS, work // _LEAST_WORK)
        together = found.parallel is not None and threads > 1
        teams = (found.limit, found.place, found.team) if together else (0, 0, 0)
        head = [found.sgemm, *teams, self._kind, batch, self._width, self._last, depth, *others]
        head += [0] * (_HEAD - len(head))
        job = np.array([*head, *chain.from_iterable(tables)], dtype=np.int64)
        body = _body(loop)
        if together:
            found.parallel(body.address, job.ctypes.data, threads, 0)
        else:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body.address)(job.ctypes.data)


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


@cache
def _body(loop: Any) -> Any:
    """Returns a loop as a function that C can call; it is compiled by its first use."""
    signature = types.void(types.CPointer(types.int64))
    return compiled(partial(numba.cfunc, signature), loop)
