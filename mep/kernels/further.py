"""A perceptron's sweeps after the first, in one compiled call each: *again*.

The first sweep reads its slopes off the free states, these off the nudged ones. A ramp that no skip
leads around is solved exactly: it may come to rest on its kink, with an error between those of its
two sides.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import numba
from numba import njit

from mep.kernels.cpu import RAMP, doubles, floats, moved_from, slope
from mep.kernels.flat import clear, copy, square
from mep.kernels.job import AT, lane_sums, read, strength
from mep.kernels.perceptron import finish
from mep.kernels.sweep import tell
from mep.kernels.team import N, T, alone, as_before, product, share

__all__ = ["again"]

_f32 = numba.float32


@njit(inline="always")
def _exact(tables, k):
    """Whether the unit above layer k is a ramp to be solved exactly."""
    return tables[1][k] == RAMP and tables[6][k + 1] == 0


@njit(inline="always")
def _at_rest(s, delta, inner):
    """Returns displacement and error of a ramp, under ``W^T e`` and what moves it from below.

    Outside, the slope is 0 and the unit keeps to its prediction; inside, it moves by its error,
    but not past its kink. In displacements, so that a unit at rest sits there to the last bit.
    """
    e = inner if s + delta > 0 else _f32(0)
    lowest = min(-s, delta)
    return max(delta + e, lowest), max(e, lowest - delta)


@njit(inline="always")
def _error(exact, kind, s_, y_, p_, e_, above_, d_, beta, count):
    """``e <- phi'(s + d) p``, and what leads past; a ramp's at rest, under what moves it now."""
    s, y = numba.carray(floats(s_), (count,)), numba.carray(floats(y_), (count,))
    p, e = numba.carray(floats(p_), (count,)), numba.carray(floats(e_), (count,))
    if exact:
        d = numba.carray(floats(d_), (count,))
        for i in range(count):
            _, own = _at_rest(s[i], d[i] - beta * e[i], beta * p[i])
            e[i] = own / beta
    else:
        for i in range(count):
            e[i] = slope(kind, y[i]) * p[i]
        if above_ != 0:
            above = numba.carray(floats(above_), (count,))
            for i in range(count):
                e[i] += above[i]


@njit(inline="always")
def _displace(exact, s_, p_, e_, d_, beta, count):
    """``d <- d + beta e``; of a ramp at rest, both."""
    d, e = numba.carray(floats(d_), (count,)), numba.carray(floats(e_), (count,))
    if exact:
        s, p = numba.carray(floats(s_), (count,)), numba.carray(floats(p_), (count,))
        for i in range(count):
            d[i], own = _at_rest(s[i], d[i], beta * p[i])
            e[i] = own / beta
    else:
        for i in range(count):
            d[i] += beta * e[i]


@njit(inline="always")
def _force(exact, kind, s, y, p, e, above, d):
    """How far an error is from what the states ask for: of a ramp on its kink, from either side."""
    if not exact:
        return slope(kind, y) * p + above - e
    x = s + d
    one, other = (p if x > 0 else _f32(0)), (p if x >= 0 else _f32(0))
    return e - min(max(e, min(one, other)), max(one, other))


@njit(inline="always")
def _add_forces(exact, kind, s_, y_, p_, e_, above_, d_, forces_, rows, n):
    s, y = numba.carray(floats(s_), (rows, n)), numba.carray(floats(y_), (rows, n))
    p, e = numba.carray(floats(p_), (rows, n)), numba.carray(floats(e_), (rows, n))
    d, forces = numba.carray(floats(d_), (rows, n)), numba.carray(doubles(forces_), (rows,))
    past, share_of_it = above_, _f32(1)
    if above_ == 0:
        past, share_of_it = e_, _f32(0)
    above = numba.carray(floats(past), (rows, n))
    for b in range(rows):
        total = _f32(0)
        for j in range(n):
            force = _force(
                exact, kind, s[b, j], y[b, j], p[b, j], e[b, j], share_of_it * above[b, j], d[b, j]
            )
            total += force * force
        forces[b] += total


@njit(inline="always")
def _down(head, tables, lo, rows, beta):
    """Errors at the nudged states, from the output's, minus the cost's gradient there.

    Returns the squares of that one.
    """
    width, kind, weight, _, _, _, skip, s, y, p, e, _, d, _ = tables
    top = head[AT.depth] - 1
    size, at = rows * width[top], 4 * lo * width[top]
    error = numba.carray(floats(e[top] + at), (size,))
    gradient = numba.carray(floats(head[AT.nudged] + at), (size,))
    for i in range(size):
        error[i] = -gradient[i]
    for k in range(top, 0, -1):
        n, below = width[k], width[k - 1]
        at, above = 4 * lo * below, e[k] + 4 * lo * n
        own = p[k - 1] + at
        product(head[AT.sgemm], N, N, rows, below, n, 1.0, above, n, weight[k], below, 0.0, own)
        _error(
            _exact(tables, k - 1), kind[k - 1], s[k - 1] + at, y[k - 1] + at, own, e[k - 1] + at,
            above if skip[k] != 0 else 0, d[k - 1] + at, beta, rows * below,
        )  # fmt: skip
    return square(e[top] + 4 * lo * width[top], size)


@njit(inline="always")
def _up(head, tables, lo, rows, beta):
    """Displacements under these errors; forces; squares of all errors and of all activities.

    A ramp's error changes once more: the product below it is not what it was on the way down.
    """
    width, kind, weight, _, _, _, skip, s, y, p, e, _, d, _ = tables
    sgemm, top, errors, active = head[AT.sgemm], head[AT.depth] - 1, 0.0, 0.0
    change, forces = head[AT.change] + 4 * lo * head[AT.most], head[AT.forces] + 8 * lo
    clear(d[0] + 4 * lo * width[0], rows * width[0])
    numba.carray(doubles(forces), (rows,))[:] = 0
    for k in range(top + 1):
        n = width[k]
        at = 4 * lo * n
        if k < top:
            _displace(_exact(tables, k), s[k] + at, p[k] + at, e[k] + at, d[k] + at, beta, rows * n)
        if k > 0:
            below, here = width[k - 1], 4 * lo * width[k - 1]
            if k < top and _exact(tables, k):
                product(
                    sgemm, N, N, rows, below, n, 1.0, e[k] + at, n, weight[k], below, 0.0,
                    p[k - 1] + here,
                )  # fmt: skip
            _add_forces(
                _exact(tables, k - 1), kind[k - 1], s[k - 1] + here, y[k - 1] + here,
                p[k - 1] + here, e[k - 1] + here, e[k] + at if skip[k] != 0 else 0,
                d[k - 1] + here, forces, rows, below,
            )  # fmt: skip
        if k < top:
            moved_from(kind[k], s[k] + at, d[k] + at, change, y[k] + at, rows, n)
            errors += square(e[k] + at, rows * n)
            active += square(y[k] + at, rows * n)
            above, keep = width[k + 1], _f32(0)
            there = d[k + 1] + 4 * lo * above
            if skip[k + 1] != 0:
                copy(there, d[k] + at, rows * n)
                keep = _f32(1)
            product(sgemm, N, T, rows, above, n, 1.0, change, n, weight[k + 1], n, keep, there)
    return errors, active


def again(job):
    """One more sweep, from the states of the last one, and its residual."""
    head, tables = read(job)
    lo, rows = share(head, head[AT.batch])
    before, sums, beta = alone(head), lane_sums(head), strength(head)
    sums[:] = 0
    sums[0] = _down(head, tables, lo, rows, beta)
    sums[1], sums[3] = _up(head, tables, lo, rows, beta)
    top = head[AT.depth] - 1
    sums[5] = finish(head, tables, lo, rows, beta, tables[12][top] + 4 * lo * tables[0][top])
    tell(head)
    as_before(head, before)
