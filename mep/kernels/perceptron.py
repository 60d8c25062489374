"""A step of a multilayer perceptron in three compiled calls: fall, rise, learn.

*Fall*: free phase, cost, and the errors' way down. *Rise*: the nudged sweep and its residual.
*Learn*: the contrast, straight into momenta or weights. A job has numbers of its own after the
common ones, ``HEAD`` in all, and then tables with one entry for every layer, ``TABLES``. A layer's
state, and what there is of it, is ``(B, width)``.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import math

import numba
from numba import njit

from mep.kernels.cpu import activate, cross_entropy, doubles, floats, nudge, pull
from mep.kernels.team import COMMON, N, T, alone, as_before, lane, product, share

__all__ = ["HEAD", "NUMBERS", "SUMS", "TABLES", "fall", "learn", "rise"]

_SGEMM, _BATCH = 0, 4
# Sizes; addresses of the input, the target, and results per sample; room for one thread after the
# other, of `MOST` numbers a sample; and what is no whole number.
OWN = ("depth", "inputs", "squared", "x", "target", "loss", "gradient", "nudged", "residual",
       "strength", "most", "change", "moved", "sums", "beta", "numbers")  # fmt: skip
(_DEPTH, _INPUTS, _SQUARED, _X, _TARGET, _LOSS, _GRADIENT, _NUDGED, _RESIDUAL, _STRENGTH, _MOST,
 _CHANGE, _MOVED, _SUMS, _BETA, _NUMBERS) = range(COMMON, COMMON + len(OWN))  # fmt: skip
HEAD = COMMON + len(OWN)
# Of layer k: its width; its activation, that of the state above; weight, bias and their momenta (0
# without); whether a skip leads around it; the state above, its activity, product and error; what
# of the error has come through the next layer, all of it unless a skip leads around that;
# activity and force of the nudged state; and which activity is learned from.
TABLES = ("width", "kind", "weight", "bias", "weight momentum", "bias momentum", "skip", "s", "y",
          "p", "e", "through", "y_new", "force", "activity")  # fmt: skip
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


def fall(job):
    """``s_k <- W_k phi(s_{k-1}) + b_k`` up, ``e_{k-1} <- phi' W_k^T e_k`` down, and sums."""
    head, (width, kind, weight, bias, _, _, skip, s, y, p, e, through, _, _, _) = _job(job)
    sgemm, depth, inputs = head[_SGEMM], head[_DEPTH], head[_INPUTS]
    lo, rows = share(head, head[_BATCH])
    before, total, active = alone(head), 0.0, 0.0
    a, n_in = head[_X] + 4 * lo * inputs, inputs
    entering = float(_square(a, rows * inputs))
    for k in range(depth):
        n = width[k]
        at = 4 * lo * n
        keep = 0.0
        if skip[k] != 0:
            _copy(s[k] + at, s[k - 1] + at, rows * n)
            keep = 1.0
        product(sgemm, N, T, rows, n, n_in, 1.0, a, n_in, weight[k], n_in, keep, s[k] + at)
        if k + 1 < depth:
            activate(kind[k], s[k] + at, bias[k], y[k] + at, rows, n)
            a, n_in = y[k] + at, n
            active += _square(a, rows * n)
    n, top = width[depth - 1], depth - 1
    at = 4 * lo * n
    output = numba.carray(floats(s[top] + at), (rows, n))
    slope = numba.carray(floats(head[_GRADIENT] + at), (rows, n))
    error = numba.carray(floats(e[top] + at), (rows, n))
    if bias[top] != 0:
        shift = numba.carray(floats(bias[top]), (n,))
        for b in range(rows):
            for j in range(n):
                output[b, j] += shift[j]
    target = _target(head, lo, n)
    _cost(head[_SQUARED], s[top] + at, target, head[_LOSS] + 4 * lo, head[_GRADIENT] + at, rows, n)
    for b in range(rows):
        for j in range(n):
            error[b, j] = -slope[b, j]
    for k in range(top, 0, -1):
        n, below = width[k], width[k - 1]
        at = 4 * lo * below
        above = e[k] + 4 * lo * n
        product(sgemm, N, N, rows, below, n, 1.0, above, n, weight[k], below, 0.0, p[k - 1] + at)
        own = through[k - 1] + at
        squares = pull(kind[k - 1], y[k - 1] + at, p[k - 1] + at, own, rows, below)
        if skip[k] != 0:
            squares = _add(e[k - 1] + at, own, above, rows * below)
        total += squares
    as_before(head, before)
    sums = numba.carray(doubles(head[_SUMS]), (lane(head) + 1, SUMS))[lane(head)]
    sums[0] = _square(e[top] + 4 * lo * width[top], rows * width[top])
    sums[1], sums[2], sums[3] = total, entering, active


def rise(job):
    """``d_k <- W_k (phi(s_{k-1} + d_{k-1}) - phi(s_{k-1})) + beta e_k`` up, and the residual."""
    head, (width, kind, weight, _, _, _, skip, s, y, p, e, through, y_new, force, _) = _job(job)
    sgemm, depth, most = head[_SGEMM], head[_DEPTH], head[_MOST]
    lo, rows = share(head, head[_BATCH])
    before, room = alone(head), 4 * lo * most
    beta = numba.float32(numba.carray(doubles(head[_BETA]), (1,))[0])
    d, change = head[_MOVED] + room, head[_CHANGE] + room
    moved = numba.carray(floats(d), (rows * most,))
    for i in range(rows * width[0]):  # nothing moves below the first state
        moved[i] = 0
    for k in range(depth - 1):
        n, above = width[k], width[k + 1]
        at, share_of_e, keep = 4 * lo * n, beta, numba.float32(0)
        if skip[k + 1] != 0:  # the force is that of what has come through the layer
            errors = numba.carray(floats(e[k] + at), (rows * n,))
            for i in range(rows * n):
                moved[i] += beta * errors[i]
            share_of_e, keep = numba.float32(0), numba.float32(1)
        nudge(
            kind[k], s[k] + at, y[k] + at, d, share_of_e, p[k] + at, through[k] + at, change,
            y_new[k] + at, force[k] + 4 * lo, rows, n,
        )  # fmt: skip
        product(sgemm, N, T, rows, above, n, 1.0, change, n, weight[k + 1], n, keep, d)
    as_before(head, before)
    top, n = depth - 1, width[depth - 1]
    at = 4 * lo * n
    output = numba.carray(floats(s[top] + at), (rows, n))
    error = numba.carray(floats(e[top] + at), (rows, n))
    for b in range(rows):
        for j in range(n):
            moved[b * n + j] = output[b, j] + (moved[b * n + j] + beta * error[b, j])
    target, slope = _target(head, lo, n), head[_NUDGED] + at
    _cost(head[_SQUARED], d, target, change, slope, rows, n)  # nobody reads the cost itself
    _balance(head, force, rows, lo, n, depth)
    active = 0.0
    for k in range(depth - 1):
        active += _square(y_new[k] + 4 * lo * width[k], rows * width[k])
    numba.carray(doubles(head[_SUMS]), (lane(head) + 1, SUMS))[lane(head), 3] = active


@njit(inline="always")
def _balance(head, force, rows, lo, n, depth):
    """Residuals ``||forces|| / ||dC/ds||`` and nudges ``||dC/ds||``, per unit of beta."""
    free = numba.carray(floats(head[_GRADIENT] + 4 * lo * n), (rows, n))
    nudged = numba.carray(floats(head[_NUDGED] + 4 * lo * n), (rows, n))
    residual = numba.carray(floats(head[_RESIDUAL] + 4 * lo), (rows,))
    strength = numba.carray(floats(head[_STRENGTH] + 4 * lo), (rows,))
    for b in range(rows):
        others, own = 0.0, 0.0
        for j in range(n):
            difference = nudged[b, j] - free[b, j]
            others += difference * difference
            own += nudged[b, j] * nudged[b, j]
        for k in range(depth - 1):
            norm = numba.carray(floats(force[k] + 4 * lo), (rows,))[b]
            others += norm * norm
        strength[b] = math.sqrt(own)
        residual[b] = math.sqrt(others) / math.sqrt(own) if own > 0 else 0.0


def learn(job):
    """``m <- mu m + G``, ``theta <- theta - lr m`` with ``G = -sum e^T a / B``, as ``SGD`` does."""
    head, (width, _, weight, bias, weight_m, bias_m, _, _, _, _, e, _, _, _, activity) = _job(job)
    sgemm, depth, batch = head[_SGEMM], head[_DEPTH], head[_BATCH]
    numbers = numba.carray(doubles(head[_NUMBERS]), (2, depth, NUMBERS))
    before, a, n_in, scale = alone(head), head[_X], head[_INPUTS], -1.0 / batch
    for k in range(depth):
        n = width[k]
        lo, rows = share(head, n)  # of the weight, and of the bias
        error, values, numbers_k = e[k] + 4 * lo, weight[k] + 4 * lo * n_in, numbers[0, k]
        if weight_m[k] != 0:
            m = weight_m[k] + 4 * lo * n_in
            keep = _look_ahead(values, m, rows * n_in, numbers_k)
            product(sgemm, T, N, rows, n_in, batch, scale, error, n, a, n_in, keep, m)
            _follow(values, m, rows * n_in, numbers_k)
        else:
            lr, keep = numbers_k[0], _kept(numbers_k)
            product(sgemm, T, N, rows, n_in, batch, -lr * scale, error, n, a, n_in, keep, values)
        if bias[k] != 0:
            values, numbers_k = bias[k] + 4 * lo, numbers[1, k]
            if bias_m[k] != 0:
                m = bias_m[k] + 4 * lo
                keep = _look_ahead(values, m, rows, numbers_k)
                _sum(m, keep, e[k], scale, batch, n, lo, rows)
                _follow(values, m, rows, numbers_k)
            else:
                lr, keep = numbers_k[0], _kept(numbers_k)
                _sum(values, keep, e[k], -lr * scale, batch, n, lo, rows)
        a, n_in = activity[k], n
    as_before(head, before)


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
