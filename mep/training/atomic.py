"""Writing a file so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write"]


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> Path:
    """Replace ``path`` by what ``write`` puts into a binary file, all or nothing.

    The content goes to a temporary file in the same folder (a rename is atomic only within one
    file system), is flushed to disk, and takes the place of ``path`` in one step.

    Args:
        path: the file to write; missing folders are created.
        write: called once with the open temporary file.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _default_mode())  # mkstemp is private to the user; a result is not
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _default_mode() -> int:
    """The mode ``open`` would have given."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
