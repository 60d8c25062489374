"""Ramps that settle: where they come to rest, and a share of the way there, in one pass each."""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numba import njit
from torch import Tensor

from mep.kernels.cpu import compiled, doubles, floats
from mep.kernels.library import Native
from mep.kernels.team import BATCH, COMMON, LARGE, call, share

__all__ = ["Ramps", "approach", "rest"]

_f32 = numba.float32
_kernel = partial(compiled, njit)
_N, _NUMBERS, _FIRST = range(COMMON, COMMON + 3)


@njit(inline="always")
def _clip(x, low, high):
    return low if x < low else (high if x > high else x)  # a NaN stays one


@_kernel
def rest(low, high, a_, b_, origin_, beyond_, s_, rest_, gap_, batch, n):
    """``rest <- clip(a + b)`` and per sample ``gap <- ||s - rest||``.

    ``b`` may be 0, none; ``s`` and ``gap`` may be, too. With an ``origin``, of displacements from
    there: the bounds are as much lower, and the current is by ``beyond`` larger.
    """
    two, displaced, looked = b_ != 0, origin_ != 0, s_ != 0
    a = numba.carray(floats(a_), (batch, n))
    b = numba.carray(floats(b_ if two else a_), (batch, n))
    origin = numba.carray(floats(origin_ if displaced else a_), (batch, n))
    beyond = numba.carray(floats(beyond_ if displaced else a_), (batch, n))
    s = numba.carray(floats(s_ if looked else a_), (batch, n))
    found, least, most = numba.carray(floats(rest_), (batch, n)), _f32(low), _f32(high)
    for k in range(batch):
        total = _f32(0)
        for j in range(n):
            current = a[k, j] + b[k, j] if two else a[k, j]
            if displaced:
                own = origin[k, j]
                value = _clip(current + beyond[k, j], least - own, most - own)
            else:
                value = _clip(current, least, most)
            found[k, j] = value
            if looked:
                left = s[k, j] - value
                total += left * left
        if looked:
            numba.carray(floats(gap_), (batch,))[k] = math.sqrt(total)


@njit(inline="always")
def _approached(s, rest_of, origin, displaced, moved, gap, least, most, part, batch, n):
    whole = part == 1
    for k in range(batch):
        total = _f32(0)
        for j in range(n):
            value = s[k, j] + part * (rest_of[k, j] - s[k, j])
            if whole:  # to the last bit: a rim is compared with
                value = rest_of[k, j]
            elif displaced:
                own = origin[k, j]
                value = _clip(value, least - own, most - own)
            else:
                value = _clip(value, least, most)
            moved[k, j] = value
            left = value - rest_of[k, j]
            total += left * left
        gap[k] = math.sqrt(total)


@_kernel
def approach(low, high, part, s_, rest_, origin_, moved_, gap_, batch, n):
    """``moved <- clip(s + share (rest - s))``, and per sample ``gap <- ||moved - rest||``.

    ``moved`` may be ``s``; with an ``origin``, the bounds are as much lower.
    """
    s, rest_of = numba.carray(floats(s_), (batch, n)), numba.carray(floats(rest_), (batch, n))
    displaced, gap = origin_ != 0, numba.carray(floats(gap_), (batch,))
    origin = numba.carray(floats(origin_ if displaced else rest_), (batch, n))
    least, most, part = _f32(low), _f32(high), _f32(part)
    if moved_ == s_:  # one array by two names would not be vectorised
        _approached(s, rest_of, origin, displaced, s, gap, least, most, part, batch, n)
    else:
        moved = numba.carray(floats(moved_), (batch, n))
        _approached(s, rest_of, origin, displaced, moved, gap, least, most, part, batch, n)


@njit(inline="always")
def _from(address, offset):
    return address + offset if address != 0 else 0


def _rests(job):
    head = numba.carray(job, (_FIRST + 7,))
    lo, rows = share(head, head[BATCH])
    at, numbers = 4 * lo * head[_N], numba.carray(doubles(head[_NUMBERS]), (2,))
    rest(
        numbers[0], numbers[1], head[_FIRST] + at, _from(head[_FIRST + 1], at),
        _from(head[_FIRST + 2], at), _from(head[_FIRST + 3], at), _from(head[_FIRST + 4], at),
        head[_FIRST + 5] + at, _from(head[_FIRST + 6], 4 * lo), rows, head[_N],
    )  # fmt: skip


def _approaches(job):
    head = numba.carray(job, (_FIRST + 5,))
    lo, rows = share(head, head[BATCH])
    at, numbers = 4 * lo * head[_N], numba.carray(doubles(head[_NUMBERS]), (3,))
    approach(
        numbers[0], numbers[1], numbers[2], head[_FIRST] + at, head[_FIRST + 1] + at,
        _from(head[_FIRST + 2], at), head[_FIRST + 3] + at, head[_FIRST + 4] + 4 * lo,
        rows, head[_N],
    )  # fmt: skip


class Ramps:
    """Float32 ramps on a CPU, ``(B, ...)`` each, all in the same order in memory.

    Args:
        found: functions of torch's libraries; None to do without its threads.
    """

    def __init__(self, found: Native | None) -> None:
        self._found = found

    def rest(
        self,
        bounds: tuple[float, float],
        terms: list[Tensor],
        s: Tensor | None,
        origin: Tensor | None = None,
        beyond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ``clip(sum of one or two terms)``, and per sample its distance from an ``s``.

        With an ``origin`` in displacements from it, with a current of ``beyond`` more.
        """
        first, second = terms[0], terms[1] if len(terms) > 1 else None
        found, gap = torch.empty_like(first), None if s is None else s.new_empty(len(s))
        self._take(rest, _rests, bounds, first, first, second, origin, beyond, s, found, gap)
        return found, gap

    def approach(
        self,
        bounds: tuple[float, float],
        s: Tensor,
        rest: Tensor,
        share: float,
        origin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns a share of the way from ``s`` to its rest, clipped, and what is left of it."""
        moved, gap = torch.empty_like(s), s.new_empty(len(s))
        self._take(approach, _approaches, (*bounds, share), s, s, rest, origin, moved, gap)
        return moved, gap

    def _take(
        self,
        single: Callable[..., None],
        loop: Any,
        numbers: tuple[float, ...],
        like: Tensor,
        *tensors: Tensor | None,
    ) -> None:
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        batch, n = len(like), like.numel() // max(1, len(like))
        if self._found is None or like.numel() < LARGE or torch.get_num_threads() == 1:
            single(*numbers, *addresses, batch, n)
            return
        known = np.array(numbers)
        job = np.array([*[0] * COMMON, n, known.ctypes.data, *addresses], dtype=np.int64)
        call(self._found, loop, job, batch, like.numel() * 10)
