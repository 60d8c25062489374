"""The kernels of one activation for large tensors: each of torch's threads takes some samples."""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numba
import numpy as np
import torch

from mep.kernels.cpu import Kernels, activate, doubles, move, nudge, pull
from mep.kernels.library import Native
from mep.kernels.team import BATCH, COMMON, LARGE, call, lane, share

__all__ = ["spread"]

_KIND, _N, _BETA, _SUMS, _FIRST = range(COMMON, COMMON + 5)


def _activate(job):
    head = numba.carray(job, (_FIRST + 3,))
    lo, rows = share(head, head[BATCH])
    at, bias = 4 * lo * head[_N], head[_FIRST + 1]
    activate(head[_KIND], head[_FIRST] + at, bias, head[_FIRST + 2] + at, rows, head[_N])


def _pull(job):
    head = numba.carray(job, (_FIRST + 3,))
    lo, rows = share(head, head[BATCH])
    at = 4 * lo * head[_N]
    y, p, e = head[_FIRST] + at, head[_FIRST + 1] + at, head[_FIRST + 2] + at
    sums = numba.carray(doubles(head[_SUMS]), (lane(head) + 1,))
    sums[lane(head)] = pull(head[_KIND], y, p, e, rows, head[_N])


def _move(job):
    head = numba.carray(job, (_FIRST + 5,))
    lo, rows = share(head, head[BATCH])
    at = 4 * lo * head[_N]
    s, y, d = head[_FIRST] + at, head[_FIRST + 1] + at, head[_FIRST + 2] + at
    move(head[_KIND], s, y, d, head[_FIRST + 3] + at, head[_FIRST + 4] + at, rows, head[_N])


def _nudge(job):
    head = numba.carray(job, (_FIRST + 8,))
    lo, rows = share(head, head[BATCH])
    at, beta = 4 * lo * head[_N], numba.carray(doubles(head[_BETA]), (1,))[0]
    s, y, d, p = (head[_FIRST] + at, head[_FIRST + 1] + at, head[_FIRST + 2] + at,
                  head[_FIRST + 3] + at)  # fmt: skip
    e = head[_FIRST + 4] + at if head[_FIRST + 4] != 0 else 0
    change, y_new = head[_FIRST + 5] + at, head[_FIRST + 6] + at
    norm = head[_FIRST + 7] + 4 * lo
    nudge(head[_KIND], s, y, d, beta, p, e, change, y_new, norm, rows, head[_N])


def spread(alone: Kernels, found: Native) -> Kernels:
    """Returns kernels that take as many threads as torch may, where that saves time.

    Args:
        alone: the kernels of an activation.
        found: functions of torch's libraries.
    """

    def take(loop: Any, addresses: tuple[int, ...], shape: tuple[int, int], beta: float) -> float:
        sums, number = np.zeros(torch.get_num_threads()), np.array([beta])
        head = [0] * COMMON + [alone.kind, shape[1], number.ctypes.data, sums.ctypes.data]
        job = np.array([*head, *addresses], dtype=np.int64)
        call(found, loop, job, shape[0], shape[0] * shape[1] * 10)
        return float(sums.sum())

    def either(single: Callable[..., Any], loop: Any, *arguments: Any) -> Any:
        *addresses, batch, n = arguments
        if batch * n < LARGE or torch.get_num_threads() == 1:
            return single(*arguments)
        return take(loop, tuple(addresses), (batch, n), 0.0)

    def push(*arguments: Any) -> None:
        s, y, d, beta, *others, batch, n = arguments
        if batch * n < LARGE or torch.get_num_threads() == 1:
            alone.nudge(*arguments)
        else:
            take(_nudge, (s, y, d, *others), (batch, n), beta)

    return replace(
        alone, activate=partial(either, alone.activate, _activate),
        move=partial(either, alone.move, _move), pull=partial(either, alone.pull, _pull),
        nudge=push,
    )  # fmt: skip
