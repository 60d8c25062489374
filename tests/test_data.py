"""Data sets: the idx reader on hand-written files, lookup, download, and the real sets."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import math
import os
import pickle
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mep.data import DataError, Dataset, augmented, load, names, read_idx
from mep.data import mnist as mnist_module

STEMS = tuple(mnist_module.SOURCES["mnist"].archives)
CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}

# Labels of MNIST, counted in the published files (LeCun, Cortes & Burges).
MNIST_TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
# Mean and standard deviation of MNIST's training pixels in [0, 1], as quoted everywhere.
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


def idx_bytes(array: np.ndarray) -> bytes:
    """Encode an array after the published description of the format."""
    code = CODES[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def small_set(seed: int = 0) -> dict[str, np.ndarray]:
    """Six training and four test images with the file names of MNIST."""
    random = np.random.default_rng(seed)
    arrays = []
    for count in (6, 4):
        arrays.append(random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        arrays.append(random.integers(0, 10, count, dtype=np.uint8))
    return dict(zip(STEMS, arrays, strict=True))


def write_set(folder, arrays, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in arrays.items():
        data = idx_bytes(array)
        if compress:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (folder / stem).write_bytes(data)
    return folder


@pytest.fixture(autouse=True)
def isolated(request, tmp_path, monkeypatch):
    """Keep the user's data folder and cache out of every test that does not ask for them."""
    if "real_data" not in request.fixturenames:
        monkeypatch.delenv("MEP_DATA", raising=False)
    monkeypatch.setattr(mnist_module, "_cache_folder", lambda name: tmp_path / "cache" / name)


@pytest.fixture
def real_data():
    """The folder with the real sets, or a skip."""
    if not os.environ.get("MEP_DATA"):
        pytest.skip("MEP_DATA does not name a folder with the real data sets")


# The idx reader.


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("compress", [False, True])
def test_idx_round_trip(tmp_path, dtype, shape, compress):
    array = np.random.default_rng(1).integers(0, 100, shape).astype(dtype)
    path = tmp_path / ("a.gz" if compress else "a")
    path.write_bytes(gzip.compress(idx_bytes(array)) if compress else idx_bytes(array))
    result = read_idx(path)
    assert result.dtype == array.dtype and result.dtype.isnative
    np.testing.assert_array_equal(result, array)
    assert result.flags.writeable


def test_idx_every_truncation_is_refused(tmp_path):
    data = idx_bytes(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    path = tmp_path / "a"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match="truncated") as caught:
            read_idx(path)
        assert str(path) in str(caught.value) and "--data-dir" in str(caught.value)


def test_idx_every_gzip_truncation_is_refused(tmp_path):
    data = gzip.compress(idx_bytes(np.arange(24, dtype=np.uint8)), mtime=0)
    path = tmp_path / "a.gz"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"a\.gz: (empty|damaged)"):
            read_idx(path)


def test_idx_every_flipped_byte_of_a_gzip_body_is_refused(tmp_path):
    array = np.random.default_rng(2).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    data = gzip.compress(idx_bytes(array), mtime=0)
    path = tmp_path / "a.gz"
    for place in range(10, len(data)):  # ten bytes of gzip header, of which time and OS are free
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        with pytest.raises(DataError, match=r"a\.gz: damaged"):
            read_idx(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a", b"\x01\x00\x08\x01\x00\x00\x00\x00", "not an idx file: it begins with 01 00 08 01"),
        ("a", b"\x00\x00\x0a\x01\x00\x00\x00\x00", "unknown idx dtype code 0x0a"),
        ("a", b"\x00\x00\x08\x00", "no dimensions"),
        ("a", b"\x00\x00\x08\x01\x00\x00\x00\x01\x07\x07", "too long: .* 9 bytes, it holds 10"),
        ("a", b"\x00\x00\x0d\x02\xff\xff\xff\xff\xff\xff\xff\xff", "truncated"),
        ("a", gzip.compress(b"x", mtime=0), "not an idx file"),
        ("a.gz", b"<html>404</html>", "damaged or not a gzip file"),
    ],
)
def test_idx_wrong_header_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / name)


def test_data_error_is_a_value_error_and_pickles():
    error = DataError("some/file", "truncated")
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# Lookup.


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="digits, mnist, fashion-mnist, got 'cifar'"):
        load("cifar")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("by_environment", [False, True])
def test_local_files_are_found(tmp_path, monkeypatch, name, compress, nested, by_environment):
    arrays = small_set()
    write_set(tmp_path / name if nested else tmp_path, arrays, compress)
    if by_environment:
        monkeypatch.setenv("MEP_DATA", str(tmp_path))
    data = load(name, None if by_environment else tmp_path, download=False)
    assert data.name == name and data.classes == 10
    assert data.x_train.shape == (6, 1, 28, 28) and data.x_test.shape == (4, 1, 28, 28)
    np.testing.assert_array_equal(data.y_train, arrays[STEMS[1]])
    np.testing.assert_array_equal(data.y_test, arrays[STEMS[3]])
    pixels = arrays[STEMS[0]].astype(np.float64)
    expected = (arrays[STEMS[2]][:, None] - pixels.mean()) / pixels.std()
    # Values of order one, computed in float32 from exact integers.
    np.testing.assert_allclose(data.x_test, expected, atol=1e-5)


def labels_found(data: Dataset) -> list[int]:
    return data.y_train.tolist()


def test_lookup_order(tmp_path, monkeypatch):
    sets = {seed: small_set(seed) for seed in range(5)}
    labels = {seed: arrays[STEMS[1]].tolist() for seed, arrays in sets.items()}
    assert len({tuple(row) for row in labels.values()}) == len(labels)

    write_set(tmp_path / "cache" / "mnist", sets[0])
    assert labels_found(load("mnist", download=False)) == labels[0]
    write_set(tmp_path / "environment", sets[1])
    monkeypatch.setenv("MEP_DATA", str(tmp_path / "environment"))
    assert labels_found(load("mnist", download=False)) == labels[1]
    write_set(tmp_path / "given", sets[2])
    assert labels_found(load("mnist", tmp_path / "given")) == labels[2]
    write_set(tmp_path / "given" / "mnist", sets[3])
    assert labels_found(load("mnist", tmp_path / "given")) == labels[3]
    write_set(tmp_path / "given" / "mnist", sets[4], compress=False)
    assert labels_found(load("mnist", tmp_path / "given")) == labels[4]


def test_absent_without_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data-dir.*MEP_DATA.*mnist/"):
        load("mnist", tmp_path, download=False)


def test_named_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data folder .*typo"):
        load("mnist", tmp_path / "typo")


def test_incomplete_set_is_refused(tmp_path):
    write_set(tmp_path, small_set())
    (tmp_path / f"{STEMS[3]}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=f"only a part of mnist; missing: {STEMS[3]}"):
        load("mnist", tmp_path)


# Files that are intact but are not what their name says.


@pytest.mark.parametrize(
    ("stem", "array", "message"),
    [
        (STEMS[1], np.zeros(5, np.uint8), "5 labels for the 6 images"),
        (STEMS[1], np.full(6, 10, np.uint8), "the label 10, not below 10"),
        (STEMS[1], np.zeros(6, np.int32), "int32 of shape"),
        (STEMS[1], np.zeros((6, 28, 28), np.uint8), r"not uint8 labels \(N,\)"),
        (STEMS[0], np.zeros(6, np.uint8), r"not uint8 images \(N, 28, 28\)"),
        (STEMS[0], np.zeros((6, 8, 8), np.uint8), r"shape \(6, 8, 8\)"),
        (STEMS[0], np.zeros((0, 28, 28), np.uint8), r"shape \(0, 28, 28\)"),
        (STEMS[0], np.zeros((6, 28, 28), np.float32), "float32 of shape"),
        (STEMS[0], np.zeros((6, 28, 28), np.uint8), "blank: every pixel is 0"),
    ],
)
def test_mislabelled_file_is_refused(tmp_path, stem, array, message):
    write_set(tmp_path, {**small_set(), stem: array})
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path)
    assert f"{stem}.gz" in str(caught.value)


def test_files_of_another_set_are_refused(tmp_path, monkeypatch):
    arrays = small_set()
    digests = tuple(hashlib.sha256(arrays[s].tobytes()).hexdigest() for s in STEMS[1::2])
    fashion = mnist_module.SOURCES["fashion-mnist"]
    monkeypatch.setitem(
        mnist_module.SOURCES,
        "fashion-mnist",
        mnist_module.Source(fashion.url, fashion.archives, digests),
    )
    write_set(tmp_path, arrays)
    assert len(load("fashion-mnist", tmp_path).y_train) == 6
    with pytest.raises(DataError, match="belongs to fashion-mnist, not mnist"):
        load("mnist", tmp_path)


# Download, from a server on this machine.


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Publish a small set on a local server under the name of MNIST; give folder and arrays."""
    arrays = small_set()
    folder = write_set(tmp_path / "published", arrays)
    handler = functools.partial(QuietHandler, directory=folder)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        sums = {s: hashlib.sha256((folder / f"{s}.gz").read_bytes()).hexdigest() for s in STEMS}
        url = f"http://127.0.0.1:{server.server_port}/"
        source = mnist_module.Source(url, sums, ("", ""))
        monkeypatch.setitem(mnist_module.SOURCES, "mnist", source)
        yield folder, arrays
        server.shutdown()
        thread.join()


def test_download_is_cached(published):
    folder, arrays = published
    assert labels_found(load("mnist")) == arrays[STEMS[1]].tolist()
    for path in folder.iterdir():
        path.unlink()
    assert labels_found(load("mnist")) == arrays[STEMS[1]].tolist()
    assert labels_found(load("mnist", download=False)) == arrays[STEMS[1]].tolist()


def test_damaged_cache_is_downloaded_again(published, tmp_path):
    _, arrays = published
    load("mnist")
    (tmp_path / "cache" / "mnist" / f"{STEMS[1]}.gz").write_bytes(b"damaged")
    assert labels_found(load("mnist")) == arrays[STEMS[1]].tolist()


def test_wrong_checksum_is_refused(published, tmp_path):
    folder, arrays = published
    tampered = idx_bytes((arrays[STEMS[3]] + 1) % 10)
    (folder / f"{STEMS[3]}.gz").write_bytes(gzip.compress(tampered))
    with pytest.raises(DataError, match=f"{STEMS[3]}.gz: what was downloaded is not the published"):
        load("mnist")
    assert not (tmp_path / "cache" / "mnist" / f"{STEMS[3]}.gz").exists()


def test_failed_download_says_what_to_do(published):
    folder, _ = published
    (folder / f"{STEMS[0]}.gz").unlink()
    with pytest.raises(OSError, match=r"could not download .*404.*--data-dir.*MEP_DATA"):
        load("mnist")


# The real sets.


def check_form(data: Dataset):
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.shape[:2] == (len(y), 1) and y.shape == (len(x),)
        assert x.is_contiguous()
        assert y.unique().tolist() == list(range(data.classes))
    # float32 sums of up to 5e7 values of order one, reduced pairwise.
    assert math.isclose(data.x_train.double().mean().item(), 0, abs_tol=1e-5)
    assert math.isclose(data.x_train.double().std(correction=0).item(), 1, rel_tol=1e-5)


def test_digits():
    data = load("digits")
    check_form(data)
    assert data.x_train.shape == (1437, 1, 8, 8) and data.x_test.shape == (360, 1, 8, 8)
    assert data.y_test.bincount().tolist() == [36] * 10
    again = load("digits")
    assert torch.equal(data.x_train, again.x_train) and torch.equal(data.x_test, again.x_test)


def test_digits_split_is_disjoint_and_complete():
    data = load("digits")
    train, test = ({row.numpy().tobytes() for row in x} for x in (data.x_train, data.x_test))
    # scikit-learn's 1797 images are all different, so sets of them count images.
    assert not train & test
    assert len(train) + len(test) == 1797


def test_digits_split_is_fixed():
    # The first ten test labels, in the original order: pins the split across versions.
    assert load("digits").y_test[:10].tolist() == [3, 7, 3, 9, 0, 8, 7, 0, 8, 0]


def test_mnist(real_data):
    data = load("mnist", download=False)
    check_form(data)
    assert data.x_train.shape == (60000, 1, 28, 28) and data.x_test.shape == (10000, 1, 28, 28)
    assert data.y_train.bincount().tolist() == MNIST_TRAIN_COUNTS
    assert data.y_test.bincount().tolist() == MNIST_TEST_COUNTS
    # Black and white pixels show the mean and the deviation that were used.
    black, white = data.x_test.min().item(), data.x_test.max().item()
    assert math.isclose(black, -MNIST_MEAN / MNIST_STD, rel_tol=1e-3)
    assert math.isclose(white, (1 - MNIST_MEAN) / MNIST_STD, rel_tol=1e-3)


def test_fashion_mnist(real_data):
    data = load("fashion-mnist", download=False)
    check_form(data)
    assert data.x_train.shape == (60000, 1, 28, 28) and data.x_test.shape == (10000, 1, 28, 28)
    assert data.y_train.bincount().tolist() == [6000] * 10
    assert data.y_test.bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_files_are_told_apart(real_data, tmp_path, name):
    (other,) = {"mnist", "fashion-mnist"} - {name}
    (tmp_path / other).symlink_to(Path(os.environ["MEP_DATA"], name).resolve())
    with pytest.raises(DataError, match=f"belongs to {name}, not {other}"):
        load(other, tmp_path, download=False)


def test_names():
    assert names() == ("digits", "mnist", "fashion-mnist")


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(image, down, right):
    """The image moved, pixel by pixel."""
    found = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            r, c = row - down, column - right
            if 0 <= r < height and 0 <= c < width:
                found[:, row, column] = image[:, r, c]
    return found


def test_shifted_images_are_the_images_moved_by_every_amount_there_is():
    x = torch.rand(400, 2, 5, 4, generator=drawn()) + 1
    found = augmented(x, shift=1, flip=False, generator=drawn(1))
    ways = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    counts = dict.fromkeys(ways, 0)
    for image, new in zip(x, found, strict=True):
        (way,) = [way for way in ways if torch.equal(moved(image, *way), new)]
        counts[way] += 1
    assert min(counts.values()) > 20  # of 44 each


def test_half_of_the_images_are_mirrored():
    x = torch.rand(400, 1, 3, 4, generator=drawn())
    found = augmented(x, shift=0, flip=True, generator=drawn(1))
    same = [torch.equal(a, b) for a, b in zip(x, found, strict=True)]
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(x, found, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 150 < sum(mirrored) < 250


def test_images_may_stay_as_they_are():
    x = torch.rand(3, 7)
    assert augmented(x, shift=0, flip=False, generator=drawn()) is x


@pytest.mark.parametrize("options", [{"shift": 1, "flip": False}, {"shift": 0, "flip": True}])
def test_only_images_are_augmented(options):
    with pytest.raises(ValueError, match="need images"):
        augmented(torch.rand(3, 7), generator=drawn(), **options)
    with pytest.raises(ValueError, match="`shift` must be >= 0"):
        augmented(torch.rand(3, 1, 4, 4), shift=-1, flip=False, generator=drawn())
