"""Rounds of relaxation of a perceptron with symmetric couplings, as compiled programs.

A program is a list of instructions, each of which every thread carries out for its own samples.
States count from 1, the input is 0; what comes to a state from below and from above is kept.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numba
import numpy as np
import torch
from numba import njit
from torch import Tensor

from mep.kernels.coupled import CoupledPhase
from mep.kernels.cpu import doubles, floats
from mep.kernels.job import addresses
from mep.kernels.library import Native
from mep.kernels.ramp import approach, rest
from mep.kernels.team import BATCH, COMMON, SGEMM, N, T, alone, as_before, call, product, share

__all__ = ["Rounds"]

# Instructions, each with a state ``i`` and a word of its own:
# below, ``below[i] <- W_i s[i-1] + b_i``; above, ``above[i] <- W_{i+1}^T s[i+1]``;
_BELOW, _ABOVE = 0, 1
# rest, where ``i`` comes to rest under what comes from below (word 1), above (2) or both (3), and
# how far it is from there; move, a share of the way there, and how far it is then;
_REST, _MOVE = 2, 3
# output, its rest under the nudge and what comes from below (1) or nothing (0); look, how far it is
# from there, and from the target, and how far all states are from their balance.
_OUTPUT, _LOOK = 4, 5

_f32 = numba.float32
_STATES, _NUMBERS, _TARGET, _NUDGE, _FORCE, _PROGRAM, _LENGTH, _HEAD = range(COMMON, COMMON + 8)
# Of every state: width, weight from below, its bias (0 without), the state, what comes from below
# and above, where it rests, how far that is, the origin of displacements and what is beyond (0
# without). Numbers: share, beta, and then both bounds of every state.
_TABLES = 10


@njit(inline="always")
def _add_bias(into, bias_, rows, n):
    to, bias = numba.carray(floats(into), (rows, n)), numba.carray(floats(bias_), (n,))
    for b in range(rows):
        for j in range(n):
            to[b, j] += bias[j]


@njit(inline="always")
def _nudged(below, known, target_, beta, rest_, rows, n):
    """``rest <- (below + beta target) / (1 + beta)``: the cost is half the squared distance."""
    target = numba.carray(floats(target_), (rows, n))
    found, part = numba.carray(floats(rest_), (rows, n)), _f32(1) / (_f32(1) + beta)
    current = numba.carray(floats(below), (rows, n))
    for b in range(rows):
        for j in range(n):
            own = current[b, j] if known else _f32(0)
            found[b, j] = (own + beta * target[b, j]) * part


@njit(inline="always")
def _look(s_, rest_, target_, beta, gap_, size_, rows, n):
    """The output's force, and the nudge that a strength of 1 would exert."""
    s, rest_of = numba.carray(floats(s_), (rows, n)), numba.carray(floats(rest_), (rows, n))
    target = numba.carray(floats(target_), (rows, n))
    gap, size = numba.carray(floats(gap_), (rows,)), numba.carray(floats(size_), (rows,))
    for b in range(rows):
        left, nudge = _f32(0), _f32(0)
        for j in range(n):
            left += (s[b, j] - rest_of[b, j]) ** 2
            nudge += (s[b, j] - target[b, j]) ** 2
        gap[b] = (_f32(1) + beta) * math.sqrt(left)
        size[b] = math.sqrt(nudge)


@njit(inline="always")
def _add_up(gaps, one, force_, rows):
    force = numba.carray(floats(force_), (rows,))
    force[:] = 0
    for i in range(1, len(gaps)):
        gap = numba.carray(floats(gaps[i] + one), (rows,))
        for b in range(rows):
            force[b] += gap[b] * gap[b]
    for b in range(rows):
        force[b] = math.sqrt(force[b])


def _run(job):
    head = numba.carray(job, (_HEAD,))
    count = head[_STATES]
    tables = numba.carray(job, (_HEAD + _TABLES * count,))[_HEAD:].reshape(_TABLES, count)
    width, weight, bias, s, below, above, rests, gaps, origin, beyond = tables
    program = numba.carray(job, (head[_PROGRAM] + 3 * head[_LENGTH],))[head[_PROGRAM] :]
    numbers = numba.carray(doubles(head[_NUMBERS]), (2 + 2 * count,))
    omega, beta = numbers[0], _f32(numbers[1])
    lo, rows = share(head, head[BATCH])
    before = alone(head)
    for k in range(head[_LENGTH]):
        what, i, word = program[3 * k], program[3 * k + 1], program[3 * k + 2]
        n, one = width[i], 4 * lo
        at = one * n
        low, high = numbers[2 + 2 * i], numbers[3 + 2 * i]
        at_home = origin[i] + at if origin[i] != 0 else 0
        if what == _BELOW:
            m = width[i - 1]
            into, source = below[i] + at, s[i - 1] + one * m
            product(head[SGEMM], N, T, rows, n, m, 1.0, source, m, weight[i], m, 0.0, into)
            if bias[i] != 0:
                _add_bias(into, bias[i], rows, n)
        elif what == _ABOVE:
            m = width[i + 1]
            into, source = above[i] + at, s[i + 1] + one * m
            product(head[SGEMM], N, N, rows, n, m, 1.0, source, m, weight[i + 1], n, 0.0, into)
        elif what == _REST:
            first = below[i] + at if word != 2 else above[i] + at
            second = above[i] + at if word == 3 else 0
            more = beyond[i] + at if origin[i] != 0 else 0
            rest(
                low, high, first, second, at_home, more, s[i] + at, rests[i] + at,
                gaps[i] + one, rows, n,
            )  # fmt: skip
        elif what == _MOVE:
            approach(
                low, high, omega, s[i] + at, rests[i] + at, at_home, s[i] + at, gaps[i] + one,
                rows, n,
            )  # fmt: skip
        elif what == _OUTPUT:
            current = below[i] + at if word != 0 else rests[i] + at
            _nudged(current, word != 0, head[_TARGET] + at, beta, rests[i] + at, rows, n)
        else:
            _look(
                s[i] + at, rests[i] + at, head[_TARGET] + at, beta, gaps[i] + one,
                head[_NUDGE] + one, rows, n,
            )  # fmt: skip
            _add_up(gaps, one, head[_FORCE] + one, rows)
    as_before(head, before)


class Rounds:
    """The states of one phase and batch, in room of their own, where they relax.

    Nothing is computed twice: what comes to a state is known until its neighbour has moved.

    Args:
        found: functions of torch's libraries.
        phase: what relaxes.

    Attributes:
        force: how far all units are from their balance, a norm per sample, ``(B,)``.
        nudge: what a nudge of strength 1 takes from the output's current, a norm per sample.
    """

    def __init__(self, found: Native, phase: CoupledPhase) -> None:
        start, target = phase.start, phase.target
        self._found, self._batch, self._count = found, len(target), len(start)
        self._s = [s.clone(memory_format=torch.contiguous_format) for s in start]
        self._up, self._down, rests = ([torch.empty_like(s) for s in self._s] for _ in range(3))
        self._fed, self._still = phase.below[0] is not None, set(phase.still)
        # Of what comes from below and above, and of rests, that which is known.
        self._known_below, self._known_above, self._known_rests = set[int](), set[int](), set[int]()
        for i, kept in enumerate(phase.below, 1):
            if kept is not None:
                self._up[i - 1].copy_(kept)
                self._known_below.add(i)
        gaps = target.new_zeros(len(start), self._batch)  # what is still has none to go
        self.force, self.nudge = target.new_empty(2, self._batch)
        self._numbers = np.array([1.0, phase.beta, 0.0, 0.0, *chain(*phase.bounds)])
        origins, beyond = zip(*(pair or (None, None) for pair in phase.offsets), strict=True)
        self._kept = phase, rests, gaps  # as long as their addresses
        parts = (phase.weights, phase.biases, self._s, self._up, self._down, rests, [*gaps],
                 origins, beyond)  # fmt: skip
        tables = [[0, *(s.shape[1] for s in start)], *([0, *addresses(part)] for part in parts)]
        self._work = self._batch * sum(0 if w is None else w.numel() for w in phase.weights)
        count = len(start) + 1
        own = [count, self._numbers.ctypes.data, *addresses([target, self.nudge, self.force])]
        own += [_HEAD + _TABLES * count, 0]
        self._job = np.array([*[0] * COMMON, *own, *chain(*tables)], dtype=np.int64)

    @property
    def states(self) -> list[Tensor | None]:
        """The states as they are now; None for those that are still."""
        return [None if i in self._still else s for i, s in enumerate(self._s, 1)]

    @property
    def below(self) -> list[Tensor | None]:
        """What comes from below to the states as they are now; None where it is not known."""
        return [t if i in self._known_below else None for i, t in enumerate(self._up, 1)]

    @property
    def above(self) -> list[Tensor | None]:
        """The same from above."""
        return [t if i in self._known_above else None for i, t in enumerate(self._down, 1)]

    def relax(self, groups: Sequence[Sequence[int]], omega: float) -> None:
        """Takes a round, and looks how far units then are from their balance.

        Args:
            groups: states, from 1, in the order in which they relax; none in a group may be
                another's neighbour.
            omega: how much of its way a unit goes.
        """
        program: list[tuple[int, int, int]] = []
        for group in groups:
            for i in [i for i in group if self._find_rest(program, i)]:
                program.append((_MOVE, i, 0))
                self._moved(i)
        for i in range(1, self._count + 1):
            self._find_rest(program, i)
        program.append((_LOOK, self._count, 0))
        job = np.concatenate((self._job, np.array(program, dtype=np.int64).reshape(-1)))
        job[_LENGTH], self._numbers[0] = len(program), omega
        call(self._found, _run, job, self._batch, self._work)

    def _find_rest(self, program: list[tuple[int, int, int]], i: int) -> bool:
        """Adds what it takes to know where a unit rests; returns whether anything moves it."""
        if i in self._known_rests:
            return True
        fed = self._fed if i == 1 else i - 1 not in self._still
        drawn = i < self._count and i + 1 not in self._still
        if fed and i not in self._known_below:
            program.append((_BELOW, i, 0))
            self._known_below.add(i)
        if drawn and i not in self._known_above:
            program.append((_ABOVE, i, 0))
            self._known_above.add(i)
        if i == self._count:
            program.append((_OUTPUT, i, int(fed)))
        elif fed or drawn:
            program.append((_REST, i, fed + 2 * drawn))
        elif i in self._still:
            return False
        else:  # back to where nothing pulls
            self._up[i - 1].zero_()
            program.append((_REST, i, 1))
        self._known_rests.add(i)
        return True

    def _moved(self, i: int) -> None:
        self._still.discard(i)
        self._known_below.discard(i + 1)
        self._known_above.discard(i - 1)
        self._known_rests -= {i - 1, i + 1}
