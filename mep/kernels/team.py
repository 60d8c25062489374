"""What compiled loops are made of: torch's own matrix product, in torch's own threads.

What a loop works on is a row of 8-byte numbers, its *job*. The first ``COMMON`` of them are the
same everywhere: ``sgemm, limit, place, team, wait`` of ``Native``, and the number of samples.
Samples do not see each other: every thread of a team takes some of them through all layers.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch.autograd.profiler import record_function

from mep.kernels.cpu import compiled
from mep.kernels.library import Native

__all__ = ["BATCH", "COMMON", "LARGE", "SGEMM", "N", "T", "alone", "as_before", "call", "lane",
           "lanes", "product", "share", "team", "wait"]  # fmt: skip

COMMON = 6
SGEMM, _LIMIT, _PLACE, _TEAM, _WAIT, BATCH = range(COMMON)
# Numbers from which it takes less time to wake another thread than to pass over them alone.
LARGE = 100_000
# Multiplications for which it takes longer to wake another thread than to do them.
_LEAST_WORK = 500_000
_LEAST_ROWS = 8
N, T = ord("N"), ord("T")
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@intrinsic
def product(typingctx, function, fa, fb, m, n, k, alpha, a, row_a, b, row_b, beta, c):
    """``c <- alpha op(a) op(b) + beta c`` row by row in memory, by the BLAS function at an address.

    ``c`` is ``(m, n)``, ``op(a)`` ``(m, k)`` and ``op(b)`` ``(k, n)``; ``fa`` and ``fb`` are the
    letters of ``op``, ``T`` for a tensor that lies in memory the other way round; ``row_a`` and
    ``row_b`` are how far apart rows lie. BLAS reads column by column: it is asked for ``c^T``.
    """

    def generate(context, builder, signature, args):
        function, fa, fb, m, n, k, alpha, a, row_a, b, row_b, beta, c = args
        byte = ir.IntType(8)
        pointer = byte.as_pointer()

        def kept(value):
            return builder.bitcast(cgutils.alloca_once_value(builder, value), pointer)

        def at(address):
            return builder.inttoptr(address, pointer)

        form = ir.FunctionType(ir.VoidType(), [pointer] * 13).as_pointer()
        builder.call(
            builder.inttoptr(function, form),
            [
                kept(builder.trunc(fb, byte)), kept(builder.trunc(fa, byte)), kept(n), kept(m),
                kept(k), kept(alpha), at(b), kept(row_b), at(a), kept(row_a), kept(beta), at(c),
                kept(n),
            ],
        )  # fmt: skip
        return context.get_dummy_value()

    i, f = types.int64, types.float32
    return types.void(i, i, i, i, i, i, f, i, i, i, i, f, i), generate


@intrinsic
def _ask(typingctx, function):
    """Calls a C function ``int f(void)`` at an address."""

    def generate(context, builder, signature, args):
        form = ir.FunctionType(ir.IntType(32), []).as_pointer()
        found = builder.call(builder.inttoptr(args[0], form), [])
        return builder.sext(found, ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def _set(typingctx, function, number):
    """Calls a C function ``int f(int)`` at an address."""

    def generate(context, builder, signature, args):
        short = ir.IntType(32)
        form = ir.FunctionType(short, [short]).as_pointer()
        found = builder.call(builder.inttoptr(args[0], form), [builder.trunc(args[1], short)])
        return builder.sext(found, ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _let(typingctx, function):
    """Calls a C function ``void f(void)`` at an address."""

    def generate(context, builder, signature, args):
        form = ir.FunctionType(ir.VoidType(), []).as_pointer()
        builder.call(builder.inttoptr(args[0], form), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(inline="always")
def lane(job):
    """Returns the number of the calling thread, from 0."""
    return 0 if job[_PLACE] == 0 else _ask(job[_PLACE])


@njit(inline="always")
def team(job):
    """Returns how many threads there are."""
    return 1 if job[_TEAM] == 0 else _ask(job[_TEAM])


@njit(inline="always")
def share(job, count):
    """Returns the first of so many that are this thread's, and how many are."""
    first = count * lane(job) // team(job)
    return first, count * (lane(job) + 1) // team(job) - first


@njit(inline="always")
def wait(job):
    """Waits for all threads, which find what the others have written then."""
    if job[_WAIT] != 0:
        _let(job[_WAIT])


@njit(inline="always")
def alone(job):
    """From here on this thread's products take no other thread; returns what to go back to."""
    return _set(job[_LIMIT], 1) if job[_LIMIT] != 0 else 0


@njit(inline="always")
def as_before(job, number):
    """Gives this thread's products back what they had."""
    if job[_LIMIT] != 0:
        _set(job[_LIMIT], number)


def lanes(batch: int, work: int) -> int:
    """Returns how many threads share so many samples and multiplications, if there is a team."""
    return max(1, min(torch.get_num_threads(), batch // _LEAST_ROWS, work // _LEAST_WORK))


def call(found: Native, loop: Any, job: np.ndarray, batch: int, work: int) -> None:
    """Calls a loop in as many threads as torch may take.

    Args:
        found: functions of torch's libraries.
        loop: takes a pointer to a job.
        job: int64; its first numbers are written here.
        batch: number of samples.
        work: multiplications, of all samples.
    """
    threads = lanes(batch, work)
    parallel = found.parallel if threads > 1 else None
    # Alone, a product may take other threads.
    together = (0, 0, 0, 0)
    if parallel is not None:
        together = found.limit, found.place, found.team, found.wait
    job[:COMMON] = found.sgemm, *together, batch
    with _named(loop):
        if parallel is None:
            _CALL(_body(loop))(job.ctypes.data)
        else:
            parallel(_body(loop), job.ctypes.data, threads, 0)


def _named(loop: Any) -> AbstractContextManager:
    """Gives a loop its name among a profiler's operations."""
    if not torch.autograd.profiler._is_profiler_enabled:
        return nullcontext()
    return record_function(f"compiled {loop.__name__.removeprefix('_')}")


@cache
def _body(loop: Any) -> int:
    """Returns a loop's address as a C function; it is compiled by its first use."""
    signature = types.void(types.CPointer(types.int64))
    function = compiled(partial(numba.cfunc, signature), loop)
    _bodies.append(function)  # its address is good as long as it lives
    return function.address


_bodies: list[Any] = []
