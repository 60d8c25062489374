"""Reader of the idx format, in which MNIST and its relatives are published.

A file is two zero bytes, one byte for the dtype, one for the number of dimensions, one big-endian
uint32 for each dimension, and then the values in C order, big-endian. See LeCun, Cortes and Burges,
"The MNIST database of handwritten digits", section "File formats".
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np

__all__ = ["REMEDY", "DataError", "read_idx"]

REMEDY = "Delete it and download it again, or point --data-dir at an intact copy."

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class DataError(ValueError):
    """A data file is damaged, or is not what its name says.

    Args:
        path: the file (or folder) at fault.
        fault: what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, path: str | os.PathLike[str], fault: str, remedy: str = REMEDY) -> None:
        # All three go to the base class: an exception is pickled by its arguments.
        super().__init__(os.fspath(path), fault, remedy)

    def __str__(self) -> str:
        path, fault, remedy = self.args
        return f"{path}: {fault}. {remedy}"


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read one idx file, gzip-compressed if its name ends in ``.gz``.

    Args:
        path: the file.

    Returns:
        A writable array with the dtype (in native byte order) and the shape that the header states.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file is truncated, too long, damaged (as the gzip checksum tells) or not an
            idx file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
        >>> _ = path.write_bytes(bytes([0, 0, 0x08, 1, 0, 0, 0, 3, 7, 2, 1]))
        >>> read_idx(path)
        array([7, 2, 1], dtype=uint8)
    """
    path = Path(path)
    data = _contents(path)
    dtype, shape, start = _header(path, data)
    expected = start + dtype.itemsize * math.prod(shape)
    if len(data) != expected:
        kind = "truncated" if len(data) < expected else "too long"
        raise DataError(path, f"{kind}: its header promises {expected} bytes, it holds {len(data)}")
    values = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def _contents(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    if not data:  # gzip takes an empty file for an empty archive
        raise DataError(path, "empty")
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(path, f"damaged or not a gzip file ({error})") from error


def _header(path: Path, data: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """Give the dtype, the shape and the offset of the first value."""
    if len(data) < 4:
        raise DataError(path, f"truncated: {len(data)} bytes are too few for an idx header")
    if data[:2] != b"\0\0":
        raise DataError(path, f"not an idx file: it begins with {data[:4].hex(' ')}, not 00 00")
    if data[2] not in _DTYPES:
        known = ", ".join(f"{code:#04x}" for code in _DTYPES)
        raise DataError(path, f"unknown idx dtype code {data[2]:#04x}, known: {known}")
    if data[3] == 0:
        raise DataError(path, "not an idx file: it has no dimensions")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise DataError(path, f"truncated: its header takes {start} bytes, it holds {len(data)}")
    shape = tuple(int(size) for size in np.frombuffer(data[4:start], ">u4"))
    return np.dtype(_DTYPES[data[2]]), shape, start
