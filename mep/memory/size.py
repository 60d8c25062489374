"""Sizes in bytes, read and shown."""

from __future__ import annotations

import re

__all__ = ["parse", "show"]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)i?b?\s*", re.IGNORECASE)


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
        size = int(float(match[1]) * _UNITS[match[2].lower()])
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"`{name}` must be a number of bytes or a string such as '4MB', got {size}")
    if size <= 0:
        raise ValueError(f"`{name}` must be > 0, got {size}")
    return size


def show(size: int) -> str:
    """Returns a size for people, with three digits at least.

    >>> show(4194304), show(2500)
    ('4.00 MB', '2.44 kB')
    """
    for unit, name in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"
