"""Passes over many layers of one width that do not come back to Python between two of them.

A job has numbers of its own after the common ones, ``_HEAD`` in all, and then tables of addresses,
one entry for every layer. The last layer has ``last`` outputs, all others have as many as inputs,
``n``.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mep.kernels.cpu import activate, doubles, floats, nudge, pull
from mep.kernels.library import Native
from mep.kernels.team import (
    BATCH,
    COMMON,
    SGEMM,
    N,
    T,
    alone,
    as_before,
    call,
    lane,
    product,
    share,
)

__all__ = ["Loops"]

_KIND, _WIDTH, _LAST, _DEPTH, _FIRST, _NUMBERS, _CHANGE, _HEAD = range(COMMON, COMMON + 8)


def _free(job):
    """``y <- phi(s)``, ``f <- W y + b`` layer after layer, where ``f`` is the next ``s``."""
    head = numba.carray(job, (_HEAD,))
    sgemm, kind, n, last, depth = head[SGEMM], head[_KIND], head[_WIDTH], head[_LAST], head[_DEPTH]
    s, y, f, weights, biases = numba.carray(job, (_HEAD + 5 * depth,))[_HEAD:].reshape(5, depth)
    lo, rows = share(head, head[BATCH])
    before, bias, out, at = alone(head), 0, n, 4 * lo * n
    for k in range(depth):
        activate(kind, s[k] + at, bias, y[k] + at, rows, n)
        out = last if k + 1 == depth else n
        above = f[k] + 4 * lo * out
        product(sgemm, N, T, rows, out, n, 1.0, y[k] + at, n, weights[k], n, 0.0, above)
        bias = biases[k]
    as_before(head, before)
    if bias != 0:
        output = numba.carray(floats(f[depth - 1] + 4 * lo * out), (rows, out))
        shift = numba.carray(floats(bias), (out,))
        for b in range(rows):
            for j in range(out):
                output[b, j] += shift[j]


def _descend(job):
    """``p <- W^T e_above``, ``e <- phi'(s) p`` from the last layer down, and all ``||e||^2``."""
    head = numba.carray(job, (_HEAD,))
    sgemm, kind, n, last, depth = head[SGEMM], head[_KIND], head[_WIDTH], head[_LAST], head[_DEPTH]
    y, p, e, weights = numba.carray(job, (_HEAD + 4 * depth,))[_HEAD:].reshape(4, depth)
    lo, rows = share(head, head[BATCH])
    before, total, at = alone(head), 0.0, 4 * lo * n
    above = head[_FIRST] + 4 * lo * last
    for k in range(depth - 1, -1, -1):
        out = last if k + 1 == depth else n
        product(sgemm, N, N, rows, n, out, 1.0, above, out, weights[k], n, 0.0, p[k] + at)
        total += pull(kind, y[k] + at, p[k] + at, e[k] + at, rows, n)
        above = e[k] + at
    as_before(head, before)
    numba.carray(doubles(head[_NUMBERS]), (lane(head) + 1,))[lane(head)] = total


def _climb(job):
    """``d <- W (phi(s + d) - phi(s))`` layer after layer, each but the first with ``+ beta e``."""
    head = numba.carray(job, (_HEAD,))
    sgemm, kind, n, last, depth = head[SGEMM], head[_KIND], head[_WIDTH], head[_LAST], head[_DEPTH]
    tables = numba.carray(job, (_HEAD + 8 * depth,))[_HEAD:].reshape(8, depth)
    s, y, p, e, y_new, norm, above, weights = tables
    lo, rows = share(head, head[BATCH])
    before, share_of_e, at = alone(head), 0.0, 4 * lo * n
    d, change = head[_FIRST] + at, head[_CHANGE] + at
    beta = numba.carray(doubles(head[_NUMBERS]), (1,))[0]
    for k in range(depth):
        nudge(
            kind, s[k] + at, y[k] + at, d, share_of_e, p[k] + at, e[k] + at, change, y_new[k] + at,
            norm[k] + 4 * lo, rows, n,
        )  # fmt: skip
        out = last if k + 1 == depth else n
        d = above[k] + 4 * lo * out
        product(sgemm, N, T, rows, out, n, 1.0, change, n, weights[k], n, 0.0, d)
        share_of_e = beta
    as_before(head, before)


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
        self._take(_free, len(s[0]), [*map(_addresses, (s, y, f)), self._weights, own])

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
        own = d.data_ptr(), number.ctypes.data, change.data_ptr()
        self._take(_climb, len(d), tables, *own)

    def _take(self, loop: Any, batch: int, tables: list[list[int]], *others: int) -> None:
        head = [0] * COMMON + [self._kind, self._width, self._last, len(tables[0]), *others]
        head += [0] * (_HEAD - len(head))
        job = np.array([*head, *chain.from_iterable(tables)], dtype=np.int64)
        call(self._native, loop, job, batch, batch * self._multiplications)


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]
