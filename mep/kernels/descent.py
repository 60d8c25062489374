"""Gradient settling of a perceptron in compiled calls: *begin*, and *relax*, some steps at once.

``u <- mu u - lr beta f``, ``d <- d + u`` for all states, with the forces ``f = e - J^T e_above`` of
the errors ``e = (d - delta) / beta``: explicit descent, one layer per step. Where a sweep keeps
products, forces are kept.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import numba
from numba import njit

from mep.kernels.cpu import doubles, floats, moved_from, slope
from mep.kernels.flat import clear, copy, square
from mep.kernels.job import AT, lane_sums, read
from mep.kernels.perceptron import finish
from mep.kernels.sweep import tell
from mep.kernels.team import N, T, alone, as_before, product, share

__all__ = ["begin", "relax"]

_f32 = numba.float32


def begin(job):
    """At the free states: every force is 0, but for the nudge."""
    head, tables = read(job)
    width, p, e, d, u = tables[0], tables[9], tables[10], tables[12], tables[13]
    lo, rows = share(head, head[AT.batch])
    top = head[AT.depth] - 1
    for k in range(top + 1):
        at, size = 4 * lo * width[k], rows * width[k]
        clear(d[k] + at, size)
        clear(u[k] + at, size)
        if k < top:
            clear(p[k] + at, size)
    at, size = 4 * lo * width[top], rows * width[top]
    clear(e[top] + at, size)
    copy(head[AT.nudged] + at, head[AT.gradient] + at, size)


@njit(inline="always")
def _move(d_, u_, force_, size, rate, momentum):
    d, u = numba.carray(floats(d_), (size,)), numba.carray(floats(u_), (size,))
    force = numba.carray(floats(force_), (size,))
    for i in range(size):
        u[i] = momentum * u[i] - rate * force[i]
        d[i] += u[i]


@njit(inline="always")
def _move_all(head, tables, lo, rows, rate, momentum):
    width, p, e, d, u = tables[0], tables[9], tables[10], tables[12], tables[13]
    top = head[AT.depth] - 1
    for k in range(top):
        at = 4 * lo * width[k]
        _move(d[k] + at, u[k] + at, p[k] + at, rows * width[k], rate, momentum)
    at, size = 4 * lo * width[top], rows * width[top]
    # The output's force is its error and the nudge.
    force = numba.carray(floats(head[AT.nudged] + at), (size,))
    error = numba.carray(floats(e[top] + at), (size,))
    for i in range(size):
        force[i] += error[i]
    _move(d[top] + at, u[top] + at, head[AT.nudged] + at, size, rate, momentum)


@njit(inline="always")
def _up(head, tables, lo, rows, beta):
    """Errors and activities at the displaced states; returns the squares of both.

    What the last layer has predicted is left in the room for what passes by.
    """
    width, kind, weight, _, _, _, skip, s, y, _, e, _, d, _ = tables
    top, below, own, active = head[AT.depth] - 1, 0.0, 0.0, 0.0
    room = 4 * lo * head[AT.most]
    delta_, change = head[AT.moved] + room, head[AT.change] + room
    clear(delta_, rows * width[0])
    for k in range(top + 1):
        n = width[k]
        at, size = 4 * lo * n, rows * n
        delta, error = (
            numba.carray(floats(delta_), (size,)),
            numba.carray(floats(e[k] + at), (size,)),
        )
        moved = numba.carray(floats(d[k] + at), (size,))
        for i in range(size):
            error[i] = (moved[i] - delta[i]) / beta
        if k == top:
            own = square(e[k] + at, size)
            break
        below += square(e[k] + at, size)
        moved_from(kind[k], s[k] + at, d[k] + at, change, y[k] + at, rows, n)
        active += square(y[k] + at, size)
        keep = _f32(0)
        if skip[k + 1] != 0:
            copy(delta_, d[k] + at, size)
            keep = _f32(1)
        m = width[k + 1]
        product(head[AT.sgemm], N, T, rows, m, n, 1.0, change, n, weight[k + 1], n, keep, delta_)
    return own, below, active


@njit(inline="always")
def _down(head, tables, lo, rows):
    """The forces below the output, and per sample their squares."""
    width, kind, weight, _, _, _, skip, _, y_, p_, e_, _, _, _ = tables
    forces = numba.carray(doubles(head[AT.forces] + 8 * lo), (rows,))
    forces[:] = 0
    for k in range(head[AT.depth] - 1, 0, -1):
        n, m = width[k], width[k - 1]
        at, above = 4 * lo * m, e_[k] + 4 * lo * n
        product(head[AT.sgemm], N, N, rows, m, n, 1.0, above, n, weight[k], m, 0.0, p_[k - 1] + at)
        p = numba.carray(floats(p_[k - 1] + at), (rows, m))
        y = numba.carray(floats(y_[k - 1] + at), (rows, m))
        e = numba.carray(floats(e_[k - 1] + at), (rows, m))
        for b in range(rows):
            for j in range(m):
                p[b, j] = e[b, j] - slope(kind[k - 1], y[b, j]) * p[b, j]
        if skip[k] != 0:
            past = numba.carray(floats(above), (rows, m))
            for b in range(rows):
                for j in range(m):
                    p[b, j] -= past[b, j]
        for b in range(rows):
            total = _f32(0)
            for j in range(m):
                total += p[b, j] * p[b, j]
            forces[b] += total


def relax(job):
    """Takes steps; the residual is that of the last."""
    head, tables = read(job)
    lo, rows = share(head, head[AT.batch])
    before, sums = alone(head), lane_sums(head)
    numbers = numba.carray(doubles(head[AT.beta]), (3,))
    beta, rate, momentum = _f32(numbers[0]), _f32(numbers[1] * numbers[0]), _f32(numbers[2])
    sums[:] = 0
    for _ in range(head[AT.steps]):
        _move_all(head, tables, lo, rows, rate, momentum)
        sums[0], sums[1], sums[3] = _up(head, tables, lo, rows, beta)
        _down(head, tables, lo, rows)
        sums[5] = finish(head, tables, lo, rows, beta, head[AT.moved] + 4 * lo * head[AT.most])
    tell(head)
    as_before(head, before)
