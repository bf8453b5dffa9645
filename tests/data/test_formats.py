"""The embedded digits, IDX files and CIFAR sheets."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.models.cifar_sheets import CLASSES, load_cifar10_sheets
from tools import class_folders
from visionattn.data.classify.datamodule import ClassifyData
from visionattn.data.classify.digits import load_digits
from visionattn.data.classify.mnist import load_mnist, read_idx
from visionattn.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared/data"


def shared(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


def test_digits_are_split_by_class_and_without_overlap():
    parts = {split: load_digits(split) for split in ("train", "val", "test")}
    assert {split: images.shape for split, (images, _) in parts.items()} == {
        "train": (1077, 8, 8),
        "val": (360, 8, 8),
        "test": (360, 8, 8),
    }
    assert all(images.dtype == np.uint8 and labels.dtype == np.int64 for images, labels in parts.values())
    counts = np.stack([np.bincount(labels, minlength=10) / len(labels) for _, labels in parts.values()])
    assert np.ptp(counts, axis=0).max() < 0.004
    seen = [image.tobytes() for images, _ in parts.values() for image in images]
    assert len(seen) == 1797
    assert parts["train"][0].max() == 255
    # The split is part of every result: it must not move.
    assert parts["test"][1][:12].tolist() == [8, 8, 6, 3, 3, 2, 2, 2, 5, 5, 5, 5]


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, packed, train=5007, test=3):
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (train, 4, 4), np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, train, np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (test, 4, 4), np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, test, np.uint8),
    }
    for name, array in arrays.items():
        (folder / (name + ".gz" if packed else name)).write_bytes(
            gzip.compress(idx(array), 1) if packed else idx(array)
        )
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path, packed):
    arrays = write_mnist(tmp_path, packed)
    images, labels = load_mnist(tmp_path, "test")
    assert np.array_equal(images, arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(labels, arrays["t10k-labels-idx1-ubyte"])
    train, val = load_mnist(tmp_path, "train"), load_mnist(tmp_path, "val")
    assert (len(train[0]), len(val[0])) == (7, 5000)
    assert np.array_equal(np.concatenate([train[0], val[0]]), arrays["train-images-idx3-ubyte"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file of unsigned bytes: it begins with nothing"),
        (b"\x89PNG....", "is not an IDX file of unsigned bytes: it begins with 89 50 4e 47"),
        (struct.pack(">4I", 0x803, 2, 4, 4), "must hold 32 bytes for shape .2, 4, 4.; it holds 0"),
        (struct.pack(">2I", 0x803, 2), "ends inside its header"),
    ],
)
def test_wrong_idx_files(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        read_idx(path)


def test_missing_and_mixed_idx_files(tmp_path):
    with pytest.raises(DataError, match=r"No file t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz in"):
        load_mnist(tmp_path, "test")
    write_mnist(tmp_path, packed=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    with pytest.raises(DataError, match=r"differ in number"):
        load_mnist(tmp_path, "test")
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"12345678")[:-6])
    with pytest.raises(DataError, match=r"Could not read the IDX file"):
        read_idx(tmp_path / "broken.gz")


def test_shared_mnist():
    images, labels = load_mnist(shared("mnist"), "test")
    assert images.shape == (10000, 28, 28)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def write_cifar(folder, sheets=2):
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (sheets, 25, 40, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, 50000, np.uint8)
    for number in range(sheets):
        sheet = tiles[number].swapaxes(1, 2).reshape(800, 1280, 3)
        Image.fromarray(sheet).save(folder / f"train_{number:02}.webp", lossless=True, method=0)
    np.savez(folder / "labels.npz", train=labels)
    with zipfile.ZipFile(folder / "test_jpeg.zip", "w") as archive:
        for name in ("truck", "airplane"):
            for number in range(2):
                file = io.BytesIO()
                Image.new("RGB", (32, 32), (100 * number, 0, 0)).save(file, "JPEG")
                archive.writestr(f"{name}/{number:04}.jpg", file.getvalue())
    return tiles.reshape(sheets * 1000, 32, 32, 3), labels


def test_cifar_sheets(tmp_path):
    tiles, labels = write_cifar(tmp_path)
    for split, part in {"train": slice(0, 1000), "val": slice(1000, 2000)}.items():
        images, found = load_cifar10_sheets(tmp_path, split)
        assert np.array_equal(images, tiles[part])
        assert np.array_equal(found, labels[part])
    images, found = load_cifar10_sheets(tmp_path, "test")
    assert [CLASSES[label] for label in found] == ["airplane", "airplane", "truck", "truck"]
    assert np.abs(images[:, 0, 0, 0].astype(int) - [0, 100, 0, 100]).max() <= 3


def test_wrong_cifar_sheets(tmp_path):
    with pytest.raises(DataError, match=r"holds 0 sheets train_NN.webp; at least two"):
        load_cifar10_sheets(tmp_path, "train")
    with pytest.raises(DataError, match=r"Could not read the test images .*test_jpeg.zip"):
        load_cifar10_sheets(tmp_path, "test")
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"train_0{number}.webp")
    with pytest.raises(DataError, match=r"Could not read the array 'train' of"):
        load_cifar10_sheets(tmp_path, "train")
    np.savez(tmp_path / "labels.npz", train=np.zeros(50000, np.uint8))
    with pytest.raises(DataError, match=r"train_00.webp has 64 x 64 pixels; a sheet has 1280 x 800"):
        load_cifar10_sheets(tmp_path, "train")


def test_sheets_become_a_folder_of_images(tmp_path, monkeypatch):
    (tmp_path / "sheets").mkdir()
    tiles, labels = write_cifar(tmp_path / "sheets")
    output = tmp_path / "images"
    words = ["class_folders", "cifar10", "--root", str(tmp_path / "sheets"), "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    class_folders.main()
    assert len(list(output.rglob("*.png"))) == 2004
    written = np.asarray(Image.open(output / "val" / CLASSES[labels[1007]] / "00007.png"))
    assert np.array_equal(written, tiles[1007])
    data = ClassifyData("folder", str(output))
    assert (data.class_names, data.describe("val")[:25]) == (sorted(CLASSES), "1,000 images in 10 classe")


def test_the_old_name_of_the_sheets_says_what_to_use(tmp_path):
    with pytest.raises(ConfigError, match="use 'torch/cifar10' with torchvision's files"):
        ClassifyData("cifar10-sheets", str(tmp_path))


def test_shared_cifar():
    folder = shared("cifar10")
    images, labels = load_cifar10_sheets(folder, "val")
    assert images.shape == (1000, 32, 32, 3)
    assert np.abs(images.mean(axis=(0, 1, 2)) / 255 - [0.4914, 0.4822, 0.4465]).max() < 0.02
    with np.load(folder / "labels.npz") as arrays:
        assert np.array_equal(labels, arrays["train"][-1000:])
