"""A perceptron's sweep in one compiled call, and what is learned from it, too, where it settles.

Whatever is decided on the way is decided by every thread for itself, from sums that are the same
for all: the strength of the nudge, and whether there is something to learn.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import math

import numba
import numpy as np
from numba import njit

from mep.kernels.cpu import doubles, floats
from mep.kernels.job import AT, SUMS, lane_sums, read, total
from mep.kernels.perceptron import falling, learning, rising
from mep.kernels.team import alone, as_before, lane, share, wait

__all__ = ["FOUND", "LEARNED", "TERMS", "sweep", "tell"]

# The relative strength of the nudge, 0 where the strength itself is given; that one; whether there
# is a nudged sweep; and the median residual up to which is learned at once, negative for never.
TERMS = 4
# How far it came, the strength of the nudge, and the median residual; and then the sums of all
# threads.
FOUND = 3 + SUMS
# It may stop where something is not finite; before anything is learned; or at the end.
_UNSOUND, _SWEPT, LEARNED = 0.0, 1.0, 2.0
_MOST = float(np.finfo(np.float32).max)


@njit(inline="always")
def _median(values_, room_, count):
    """Returns the lower median, by parting a copy of the values until it lies where it belongs."""
    values = numba.carray(floats(values_), (count,))
    room = numba.carray(floats(room_), (count,))
    for i in range(count):
        room[i] = values[i]
    middle, low, high = (count - 1) // 2, 0, count - 1
    while low < high:
        pivot, i, j = room[(low + high) // 2], low, high
        while i <= j:
            while room[i] < pivot:
                i += 1
            while pivot < room[j]:
                j -= 1
            if i <= j:
                room[i], room[j] = room[j], room[i]
                i, j = i + 1, j - 1
        if middle <= j:
            high = j
        elif middle >= i:
            low = i
        else:
            break
    return float(room[middle])


@njit(inline="always")
def _middle(head):
    """Returns the median residual; no number where one is not finite."""
    if not math.isfinite(total(head, 5)):
        return math.nan
    return _median(head[AT.residual], head[AT.norm], head[AT.batch])


@njit(inline="always")
def tell(head):
    """Leaves the median residual and all sums, once all threads have come here."""
    wait(head)
    if lane(head) == 0:
        found = numba.carray(doubles(head[AT.found]), (FOUND,))
        found[2] = _middle(head)
        for which in range(SUMS):
            found[3 + which] = total(head, which)


@njit(inline="always")
def _strength(head, relative, given):
    """Returns the strength of the nudge, a multiple of the gain's inverse or given."""
    if relative == 0:
        return given
    top = total(head, 0)
    gain = (top + total(head, 1)) / top if top > 0 else math.nan
    return relative / (gain if math.isfinite(gain) and gain > 0 else float(head[AT.depth]))


@njit(inline="always")
def _largest(head):
    """Returns a bound on the norm of every gradient.

    ``|G| <= |e| |a| / B``, and what is below a bias is 1 for every sample.
    """
    errors, activities = total(head, 0) + total(head, 1), total(head, 2) + total(head, 3)
    return math.sqrt(errors * (activities + head[AT.batch]))


@njit(inline="always")
def _unmoved(head, tables):
    """The nudge at the free states, which is all that is left to settle there."""
    lo, rows = share(head, head[AT.batch])
    n = tables[0][head[AT.depth] - 1]
    gradient = numba.carray(floats(head[AT.gradient] + 4 * lo * n), (rows, n))
    residual = numba.carray(floats(head[AT.residual] + 4 * lo), (rows,))
    nudge = numba.carray(floats(head[AT.strength] + 4 * lo), (rows,))
    for b in range(rows):
        squares = 0.0
        for j in range(n):
            squares += gradient[b, j] * gradient[b, j]
        nudge[b] = math.sqrt(squares)
        residual[b] = 0.0 if squares == 0 else 1.0


def sweep(job):
    """Free phase, errors down, the nudged sweep; and learns, where that has settled."""
    head, tables = read(job)
    relative, given, nudged, most = numba.carray(doubles(head[AT.terms]), (TERMS,))
    found = numba.carray(doubles(head[AT.found]), (FOUND,))
    before, first = alone(head), lane(head) == 0
    lane_sums(head)[:] = 0
    falling(head, tables)
    wait(head)
    beta, residual = _strength(head, relative, given), 0.0
    # Squares of errors, activities or the input that are not finite make the bound so, too.
    sound = math.isfinite(total(head, 4)) and math.isfinite(_largest(head))
    if nudged == 0:
        _unmoved(head, tables)
    elif sound:
        active = rising(head, tables, numba.float32(beta))
        wait(head)  # by now all of them have asked for the bound at the free states
        lane_sums(head)[3] = active
        if first:
            found[2] = _middle(head)
        wait(head)
        residual = found[2]
    learns = sound and residual <= most and _largest(head) <= _MOST
    if learns:
        learning(head, tables)
    if first:
        numba.carray(doubles(head[AT.beta]), (1,))[0] = beta
        found[0], found[1] = (LEARNED if learns else _SWEPT) if sound else _UNSOUND, beta
        numba.carray(floats(head[AT.mean]), (1,))[0] = total(head, 4) / head[AT.batch]
        for which in range(SUMS):
            found[3 + which] = total(head, which)
    as_before(head, before)
