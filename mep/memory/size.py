"""Sizes in bytes, read and shown."""

from __future__ import annotations

import math
import re
from operator import index
from typing import SupportsIndex

__all__ = ["parse", "show"]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_SIZE = re.compile(
    r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([kmg]?)(?:i?b)?|bytes)\s*", re.IGNORECASE
)


def parse(size: int | str, name: str) -> int:
    """Returns a size in bytes; 1 MB is ``2**20``.

    Args:
        size: a whole number of bytes, or a string such as ``"4MB"``, ``"512 kB"``, ``"1.5GiB"``.
        name: the option's name, for messages.

    Raises:
        TypeError: if it is of another kind.
        ValueError: if it is no size, or not positive.

    >>> parse("4MB", "memory_budget")
    4194304
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise ValueError(f"`{name}` must be a size such as '4MB', got {size!r}")
        found = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    elif isinstance(size, bool) or not isinstance(size, SupportsIndex):
        raise TypeError(
            f"`{name}` must be a number of bytes or a string such as '4MB', got {size!r}"
        )
    else:
        found = index(size)
    if found <= 0:
        raise ValueError(f"`{name}` must be > 0, got {size}")
    return found


def show(size: int, *, up: bool = False) -> str:
    """Returns a size for people, with two decimals; ``up`` rounds what must suffice.

    >>> show(4194304), show(2500), show(2500, up=True)
    ('4.00 MB', '2.44 kB', '2.45 kB')
    """
    for unit, name in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
        if size >= 0.99999 * unit:
            hundredths = math.ceil(100 * size / unit) if up else round(100 * size / unit)
            return f"{hundredths / 100:.2f} {name}"
    return f"{size} bytes"
