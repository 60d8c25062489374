"""The form in which every data set is handed out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dataset", "standardised"]


# Without generated equality: comparing tensors elementwise has no single truth value.
@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels for training and testing, on the CPU.

    The images are standardised: ``x = (pixel - m) / s`` with the mean m and the standard deviation
    s of all training pixels, the same two numbers for the test images.

    Attributes:
        name: as given to `mep.data.load`.
        x_train: training images, float32, ``(N, 1, H, W)``.
        y_train: training labels, int64, ``(N,)``, each in ``[0, classes)``.
        x_test: test images, float32, ``(M, 1, H, W)``.
        y_test: test labels, int64, ``(M,)``.
        classes: number of classes.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int


def standardised(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: int,
) -> Dataset:
    """Make a `Dataset` from raw pixels.

    Args:
        name: name of the data set.
        train: pixels ``(N, H, W)`` of any real dtype, not all equal, and integer labels ``(N,)``.
        test: the same for the test set, ``(M, H, W)`` and ``(M,)``.
        classes: number of classes.

    Returns:
        The standardised data set.
    """
    x_train, x_test = _images(train[0]), _images(test[0])
    std, mean = torch.std_mean(x_train, correction=0)
    for x in (x_train, x_test):
        x.sub_(mean).div_(std)
    return Dataset(name, x_train, _labels(train[1]), x_test, _labels(test[1]), classes)


def _images(pixels: np.ndarray) -> Tensor:
    # A copy, since it is standardised in place and must not write to the caller's array.
    return torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1)


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))
