"""Sums over samples of squared gradients, where a weight is used at several positions.

Each thread takes some samples, one after the other: what the positions see, the product with their
errors, its squares. Where weights are few, nothing of a sample leaves the cache.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections import namedtuple

import numba
import numpy as np
import torch
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor, nn

from mep.kernels.cpu import floats
from mep.kernels.library import Native
from mep.kernels.team import BATCH, COMMON, SGEMM, N, T, alone, as_before, call, lane, lanes, share
from mep.kernels.team import product as multiply

__all__ = ["convolved", "repeated"]

# Addresses of activities, errors, the lanes' sums and the lanes' room; numbers in one lane's room;
# sizes of a sample, and of a convolution.
_OWN = ("a", "e", "sums", "room", "size", "positions", "outputs", "inputs", "channels", "height",
        "width", "down", "across", "rows", "columns", "top", "left", "step_down", "step_across",
        "gap_down", "gap_across")  # fmt: skip
_HEAD = COMMON + len(_OWN)
_AT = namedtuple("Places", _OWN)(*range(COMMON, _HEAD))


@intrinsic
def _copy(typingctx, to, source, nbytes):
    """Copies memory that does not overlap; a loop would have to ask whether it does."""

    def generate(context, builder, signature, args):
        byte = context.get_value_type(types.voidptr)
        to, source = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memcpy(builder, to, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(inline="always")
def _pad(head, a_, image_):
    """Puts a sample ``(channels, height, width)`` amid zeros, channels last."""
    channels, height, width = head[_AT.channels], head[_AT.height], head[_AT.width]
    top, left = head[_AT.top], head[_AT.left]
    a = numba.carray(floats(a_), (channels, height, width))
    image = numba.carray(floats(image_), (height + 2 * top, width + 2 * left, channels))
    for y in range(height):
        for c in range(channels):
            for x in range(width):
                image[top + y, left + x, c] = a[c, y, x]


@njit(inline="always")
def _unfold(head, image_, patches_):
    """Copies what every position sees, ``(positions, down, across, channels)``."""
    pixel = 4 * head[_AT.channels]
    row = (head[_AT.width] + 2 * head[_AT.left]) * pixel
    # Without gaps a kernel's row lies in one run.
    whole = head[_AT.gap_across] == 1
    runs, nbytes = (1, head[_AT.across] * pixel) if whole else (head[_AT.across], pixel)
    for y in range(head[_AT.rows]):
        for x in range(head[_AT.columns]):
            corner_ = image_ + y * head[_AT.step_down] * row + x * head[_AT.step_across] * pixel
            for k in range(head[_AT.down]):
                for run in range(runs):
                    start_ = corner_ + k * head[_AT.gap_down] * row
                    _copy(patches_, start_ + run * head[_AT.gap_across] * pixel, nbytes)
                    patches_ += nbytes


@njit(inline="always")
def _add_squares(gradient_, sums_, count):
    gradient = numba.carray(floats(gradient_), (count,))
    sums = numba.carray(floats(sums_), (count,))
    for i in range(count):
        sums[i] += gradient[i] * gradient[i]


def _squares(job):
    head = numba.carray(job, (_HEAD,))
    lo, mine = share(head, head[BATCH])
    before = alone(head)
    positions, inputs, outputs = head[_AT.positions], head[_AT.inputs], head[_AT.outputs]
    convolved = head[_AT.channels] != 0
    sample = positions * inputs
    # Errors of a convolution lie in memory by output, those of a linear layer by position.
    form, row = (N, positions) if convolved else (T, outputs)
    if convolved:
        sample = head[_AT.channels] * head[_AT.height] * head[_AT.width]
    gradient_ = head[_AT.room] + 4 * lane(head) * head[_AT.size]
    patches_ = gradient_ + 4 * outputs * inputs
    image_ = patches_ + 4 * positions * inputs
    sums_ = head[_AT.sums] + 4 * lane(head) * outputs * inputs
    for n in range(lo, lo + mine):
        seen_, e_ = head[_AT.a] + 4 * n * sample, head[_AT.e] + 4 * n * outputs * positions
        if convolved:
            _pad(head, seen_, image_)
            _unfold(head, image_, patches_)
            seen_ = patches_
        multiply(
            head[SGEMM], form, N, outputs, inputs, positions,
            1.0, e_, row, seen_, inputs, 0.0, gradient_,
        )  # fmt: skip
        _add_squares(gradient_, sums_, outputs * inputs)
    as_before(head, before)


def convolved(found: Native, module: nn.Conv2d, a: Tensor, e: Tensor) -> Tensor:
    """Returns ``sum_n g_n^2`` of a convolution of one group, with the shape of its weight.

    Args:
        found: functions of torch's libraries.
        module: the convolution, padded with zeros.
        a: its inputs, ``(B, channels, height, width)``, float32, contiguous.
        e: errors of its outputs, ``(B, outputs, rows, columns)``, the same.
    """
    channels, height, width = a.shape[1:]
    outputs, rows, columns = e.shape[1:]
    (down, across), (top, left) = module.kernel_size, (int(size) for size in module.padding)
    inputs, positions = channels * down * across, rows * columns
    room = outputs * inputs + positions * inputs
    room += (height + 2 * top) * (width + 2 * left) * channels
    sums = _sums(
        found, a, e, room, outputs=outputs, inputs=inputs,
        positions=positions, channels=channels, height=height, width=width, down=down,
        across=across, rows=rows, columns=columns, top=top, left=left,
        step_down=module.stride[0], step_across=module.stride[1],
        gap_down=module.dilation[0], gap_across=module.dilation[1],
    )  # fmt: skip
    return sums.view(outputs, down, across, channels).permute(0, 3, 1, 2).contiguous()


def repeated(found: Native, a: Tensor, e: Tensor) -> Tensor:
    """Returns ``sum_n g_n^2`` of a linear layer over positions, ``(out, in)``.

    Args:
        found: functions of torch's libraries.
        a: its inputs, ``(B, positions, in)``, float32, contiguous.
        e: errors of its outputs, ``(B, positions, out)``, the same.
    """
    positions, inputs, outputs = a.shape[1], a.shape[2], e.shape[2]
    room, sizes = outputs * inputs, {"outputs": outputs, "inputs": inputs, "positions": positions}
    return _sums(found, a, e, room, **sizes).view(outputs, inputs)


def _sums(found: Native, a: Tensor, e: Tensor, size: int, **numbers: int) -> Tensor:
    """Calls the loop in lanes with room for so many numbers each; returns the sum of their sums."""
    like = {"dtype": torch.float32, "device": "cpu"}
    weights = numbers["outputs"] * numbers["inputs"]
    work = len(a) * weights * numbers["positions"]
    count = lanes(len(a), work)
    sums, room = torch.zeros(count, weights, **like), torch.zeros(count, size, **like)
    job = np.zeros(_HEAD, dtype=np.int64)
    numbers |= {"a": a.data_ptr(), "e": e.data_ptr(), "sums": sums.data_ptr(),
                "room": room.data_ptr(), "size": size}  # fmt: skip
    for name, number in numbers.items():
        job[getattr(_AT, name)] = number
    call(found, _squares, job, len(a), work)
    return sums.sum(0)
