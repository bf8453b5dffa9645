"""Loading: images that cannot be read are left out and listed."""

import json

import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from tests.probe.stores import CLASSES, Images, assert_equal, contents, read, store
from visionattn.data.classify.sources import ReaderImages
from visionattn.errors import DataError, InputError
from visionattn.probe.tokens.features import LiveFeatures
from visionattn.probe.tokens.loading import find_readable


def test_unreadable_images_are_left_out_and_listed(backbone, tmp_path):
    dataset = Images(30, broken=[3, 4, 5])  # a whole batch
    found = store(tmp_path, dataset, backbone, precision="fp32")
    good = [row for row in range(30) if row not in (3, 4, 5)]
    assert found.labels.tolist() == [row % 3 for row in good]
    assert found.skipped == [(row, f"image {row} is truncated") for row in (3, 4, 5)]
    meta = json.loads((found.folder / "meta.json").read_text())
    assert meta["skipped"] == [list(one) for one in found.skipped]
    assert meta["readable"] == 27
    assert_equal(
        read(found, range(27)), [[p[good] for p in one] for one in backbone(dataset.images)], rtol=1e-5, atol=1e-5
    )

    readable = find_readable(dataset)
    assert readable.rows.tolist() == good
    assert torch.equal(readable.labels, found.labels)
    assert readable.skipped == found.skipped
    live = LiveFeatures(backbone, Subset(dataset, good), readable.labels, CLASSES)
    assert_equal(read(live, range(27)), read(found, range(27)), rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="Image 3 cannot be read: image 3 is truncated Use only"):
        read(LiveFeatures(backbone, dataset, torch.zeros(30), CLASSES), range(6))


def test_truncated_files_of_a_folder(tmp_path):
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    for number in range(12):
        Image.effect_noise((32, 32), 60).convert("RGB").save(folder / f"{number:02}.jpg")
    data = (folder / "05.jpg").read_bytes()
    (folder / "05.jpg").write_bytes(data[: len(data) // 2])
    source = ReaderImages(timm.data.create_dataset("", root=str(folder.parent), search_split=False).reader)

    class Tensors(Dataset):
        def __len__(self):
            return len(source)

        def __getitem__(self, row):
            image, label = source[row]
            return timm.data.create_transform((3, 32, 32))(image), label

    found = store(tmp_path / "store", Tensors())
    assert len(found) == 11
    ((row, reason),) = found.skipped
    assert row == 5
    assert "05.jpg" in reason


def test_too_many_unreadable_images(backbone, tmp_path):
    broken = [1, 2, 15, 16, 17, 18]
    with pytest.raises(DataError, match=r"6 of the 22 images cannot be read.*image 1: image 1 is truncated"):
        store(tmp_path, Images(broken=broken), backbone)
    with pytest.raises(DataError, match="6 of the 22 images"):
        find_readable(Images(broken=broken))
    assert len(find_readable(Images(broken=broken[:5])).rows) == 17  # a handful may be unreadable in any data set
    assert not list(tmp_path.rglob("*.part"))


def test_worker_processes_change_nothing(backbone, tmp_path):
    store(tmp_path / "one", Images(broken=[9]), backbone)
    store(tmp_path / "two", Images(broken=[9]), backbone, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(InputError) as caught:
        store(tmp_path / "bad", Images(size=40), backbone, num_workers=1)
    assert "Traceback" not in str(caught.value)
