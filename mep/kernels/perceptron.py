"""A step of a multilayer perceptron in compiled calls: of all of it, or a segment at a time.

All of it is *fall*, free phase, cost, and the errors' way down; *rise*, the nudged sweep and its
residual; *learn*, the contrast, straight into momenta or weights. A segment is walked through by
*ascend*, the free phase alone; *descend*, the free phase and the errors' way down; *climb*, both
and the nudged sweep; *learn*. A job has numbers of its own after the common ones, ``HEAD`` in all,
and then tables with one entry for every layer, ``TABLES``. A layer's state, and what there is of
it, is ``(B, width)``. A segment above the first one has its *foot* in the place of a first layer:
a state that is given, and no weight.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import math

import numba
from numba import njit

from mep.kernels.cpu import activate, cross_entropy, doubles, floats, nudge, pull
from mep.kernels.team import COMMON, N, T, alone, as_before, lane, product, share

__all__ = [
    "HEAD", "NUMBERS", "SUMS", "TABLES", "ascend", "climb", "descend", "fall", "learn", "rise",
]  # fmt: skip

_SGEMM, _BATCH = 0, 4
# Sizes; addresses of the input, the target, and results per sample; room for one thread after the
# other, of `MOST` numbers a sample; the foot's displacement, 0 without a foot, and the top's; and
# what is no whole number.
OWN = ("depth", "inputs", "squared", "x", "target", "loss", "gradient", "nudged", "residual",
       "strength", "most", "change", "moved", "norm", "forces", "enters", "leaves", "sums", "beta",
       "numbers")  # fmt: skip
(_DEPTH, _INPUTS, _SQUARED, _X, _TARGET, _LOSS, _GRADIENT, _NUDGED, _RESIDUAL, _STRENGTH, _MOST,
 _CHANGE, _MOVED, _NORM, _FORCES, _ENTERS, _LEAVES, _SUMS, _BETA,
 _NUMBERS) = range(COMMON, COMMON + len(OWN))  # fmt: skip
HEAD = COMMON + len(OWN)
# Of layer k: its width; its activation, that of the state above; weight, bias and their momenta (0
# without); whether a skip leads around it; the state above, its activity (of the nudged state once
# there is one), product and error; what of the error has come through the next layer, all of it
# unless a skip leads around that. Both are 0 for an error that only passes by on the way down: the
# nudged sweep makes it of the product once more, and puts it there. Where nothing is kept, layers
# of one width share their memory.
TABLES = ("width", "kind", "weight", "bias", "weight momentum", "bias momentum", "skip", "s", "y",
          "p", "e", "through")  # fmt: skip
# Of one lane, added up over its samples: squares of the output's error, of those below, of the
# input, and of the activities.
SUMS = 4
# Of every weight, and then of every bias: rate, momentum, decay in the gradient and out of it, and
# 1 for Nesterov's momentum.
NUMBERS = 5


@njit(inline="always")
def _job(job):
    head = numba.carray(job, (HEAD,))
    tables = numba.carray(job, (HEAD + len(TABLES) * head[_DEPTH],))[HEAD:]
    return head, tables.reshape(len(TABLES), head[_DEPTH])


@njit(inline="always")
def _square(address, count):
    values, total = numba.carray(floats(address), (count,)), numba.float32(0)
    for j in range(count):
        total += values[j] * values[j]
    return total


@njit(inline="always")
def _copy(into, source, count):
    to, values = numba.carray(floats(into), (count,)), numba.carray(floats(source), (count,))
    for j in range(count):
        to[j] = values[j]


@njit(inline="always")
def _add(into, one, other, count):
    """``into <- one + other``; returns the sum of its squares."""
    to, total = numba.carray(floats(into), (count,)), numba.float32(0)
    a, b = numba.carray(floats(one), (count,)), numba.carray(floats(other), (count,))
    for j in range(count):
        to[j] = a[j] + b[j]
        total += to[j] * to[j]
    return float(total)


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
    return head[_TARGET] + (4 * lo * n if head[_SQUARED] else 8 * lo)


@njit(inline="always")
def _up(head, tables, lo, rows):
    """``s_k <- W_k phi(s_{k-1}) + b_k``; returns squares of the input and of all activities."""
    width, kind, weight, bias, _, _, skip, s, y, _, _, _ = tables
    sgemm, depth, n_in = head[_SGEMM], head[_DEPTH], head[_INPUTS]
    a, entering, active = head[_X] + 4 * lo * n_in, 0.0, 0.0
    for k in range(depth):
        n = width[k]
        at, keep = 4 * lo * n, 0.0
        if skip[k] != 0:
            _copy(s[k] + at, s[k - 1] + at, rows * n)
            keep = 1.0
        if weight[k] != 0:
            entering += _square(a, rows * n_in) if k == 0 else numba.float32(0)
            product(sgemm, N, T, rows, n, n_in, 1.0, a, n_in, weight[k], n_in, keep, s[k] + at)
        if k + 1 < depth:
            activate(kind[k], s[k] + at, bias[k], y[k] + at, rows, n)
            a, n_in = y[k] + at, n
            active += _square(a, rows * n)
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
    width, kind, weight, _, _, _, skip, _, y, p, e, through = tables
    sgemm, top, total = head[_SGEMM], head[_DEPTH] - 1, 0.0
    passing = head[_CHANGE] + 4 * lo * head[_MOST]
    first = float(_square(e[top] + 4 * lo * width[top], rows * width[top]))
    for k in range(top, 0, -1):
        n, below = width[k], width[k - 1]
        at = 4 * lo * below
        above = e[k] + 4 * lo * n if e[k] != 0 else passing
        product(sgemm, N, N, rows, below, n, 1.0, above, n, weight[k], below, 0.0, p[k - 1] + at)
        own = through[k - 1] + at if through[k - 1] != 0 else passing
        squares = pull(kind[k - 1], y[k - 1] + at, p[k - 1] + at, own, rows, below)
        if skip[k] != 0:
            squares = _add(e[k - 1] + at, own, above, rows * below)
        total += squares
    return first, total


@njit(inline="always")
def _nudge_all(head, tables, lo, rows, beta):
    """``d_k <- W_k (phi(s_{k-1} + d_{k-1}) - phi(s_{k-1})) + beta e_k`` up to the top.

    There it lacks its ``beta e``. Activities become those of the nudged states; the squares of
    these are returned, and those of the forces added up per sample.
    """
    width, kind, weight, _, _, _, skip, s, y, p, e, through = tables
    sgemm, depth, most, active = head[_SGEMM], head[_DEPTH], head[_MOST], 0.0
    d, change, norm_ = head[_MOVED] + 4 * lo * most, head[_CHANGE] + 4 * lo * most, head[_NORM]
    moved = numba.carray(floats(d), (rows * most,))
    forces = numba.carray(doubles(head[_FORCES] + 8 * lo), (rows,))
    norm = numba.carray(floats(norm_ + 4 * lo), (rows,))
    if head[_ENTERS] != 0:
        _copy(d, head[_ENTERS] + 4 * lo * width[0], rows * width[0])
    else:  # nothing moves below the first state
        moved[: rows * width[0]] = 0
        forces[:] = 0
    for k in range(depth - 1):
        n, above = width[k], width[k + 1]
        at, keep = 4 * lo * n, numba.float32(0)
        share_of_e = beta if k > 0 or head[_ENTERS] == 0 else numba.float32(0)
        if skip[k + 1] != 0:  # the force is that of what has come through the layer
            errors = numba.carray(floats(e[k] + at), (rows * n,))
            for i in range(rows * n):
                moved[i] += share_of_e * errors[i]
            share_of_e, keep = numba.float32(0), numba.float32(1)
        own = through[k] + at if through[k] != 0 else 0
        nudge(
            kind[k], s[k] + at, y[k] + at, d, share_of_e, p[k] + at, own, change, y[k] + at,
            norm_ + 4 * lo, rows, n,
        )  # fmt: skip
        active += _square(y[k] + at, rows * n)
        for b in range(rows):
            forces[b] += norm[b] * norm[b]
        product(sgemm, N, T, rows, above, n, 1.0, change, n, weight[k + 1], n, keep, d)
    return active


@njit(inline="always")
def _beta(head):
    return numba.float32(numba.carray(doubles(head[_BETA]), (1,))[0])


@njit(inline="always")
def _sums(head):
    return numba.carray(doubles(head[_SUMS]), (lane(head) + 1, SUMS))[lane(head)]


def ascend(job):
    """The free phase, of which only the last state is read."""
    head, tables = _job(job)
    lo, rows = share(head, head[_BATCH])
    before = alone(head)
    _up(head, tables, lo, rows)
    as_before(head, before)


def descend(job):
    """Free phase, and errors down from the one at the top, which is given."""
    head, tables = _job(job)
    lo, rows = share(head, head[_BATCH])
    before, sums = alone(head), _sums(head)
    _up(head, tables, lo, rows)
    sums[0], sums[1] = _down(head, tables, lo, rows)
    as_before(head, before)


def climb(job):
    """The same, and the nudged sweep from the foot's displacement to that of the top."""
    head, tables = _job(job)
    lo, rows = share(head, head[_BATCH])
    before, sums, beta = alone(head), _sums(head), _beta(head)
    sums[2], _ = _up(head, tables, lo, rows)
    sums[0], sums[1] = _down(head, tables, lo, rows)
    sums[3] = _nudge_all(head, tables, lo, rows, beta)
    n = tables[0][head[_DEPTH] - 1]
    moved = numba.carray(floats(head[_MOVED] + 4 * lo * head[_MOST]), (rows * n,))
    top = numba.carray(floats(tables[10][head[_DEPTH] - 1] + 4 * lo * n), (rows * n,))
    leaves = numba.carray(floats(head[_LEAVES] + 4 * lo * n), (rows * n,))
    for i in range(rows * n):
        leaves[i] = moved[i] + beta * top[i]
    as_before(head, before)


def fall(job):
    """Free phase, cost and its gradient, errors down, and sums."""
    head, tables = _job(job)
    width, s, e, top = tables[0], tables[7], tables[10], head[_DEPTH] - 1
    lo, rows = share(head, head[_BATCH])
    before, sums, n = alone(head), _sums(head), width[top]
    sums[2], sums[3] = _up(head, tables, lo, rows)
    at, target = 4 * lo * n, _target(head, lo, n)
    _cost(head[_SQUARED], s[top] + at, target, head[_LOSS] + 4 * lo, head[_GRADIENT] + at, rows, n)
    slope = numba.carray(floats(head[_GRADIENT] + at), (rows * n,))
    error = numba.carray(floats(e[top] + at), (rows * n,))
    for i in range(rows * n):
        error[i] = -slope[i]
    sums[0], sums[1] = _down(head, tables, lo, rows)
    as_before(head, before)


def rise(job):
    """The nudged sweep and its residual."""
    head, tables = _job(job)
    width, s, e, top = tables[0], tables[7], tables[10], head[_DEPTH] - 1
    lo, rows = share(head, head[_BATCH])
    before, sums, n, beta = alone(head), _sums(head), width[top], _beta(head)
    sums[3] = _nudge_all(head, tables, lo, rows, beta)
    at, room = 4 * lo * n, 4 * lo * head[_MOST]
    moved = numba.carray(floats(head[_MOVED] + room), (rows * n,))
    output = numba.carray(floats(s[top] + at), (rows * n,))
    error = numba.carray(floats(e[top] + at), (rows * n,))
    for i in range(rows * n):
        moved[i] = output[i] + (moved[i] + beta * error[i])
    target, slope = _target(head, lo, n), head[_NUDGED] + at
    # Nobody reads the cost itself.
    _cost(head[_SQUARED], head[_MOVED] + room, target, head[_CHANGE] + room, slope, rows, n)
    _balance(head, rows, lo, n)
    as_before(head, before)


@njit(inline="always")
def _balance(head, rows, lo, n):
    """Residuals ``||forces|| / ||dC/ds||`` and nudges ``||dC/ds||``, per unit of beta."""
    free = numba.carray(floats(head[_GRADIENT] + 4 * lo * n), (rows, n))
    nudged = numba.carray(floats(head[_NUDGED] + 4 * lo * n), (rows, n))
    residual = numba.carray(floats(head[_RESIDUAL] + 4 * lo), (rows,))
    strength = numba.carray(floats(head[_STRENGTH] + 4 * lo), (rows,))
    forces = numba.carray(doubles(head[_FORCES] + 8 * lo), (rows,))
    for b in range(rows):
        others, own = forces[b], 0.0
        for j in range(n):
            difference = nudged[b, j] - free[b, j]
            others += difference * difference
            own += nudged[b, j] * nudged[b, j]
        strength[b] = math.sqrt(own)
        residual[b] = 0.0 if own == 0 else math.sqrt(others) / math.sqrt(own)


def learn(job):
    """``m <- mu m + G``, ``theta <- theta - lr m`` with ``G = -sum e^T a / B``, as ``SGD`` does."""
    head, tables = _job(job)
    width, weight, y, depth = tables[0], tables[2], tables[8], head[_DEPTH]
    numbers = numba.carray(doubles(head[_NUMBERS]), (2, depth, NUMBERS))
    before, a, n_in = alone(head), head[_X], head[_INPUTS]
    for k in range(depth):
        if weight[k] != 0:
            _learn(head, tables, k, a, n_in, numbers)
        a, n_in = y[k], width[k]
    as_before(head, before)


@njit(inline="always")
def _learn(head, tables, k, a, n_in, numbers):
    """Lets layer k learn from the activity below it."""
    width, _, weight, bias, weight_m, bias_m, _, _, _, p, e, _ = tables
    sgemm, batch, n = head[_SGEMM], head[_BATCH], width[k]
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
