"""The data sets by name."""

from __future__ import annotations

import os

from mep.data.dataset import Dataset
from mep.data.digits import load_digits
from mep.data.mnist import SOURCES, load_mnist

__all__ = ["load", "names"]


def names() -> tuple[str, ...]:
    """List the names that `load` knows.

    Returns:
        The names, the one that needs no files first.

    Example:
        >>> names()
        ('digits', 'mnist', 'fashion-mnist')
    """
    return ("digits", *SOURCES)


def load(
    name: str, data_dir: str | os.PathLike[str] | None = None, download: bool = True
) -> Dataset:
    """Load a data set.

    ``"digits"`` comes with scikit-learn and needs no files. ``"mnist"`` and ``"fashion-mnist"`` are
    read from their idx files, plain or gzip, in ``data_dir``, or else in the folder that the
    environment variable ``MEP_DATA`` names; the files lie in a subfolder named after the set, or in
    the folder itself. If they are not there, they are taken from the user's cache, and downloaded
    into it first, with their SHA-256 checked, if need be.

    Args:
        name: one of `names`.
        data_dir: folder to look in; by default the one that ``MEP_DATA`` names.
        download: whether to download what is not found.

    Returns:
        The data set: x float32, standardised by the mean and standard deviation of the training
        set, ``(N, 1, 8, 8)`` for digits and ``(N, 1, 28, 28)`` for the others; y int64, ``(N,)``.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the files are not there and ``download`` is False, some of the four are
            missing, or the folder named does not exist.
        DataError: a file is damaged or is not what its name says.
        OSError: the download failed.

    Example:
        >>> digits = load("digits")
        >>> digits.x_train.shape, digits.x_test.shape, digits.classes
        (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]), 10)
    """
    if name == "digits":
        return load_digits()
    if name in SOURCES:
        return load_mnist(name, data_dir, download)
    raise ValueError(f"`load(name=...)` must be one of {', '.join(names())}, got {name!r}")
