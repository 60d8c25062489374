"""What torch brings along, by address: the product of matrices, and the threads that torch uses.

A call through torch takes some microseconds besides the product, which is as long as the product
itself where layers are narrow. Threads of another kind would be in the way of torch's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["Native", "native"]


@dataclass(frozen=True)
class Native:
    """C functions; those of which there is only an address are for compiled loops.

    Attributes:
        sgemm: the product of float32 matrices, with the arguments that BLAS has in Fortran.
        limit: sets the number of threads that products called from this thread may take, 0 for as
            many as otherwise, and returns the number before. 0 where there is no such function.
        place: returns the number of the calling thread of a team; 0 without teams.
        team: returns the size of the calling thread's team; 0 without teams.
        wait: returns once all threads of the team have called it; 0 without teams.
        parallel: ``(body, data, threads, 0)`` calls ``body(data)`` by a team of threads.
    """

    sgemm: int
    limit: int
    place: int
    team: int
    wait: int
    parallel: Any


@cache
def native() -> Native | None:
    """Returns the functions of the libraries that torch was built with, or None.

    They are used only where a small product comes out right.

    >>> native() is None or native().sgemm != 0
    True
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        try:
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            sgemm = library.sgemm_
        except (OSError, AttributeError):
            continue
        return _found(library, sgemm) if _is_right(sgemm) else None
    return None


def _found(library: ctypes.CDLL, sgemm: Any) -> Native:
    names = ("MKL_Set_Num_Threads_Local", "omp_get_thread_num", "omp_get_num_threads",
             "GOMP_barrier", "GOMP_parallel")  # fmt: skip
    try:
        limit, place, team, wait, parallel = (getattr(library, name) for name in names)
    except AttributeError:  # a product takes all threads by itself
        return Native(_address(sgemm), 0, 0, 0, 0, None)
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    sgemm, limit, place, team, wait = map(_address, (sgemm, limit, place, team, wait))
    return Native(sgemm, limit, place, team, wait, parallel)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _is_right(sgemm: Any) -> bool:
    """Returns whether ``[1 2] [3 4]^T = 11``, whatever was there before."""
    # Numbers of 8 bytes can be read as such of 4 bytes as well.
    one, two = ctypes.c_int64(1), ctypes.c_int64(2)
    share, none = ctypes.c_float(1), ctypes.c_float(0)
    a, b, c = (ctypes.c_float * 2)(1, 2), (ctypes.c_float * 2)(3, 4), ctypes.c_float(7)
    numbers = [ctypes.byref(n) for n in (one, one, two)]
    sgemm.restype = None
    sgemm(
        b"N", b"N", *numbers, ctypes.byref(share), a, ctypes.byref(one), b, ctypes.byref(two),
        ctypes.byref(none), ctypes.byref(c), ctypes.byref(one),
    )  # fmt: skip
    return c.value == 11
