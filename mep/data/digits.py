"""The 8 × 8 digits embedded in scikit-learn: a real problem that needs no download."""

from __future__ import annotations

import numpy as np

from mep.data.dataset import Dataset, standardised

__all__ = ["load_digits"]

_TEST_PER_CLASS = 36


def load_digits() -> Dataset:
    """Load the digits, always with the same split.

    The test set is 36 images of each class, 360 of 1797 in all, drawn class by class with
    ``numpy.random.RandomState(0)``, whose stream NumPy keeps the same in every version. The other
    1437 images are the training set. Both keep the original order.

    Returns:
        The data set; images ``(1437, 1, 8, 8)`` and ``(360, 1, 8, 8)``.
    """
    # Here, since importing scikit-learn takes longer than the rest of this package together.
    from sklearn.datasets import load_digits as embedded

    pixels, labels = embedded(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8)
    random = np.random.RandomState(0)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        test[random.permutation(members)[:_TEST_PER_CLASS]] = True
    return standardised(
        "digits", (pixels[~test], labels[~test]), (pixels[test], labels[test]), classes=10
    )
