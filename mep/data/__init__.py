"""Data sets as tensors in memory: digits, MNIST, Fashion-MNIST."""

from mep.data.catalogue import load, names
from mep.data.dataset import Dataset
from mep.data.idx import DataError, read_idx

__all__ = ["DataError", "Dataset", "load", "names", "read_idx"]
