"""What a compiled loop over a perceptron's layers works on: numbers, and tables by layer."""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence

import numba
import numpy as np
import torch
from numba import njit
from torch import Tensor

from mep.kernels.cpu import doubles
from mep.kernels.team import BATCH, COMMON, SGEMM, lane, team

__all__ = ["AT", "HEAD", "NUMBERS", "SUMS", "TABLES", "Job", "addresses", "empty", "lane_sums",
           "read", "strength", "total"]  # fmt: skip

# Sizes; addresses of the input, the target, and results per sample; room for one thread after the
# other, of `most` numbers a sample; the foot's displacement, 0 without a foot, and the top's;
# what is no whole number; how many steps are taken at once; and, of a whole step, on what terms it
# goes on, what it has found, and where the mean cost belongs.
_OWN = ("depth", "inputs", "squared", "x", "target", "loss", "gradient", "nudged", "residual",
        "strength", "most", "change", "moved", "norm", "forces", "enters", "leaves", "sums", "beta",
        "numbers", "steps", "terms", "found", "mean")  # fmt: skip
HEAD = COMMON + len(_OWN)
# Where they stand.
AT = namedtuple("Places", ("sgemm", "batch", *_OWN))(SGEMM, BATCH, *range(COMMON, HEAD))
# Of layer k: its width; its activation, that of the state above; weight, bias and their momenta (0
# without); whether a skip leads around it; the state above, its activity (of the nudged state once
# there is one), product and error; what of the error has come through the next layer, all of it
# unless a skip leads around that. Both are 0 for an error that only passes by on the way down: the
# nudged sweep makes it of the product once more, and puts it there. And the state's displacement,
# 0 where that only passes by, and its velocity. Where nothing is kept, layers of one width share
# their memory.
TABLES = ("width", "kind", "weight", "bias", "weight momentum", "bias momentum", "skip", "s", "y",
          "p", "e", "through", "d", "u")  # fmt: skip
# Of one lane, added up over its samples: squares of the output's error, of those below, of the
# input, and of the activities; the cost; and residuals.
SUMS = 6
# Of every weight, and then of every bias: rate, momentum, decay in the gradient and out of it, and
# 1 for Nesterov's momentum.
NUMBERS = 5


class Job:
    """A row of 8-byte numbers, by name.

    Args:
        depth: number of layers, the foot among them.

    Attributes:
        tensor: the row, for those who count.
        array: the same, for the loop.
    """

    def __init__(self, depth: int) -> None:
        self.tensor = torch.zeros(HEAD + len(TABLES) * depth, dtype=torch.int64, device="cpu")
        self.array = self.tensor.numpy()
        self._tables = self.array[HEAD:].reshape(-1, depth)
        self.set(depth=depth)

    def set(self, **numbers: int) -> None:
        """Sets numbers that stand before the tables."""
        for name, number in numbers.items():
            self.array[getattr(AT, name)] = number

    def fill(self, **tables: Sequence[int] | np.ndarray) -> None:
        """Fills tables, each with a number for every layer; blanks in names are underscores."""
        for name, values in tables.items():
            self._tables[_ROWS[name]] = values


_ROWS = {name.replace(" ", "_"): row for row, name in enumerate(TABLES)}


@njit(inline="always")
def read(job):
    """Returns a loop's numbers and tables, from the address of its job."""
    head = numba.carray(job, (HEAD,))
    tables = numba.carray(job, (HEAD + len(TABLES) * head[AT.depth],))[HEAD:]
    return head, tables.reshape(len(TABLES), head[AT.depth])


@njit(inline="always")
def strength(head):
    """Returns the nudging strength."""
    return numba.float32(numba.carray(doubles(head[AT.beta]), (1,))[0])


@njit(inline="always")
def total(head, which):
    """Returns a sum of all threads."""
    sums, found = numba.carray(doubles(head[AT.sums]), (team(head), SUMS)), 0.0
    for own in range(team(head)):
        found += sums[own, which]
    return found


@njit(inline="always")
def lane_sums(head):
    """Returns the sums of the calling thread."""
    return numba.carray(doubles(head[AT.sums]), (lane(head) + 1, SUMS))[lane(head)]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Returns where tensors begin in memory; 0 for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def empty(*shape: int) -> Tensor:
    """Returns a float32 tensor to write into, on the CPU whatever the defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
