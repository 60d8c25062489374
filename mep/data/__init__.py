"""Data sets as tensors in memory: digits, MNIST, Fashion-MNIST."""

from mep.data.augment import augmented
from mep.data.catalogue import load, names
from mep.data.dataset import Dataset
from mep.data.idx import DataError, read_idx
from mep.data.tasks import INCREMENTAL, Tasks, permuted, split

__all__ = [
    "INCREMENTAL",
    "DataError",
    "Dataset",
    "Tasks",
    "augmented",
    "load",
    "names",
    "permuted",
    "read_idx",
    "split",
]
