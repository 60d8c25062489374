"""Arithmetic on a row of floats at an address, inside compiled loops."""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import numba
from numba import njit

from mep.kernels.cpu import floats

__all__ = ["add", "clear", "copy", "push", "square", "sum_of"]


@njit(inline="always")
def square(address, count):
    """Returns the sum of squares at an address."""
    values, total = numba.carray(floats(address), (count,)), numba.float32(0)
    for j in range(count):
        total += values[j] * values[j]
    return total


@njit(inline="always")
def sum_of(address, count):
    """Returns a sum in double precision."""
    values, found = numba.carray(floats(address), (count,)), 0.0
    for j in range(count):
        found += values[j]
    return found


@njit(inline="always")
def copy(into, source, count):
    """Copies floats."""
    to, values = numba.carray(floats(into), (count,)), numba.carray(floats(source), (count,))
    for j in range(count):
        to[j] = values[j]


@njit(inline="always")
def add(into, one, other, count):
    """``into <- one + other``; returns the sum of its squares."""
    to, total = numba.carray(floats(into), (count,)), numba.float32(0)
    a, b = numba.carray(floats(one), (count,)), numba.carray(floats(other), (count,))
    for j in range(count):
        to[j] = a[j] + b[j]
        total += to[j] * to[j]
    return float(total)


@njit(inline="always")
def push(into, share, other, count):
    """``into <- into + share other``."""
    to, values = numba.carray(floats(into), (count,)), numba.carray(floats(other), (count,))
    for j in range(count):
        to[j] += share * values[j]


@njit(inline="always")
def clear(into, count):
    """Sets floats to 0."""
    numba.carray(floats(into), (count,))[:] = 0
