"""A step of a multilayer perceptron in compiled parts: of all of it, or a segment at a time.

All of it is *falling*, free phase, cost, and the errors' way down; *rising*, the nudged sweep and
its residual; *learning*, the contrast, straight into momenta or weights: ``sweep`` calls them. A
segment is walked through by *ascend*, the free phase alone; *descend*, the free phase and the
errors' way down; *climb*, both and the nudged sweep; and *learn*. A job has numbers of its own
after the common ones, ``HEAD`` in all, and then tables with one entry for every layer, ``TABLES``.
A layer's state, and what there is of it, is ``(B, width)``. A segment above the first one has its
*foot* in the place of a first layer: a state that is given, and no weight.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import math
from functools import partial

import numba
from numba import njit

from mep.kernels.cpu import (
    activate,
    compiled,
    cross_entropy,
    doubles,
    floats,
    integers,
    nudge,
    pull,
)
from mep.kernels.flat import add, clear, copy, push, square, sum_of
from mep.kernels.job import AT, NUMBERS, lane_sums, read, strength
from mep.kernels.team import N, T, alone, as_before, product, share

_part = partial(compiled, njit)  # once for itself, and not again for everyone who calls it

__all__ = [
    "ascend", "climb", "descend", "falling", "finish", "learn", "learning", "rising",
]  # fmt: skip


@njit(inline="always")
def _cost(squared, s, target, loss, gradient, rows, n):
    """The cost per sample and its gradient: cross-entropy, or half the squared distance."""
    if squared == 0:
        cross_entropy(s, target, loss, gradient, rows, n)
        return
    output, goal = numba.carray(floats(s), (rows, n)), numba.carray(floats(target), (rows, n))
    slope, value = numba.carray(floats(gradient), (rows, n)), numba.carray(floats(loss), (rows,))
    for b in range(rows):
        total = numba.float32(0)
        for j in range(n):
            slope[b, j] = output[b, j] - goal[b, j]
            total += slope[b, j] * slope[b, j]
        value[b] = numba.float32(0.5) * total


@njit(inline="always")
def _target(head, lo, n):
    """Classes take 8 bytes each, values 4."""
    return head[AT.target] + (4 * lo * n if head[AT.squared] else 8 * lo)


@njit(inline="always")
def _has_classes(head, lo, rows, n):
    """Returns whether targets are classes that there are, or values."""
    fits = True
    if head[AT.squared] == 0:
        classes = numba.carray(integers(head[AT.target] + 8 * lo), (rows,))
        for b in range(rows):
            fits = fits and 0 <= classes[b] < n
    return fits


@njit(inline="always")
def _up(head, tables, lo, rows):
    """``s_k <- W_k phi(s_{k-1}) + b_k``; returns squares of the input and of all activities."""
    width, kind, weight, bias, _, _, skip, s, y, _, _, _, _, _ = tables
    sgemm, depth, n_in = head[AT.sgemm], head[AT.depth], head[AT.inputs]
    a, entering, active = head[AT.x] + 4 * lo * n_in, 0.0, 0.0
    for k in range(depth):
        n = width[k]
        at, keep = 4 * lo * n, 0.0
        if skip[k] != 0:
            copy(s[k] + at, s[k - 1] + at, rows * n)
            keep = 1.0
        if weight[k] != 0:
            entering += square(a, rows * n_in) if k == 0 else numba.float32(0)
            product(sgemm, N, T, rows, n, n_in, 1.0, a, n_in, weight[k], n_in, keep, s[k] + at)
        if k + 1 < depth:
            activate(kind[k], s[k] + at, bias[k], y[k] + at, rows, n)
            a, n_in = y[k] + at, n
            active += square(a, rows * n)
    n, top = width[depth - 1], depth - 1
    if bias[top] != 0:
        output = numba.carray(floats(s[top] + 4 * lo * n), (rows, n))
        shift = numba.carray(floats(bias[top]), (n,))
        for b in range(rows):
            for j in range(n):
                output[b, j] += shift[j]
    return entering, active


@njit(inline="always")
def _down(head, tables, lo, rows):
    """``e_{k-1} <- phi' W_k^T e_k``; returns squares of the top's error, and of the others."""
    width, kind, weight, _, _, _, skip, _, y, p, e, through, _, _ = tables
    sgemm, top, total = head[AT.sgemm], head[AT.depth] - 1, 0.0
    passing = head[AT.change] + 4 * lo * head[AT.most]
    first = float(square(e[top] + 4 * lo * width[top], rows * width[top]))
    for k in range(top, 0, -1):
        n, below = width[k], width[k - 1]
        at = 4 * lo * below
        above = e[k] + 4 * lo * n if e[k] != 0 else passing
        product(sgemm, N, N, rows, below, n, 1.0, above, n, weight[k], below, 0.0, p[k - 1] + at)
        own = through[k - 1] + at if through[k - 1] != 0 else passing
        squares = pull(kind[k - 1], y[k - 1] + at, p[k - 1] + at, own, rows, below)
        if skip[k] != 0:
            squares = add(e[k - 1] + at, own, above, rows * below)
        total += squares
    return first, total


@njit(inline="always")
def _nudge_all(head, tables, lo, rows, beta):
    """``d_k <- W_k (phi(s_{k-1} + d_{k-1}) - phi(s_{k-1})) + beta e_k`` up to the top.

    There it lacks its ``beta e``. Activities become those of the nudged states; the squares of
    these are returned, and those of the forces added up per sample.
    """
    width, kind, weight, _, _, _, skip, s, y, p, e, through, d, _ = tables
    sgemm, depth, most, active = head[AT.sgemm], head[AT.depth], head[AT.most], 0.0
    passing, change = head[AT.moved] + 4 * lo * most, head[AT.change] + 4 * lo * most
    forces = numba.carray(doubles(head[AT.forces] + 8 * lo), (rows,))
    norm = numba.carray(floats(head[AT.norm] + 4 * lo), (rows,))
    here = d[0] + 4 * lo * width[0] if d[0] != 0 else passing
    if head[AT.enters] != 0:
        copy(here, head[AT.enters] + 4 * lo * width[0], rows * width[0])
    else:  # nothing moves below the first state
        clear(here, rows * width[0])
        forces[:] = 0
    for k in range(depth - 1):
        n, above = width[k], width[k + 1]
        at, keep = 4 * lo * n, numba.float32(0)
        there = d[k + 1] + 4 * lo * above if d[k + 1] != 0 else passing
        share_of_e = beta if k > 0 or head[AT.enters] == 0 else numba.float32(0)
        if skip[k + 1] != 0:  # the force is that of what has come through the layer
            push(here, share_of_e, e[k] + at, rows * n)
            if there != here:
                copy(there, here, rows * n)
            share_of_e, keep = numba.float32(0), numba.float32(1)
        own = through[k] + at if through[k] != 0 else 0
        nudge(
            kind[k], s[k] + at, y[k] + at, here, share_of_e, p[k] + at, own, change, y[k] + at,
            head[AT.norm] + 4 * lo, rows, n,
        )  # fmt: skip
        active += square(y[k] + at, rows * n)
        for b in range(rows):
            forces[b] += norm[b] * norm[b]
        product(sgemm, N, T, rows, above, n, 1.0, change, n, weight[k + 1], n, keep, there)
        here = there
    return active


def ascend(job):
    """The free phase, of which only the last state is read."""
    head, tables = read(job)
    lo, rows = share(head, head[AT.batch])
    before = alone(head)
    _up(head, tables, lo, rows)
    as_before(head, before)


def descend(job):
    """Free phase, and errors down from the one at the top, which is given."""
    head, tables = read(job)
    lo, rows = share(head, head[AT.batch])
    before, sums = alone(head), lane_sums(head)
    _up(head, tables, lo, rows)
    sums[0], sums[1] = _down(head, tables, lo, rows)
    as_before(head, before)


def climb(job):
    """The same, and the nudged sweep from the foot's displacement to that of the top."""
    head, tables = read(job)
    lo, rows = share(head, head[AT.batch])
    before, sums, beta = alone(head), lane_sums(head), strength(head)
    sums[2], _ = _up(head, tables, lo, rows)
    sums[0], sums[1] = _down(head, tables, lo, rows)
    sums[3] = _nudge_all(head, tables, lo, rows, beta)
    n = tables[0][head[AT.depth] - 1]
    moved = numba.carray(floats(head[AT.moved] + 4 * lo * head[AT.most]), (rows * n,))
    top = numba.carray(floats(tables[10][head[AT.depth] - 1] + 4 * lo * n), (rows * n,))
    leaves = numba.carray(floats(head[AT.leaves] + 4 * lo * n), (rows * n,))
    for i in range(rows * n):
        leaves[i] = moved[i] + beta * top[i]
    as_before(head, before)


@_part
def falling(head, tables):
    """Free phase, cost and its gradient, errors down, and sums, of this thread's samples.

    Where a target is no class that there is, this thread does nothing, and the cost is no number.
    """
    width, s, e, top = tables[0], tables[7], tables[10], head[AT.depth] - 1
    lo, rows = share(head, head[AT.batch])
    sums, n = lane_sums(head), width[top]
    if not _has_classes(head, lo, rows, n):
        sums[4] = math.nan
        return
    sums[2], sums[3] = _up(head, tables, lo, rows)
    at, target = 4 * lo * n, _target(head, lo, n)
    loss, gradient = head[AT.loss] + 4 * lo, head[AT.gradient] + at
    _cost(head[AT.squared], s[top] + at, target, loss, gradient, rows, n)
    sums[4] = sum_of(loss, rows)
    slope = numba.carray(floats(gradient), (rows * n,))
    error = numba.carray(floats(e[top] + at), (rows * n,))
    for i in range(rows * n):
        error[i] = -slope[i]
    sums[0], sums[1] = _down(head, tables, lo, rows)


@_part
def rising(head, tables, beta):
    """The nudged sweep and its residual, of this thread's samples; returns activities' squares."""
    lo, rows = share(head, head[AT.batch])
    active = _nudge_all(head, tables, lo, rows, beta)
    d, top = tables[12], head[AT.depth] - 1
    passing = head[AT.moved] + 4 * lo * head[AT.most]
    moved = d[top] + 4 * lo * tables[0][top] if d[top] != 0 else passing
    lane_sums(head)[5] = finish(head, tables, lo, rows, beta, moved)
    return active


@njit(inline="always")
def finish(head, tables, lo, rows, beta, moved_):
    """The cost's gradient at the nudged output, and residuals; returns the sum of these.

    The output has been moved from below by what lies at ``moved_``, and by its error.
    """
    width, s, e, top = tables[0], tables[7], tables[10], head[AT.depth] - 1
    n = width[top]
    at, room = 4 * lo * n, 4 * lo * head[AT.most]
    moved = numba.carray(floats(moved_), (rows * n,))
    nudged = numba.carray(floats(head[AT.moved] + room), (rows * n,))
    output = numba.carray(floats(s[top] + at), (rows * n,))
    error = numba.carray(floats(e[top] + at), (rows * n,))
    for i in range(rows * n):
        nudged[i] = output[i] + (moved[i] + beta * error[i])
    target, slope = _target(head, lo, n), head[AT.nudged] + at
    # Nobody reads the cost itself.
    _cost(head[AT.squared], head[AT.moved] + room, target, head[AT.change] + room, slope, rows, n)
    _balance(head, e[top] + at, rows, lo, n)
    return sum_of(head[AT.residual] + 4 * lo, rows)


@njit(inline="always")
def _balance(head, error_, rows, lo, n):
    """Residuals ``||forces|| / ||dC/ds||`` and nudges ``||dC/ds||``, per unit of beta."""
    error = numba.carray(floats(error_), (rows, n))
    nudged = numba.carray(floats(head[AT.nudged] + 4 * lo * n), (rows, n))
    residual = numba.carray(floats(head[AT.residual] + 4 * lo), (rows,))
    strength = numba.carray(floats(head[AT.strength] + 4 * lo), (rows,))
    forces = numba.carray(doubles(head[AT.forces] + 8 * lo), (rows,))
    for b in range(rows):
        others, own = forces[b], 0.0
        for j in range(n):
            force = nudged[b, j] + error[b, j]
            others += force * force
            own += nudged[b, j] * nudged[b, j]
        strength[b] = math.sqrt(own)
        residual[b] = 0.0 if own == 0 else math.sqrt(others) / math.sqrt(own)


def learn(job):
    """``m <- mu m + G``, ``theta <- theta - lr m`` with ``G = -sum e^T a / B``, as ``SGD`` does."""
    head, tables = read(job)
    before = alone(head)
    learning(head, tables)
    as_before(head, before)


@_part
def learning(head, tables):
    """The same, of this thread's units."""
    width, weight, y, depth = tables[0], tables[2], tables[8], head[AT.depth]
    numbers = numba.carray(doubles(head[AT.numbers]), (2, depth, NUMBERS))
    a, n_in = head[AT.x], head[AT.inputs]
    for k in range(depth):
        if weight[k] != 0:
            _learn(head, tables, k, a, n_in, numbers)
        a, n_in = y[k], width[k]


@njit(inline="always")
def _learn(head, tables, k, a, n_in, numbers):
    """Lets layer k learn from the activity below it."""
    width, _, weight, bias, weight_m, bias_m, _, _, _, p, e, _, _, _ = tables
    sgemm, batch, n = head[AT.sgemm], head[AT.batch], width[k]
    scale = -1.0 / batch
    lo, rows = share(head, n)  # of the weight, and of the bias
    errors = e[k] if e[k] != 0 else p[k]
    error, values, own = errors + 4 * lo, weight[k] + 4 * lo * n_in, numbers[0, k]
    if weight_m[k] != 0:
        m = weight_m[k] + 4 * lo * n_in
        keep = _look_ahead(values, m, rows * n_in, own)
        product(sgemm, T, N, rows, n_in, batch, scale, error, n, a, n_in, keep, m)
        _follow(values, m, rows * n_in, own)
    else:
        keep = _kept(own)
        product(sgemm, T, N, rows, n_in, batch, -own[0] * scale, error, n, a, n_in, keep, values)
    if bias[k] != 0:
        values, own = bias[k] + 4 * lo, numbers[1, k]
        if bias_m[k] != 0:
            m = bias_m[k] + 4 * lo
            keep = _look_ahead(values, m, rows, own)
            _sum(m, keep, errors, scale, batch, n, lo, rows)
            _follow(values, m, rows, own)
        else:
            _sum(values, _kept(own), errors, -own[0] * scale, batch, n, lo, rows)


@njit(inline="always")
def _sum(into, keep, e, scale, batch, n, lo, rows):
    """``into <- keep into + scale sum_b e_b``, for some units."""
    total, errors = numba.carray(floats(into), (rows,)), numba.carray(floats(e), (batch, n))
    for j in range(rows):
        total[j] *= numba.float32(keep)
    for b in range(batch):
        for j in range(rows):
            total[j] += numba.float32(scale) * errors[b, lo + j]


@njit(inline="always")
def _kept(numbers):
    """What weight decay leaves of a parameter in a step."""
    lr, _, inside, outside, _ = numbers
    return 1.0 - lr * (inside + outside)


@njit(inline="always")
def _look_ahead(values_, m_, count, numbers):
    """What comes before the gradient is added; returns what is to be kept of the momentum.

    Nesterov's ``g + mu m'`` is ``(1 + mu) m' - mu m``: the old momentum first. The weight that
    decays in ``m'`` has moved by then, which the factor makes up for.
    """
    lr, mu, inside, outside, nesterov = numbers
    values, m = numba.carray(floats(values_), (count,)), numba.carray(floats(m_), (count,))
    if outside != 0:
        for j in range(count):
            values[j] *= numba.float32(1.0 - lr * outside)
    if nesterov == 0:
        return mu
    for j in range(count):
        values[j] += numba.float32(lr * mu) * m[j]
    return mu * (1.0 - lr * inside)


@njit(inline="always")
def _follow(values_, m_, count, numbers):
    """What comes after it: ``theta <- theta - lr m``."""
    lr, mu, inside, _, nesterov = numbers
    values, m = numba.carray(floats(values_), (count,)), numba.carray(floats(m_), (count,))
    step = numba.float32(-lr * (1.0 + mu) if nesterov != 0 else -lr)
    if inside != 0:
        for j in range(count):
            m[j] += numba.float32(inside) * values[j]
    for j in range(count):
        values[j] += step * m[j]
