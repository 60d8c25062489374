"""MNIST and Fashion-MNIST: find their four idx files, or download them, and check them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch

from mep.data.dataset import Dataset, standardised
from mep.data.idx import DataError, read_idx

__all__ = ["SOURCES", "load_mnist"]

_CLASSES = 10
_SIDE = 28


@dataclass(frozen=True)
class Source:
    """Where a data set is published and how its files are recognised.

    Attributes:
        url: the folder that holds the files, ending in a slash.
        archives: file name without ``.gz`` -> SHA-256 of the published gzip file.
        labels: SHA-256 of the labels themselves, training and test.
    """

    url: str
    archives: Mapping[str, str]
    labels: tuple[str, str]


SOURCES = {
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte": (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
            ),
            "train-labels-idx1-ubyte": (
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
            ),
            "t10k-images-idx3-ubyte": (
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
            ),
            "t10k-labels-idx1-ubyte": (
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
            ),
        },
        (
            "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
            "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
        ),
    ),
    "fashion-mnist": Source(
        # This mirror answers without TLS only; the checksums make up for it.
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
            ),
            "train-labels-idx1-ubyte": (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
            ),
            "t10k-images-idx3-ubyte": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
            ),
            "t10k-labels-idx1-ubyte": (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
            ),
        },
        (
            "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
        ),
    ),
}


def load_mnist(name: str, data_dir: str | os.PathLike[str] | None, download: bool) -> Dataset:
    """Load one of the sets published in the form of MNIST.

    Args:
        name: a key of `SOURCES`.
        data_dir: folder to look in; None means the environment variable ``MEP_DATA``.
        download: whether to download what is not found.

    Returns:
        The data set; images ``(60000, 1, 28, 28)`` and ``(10000, 1, 28, 28)``.

    Raises:
        FileNotFoundError: the files are not there and ``download`` is False, some of the four are
            missing, or the folder named does not exist.
        DataError: a file is damaged or is not what its name says.
        OSError: the download failed.
    """
    files = _local_files(name, data_dir)
    if files is None:
        files = _download(name) if download else _cached(name)
    train = _read_pair(name, files["train-images-idx3-ubyte"], files["train-labels-idx1-ubyte"])
    test = _read_pair(name, files["t10k-images-idx3-ubyte"], files["t10k-labels-idx1-ubyte"])
    return standardised(name, train, test, _CLASSES)


def _local_files(name: str, data_dir: str | os.PathLike[str] | None) -> dict[str, Path] | None:
    given = data_dir if data_dir is not None else os.environ.get("MEP_DATA")
    if not given:
        return None
    root = Path(given)
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder {root}: check --data-dir or MEP_DATA")
    # The subfolder first: it says which set it holds, a flat folder does not.
    return _files_in(root / name, name) or _files_in(root, name)


def _files_in(folder: Path, name: str) -> dict[str, Path] | None:
    """Give the four files of a set by their names without ``.gz``, or None if none is there."""
    found = {
        stem: path
        for stem in SOURCES[name].archives
        # The plain file comes last and so wins: it needs no decompression.
        for path in (folder / f"{stem}.gz", folder / stem)
        if path.is_file()
    }
    missing = SOURCES[name].archives.keys() - found.keys()
    if found and missing:
        # Filling the gap from elsewhere could mix two versions of a set.
        raise FileNotFoundError(
            f"{folder} holds only a part of {name}; missing: {', '.join(sorted(missing))}"
        )
    return found or None


def _cache_folder(name: str) -> Path:
    return Path(pooch.os_cache("mep")) / name


def _cached(name: str) -> dict[str, Path]:
    files = _files_in(_cache_folder(name), name)
    if files is None:
        raise FileNotFoundError(
            f"{name} is not on this machine and downloading is off. Pass --data-dir, or set "
            f"MEP_DATA, to a folder that holds its idx files, directly or in a subfolder {name}/"
        )
    return files


def _download(name: str) -> dict[str, Path]:
    source, folder = SOURCES[name], _cache_folder(name)
    return {
        stem: _retrieve(f"{source.url}{stem}.gz", sha256, folder)
        for stem, sha256 in source.archives.items()
    }


def _retrieve(url: str, sha256: str, folder: Path) -> Path:
    """Give the file's place in the cache, downloading it unless it is there and intact."""
    file = url.rsplit("/", 1)[1]
    try:
        return Path(pooch.retrieve(url, f"sha256:{sha256}", fname=file, path=folder))
    except ValueError as error:
        raise DataError(
            url,
            f"what was downloaded is not the published file ({error})",
            "Try again later, or point --data-dir at a copy of the files.",
        ) from error
    except OSError as error:
        raise OSError(
            f"could not download {url} to {folder}: {error}. Pass --data-dir, or set MEP_DATA, to "
            "a folder that holds the files"
        ) from error


def _read_pair(name: str, images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels that belong together."""
    x, y = read_idx(images), read_idx(labels)
    if x.dtype != np.uint8 or x.shape[1:] != (_SIDE, _SIDE) or len(x) == 0:
        raise DataError(
            images,
            f"holds {x.dtype} of shape {x.shape}, not uint8 images (N, {_SIDE}, {_SIDE})",
        )
    if y.dtype != np.uint8 or y.ndim != 1:
        raise DataError(labels, f"holds {y.dtype} of shape {y.shape}, not uint8 labels (N,)")
    if len(x) != len(y):
        raise DataError(labels, f"holds {len(y)} labels for the {len(x)} images of {images.name}")
    if y.max() >= _CLASSES:
        raise DataError(labels, f"holds the label {y.max()}, not below {_CLASSES}")
    if x.min() == x.max():
        raise DataError(images, f"blank: every pixel is {x.min()}")
    _refuse_other_set(name, labels, y)
    return x, y


def _refuse_other_set(name: str, path: Path, labels: np.ndarray) -> None:
    """Refuse files of one set where another was asked for: their names are the same."""
    digest = hashlib.sha256(labels.tobytes()).hexdigest()
    for other, source in SOURCES.items():
        if other != name and digest in source.labels:
            raise DataError(
                path,
                f"belongs to {other}, not {name}",
                "Keep each set in a subfolder of its own name.",
            )
