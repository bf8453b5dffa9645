"""Features: the same tokens live and stored, in any order, and each store under its own name."""

import json
import shutil

import pytest
import timm
import torch

from tests.probe.stores import CLASSES, IDENTITY, Images, assert_equal, read, store, vit
from visionattn.errors import ConfigError, DataError, InputError, StorageError
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.features import LiveFeatures, estimate, space_line


def test_shuffled_and_repeated_rows(backbone, tmp_path):
    found = store(tmp_path, backbone=backbone)
    rows = [*torch.randperm(22).tolist(), 3, 3, 21]
    everything = read(found, range(22))
    for batch_size in (1, 7, 100):
        assert_equal(read(found, rows, batch_size), [[part[rows] for part in layer] for layer in everything])
    assert list(found.batches(torch.tensor([], dtype=torch.int64), 4)) == []
    with pytest.raises(InputError, match="0 to 21"):
        next(found.batches(torch.tensor([22]), 4))


def test_live_equals_stored(backbone, tmp_path):
    dataset = Images()
    labels = torch.arange(22) % 3
    live = LiveFeatures(backbone, dataset, labels, CLASSES)
    stored = store(tmp_path, dataset, backbone, precision="fp32")
    assert live.layers == stored.layers
    assert live.classes == stored.classes
    assert torch.equal(live.labels, stored.labels)
    rows = torch.randperm(22).tolist()
    assert_equal(read(live, rows), read(stored, rows), rtol=1e-5, atol=1e-5)
    # In the batches of the extraction, to the last bit.
    assert_equal(read(live, range(3), 3), read(stored, range(3), 3))


def test_live_tokens_can_be_trained_on(backbone):
    live = LiveFeatures(backbone, Images(), torch.arange(22) % 3, CLASSES)
    head = torch.nn.Linear(24, 3)
    _, (_, tokens) = next(live.batches(torch.arange(4), 4))
    head(tokens.patches).sum().backward()
    torch.testing.assert_close(head.weight.grad[0], tokens.patches.sum((0, 1)))


def test_the_random_state_is_left_alone(backbone, tmp_path):
    before = torch.get_rng_state()
    store(tmp_path, backbone=backbone)
    list(LiveFeatures(backbone, Images(), torch.arange(22) % 3, CLASSES).batches(torch.arange(4), 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_makes_another_store(tmp_path):
    model = vit()
    base = store(tmp_path, backbone=Backbone(model, image_size=32)).folder
    folders = [
        store(tmp_path, backbone=Backbone(model, [0], image_size=32)).folder,
        store(tmp_path, backbone=Backbone(model, norm=False, image_size=32)).folder,
        store(tmp_path, backbone=Backbone(model, image_size=32, autocast=torch.bfloat16)).folder,
        store(tmp_path, backbone=Backbone(model, image_size=32), precision="int8").folder,
        store(tmp_path, Images(21), Backbone(model, image_size=32)).folder,
        *(
            store(tmp_path, backbone=Backbone(model, image_size=32), identity={**IDENTITY, k: "b"}).folder
            for k in IDENTITY
        ),
    ]
    model.norm.weight.data[0] += 1
    folders.append(store(tmp_path, backbone=Backbone(model, image_size=32)).folder)
    assert len({base, *folders}) == 10
    identity = json.loads((base / "meta.json").read_text())["identity"]
    expected = {**IDENTITY, "layers": [2], "norm": True, "resolution": [32, 32], "images": 22, "precision": "fp16"}
    assert {key: identity[key] for key in expected} == expected
    assert len(identity["weights"]) == 64


def test_bad_arguments(backbone, tmp_path):
    with pytest.raises(ConfigError, match="'fp16', 'bf16', 'fp32', 'int8'"):
        store(tmp_path, backbone=backbone, precision="fp8")
    with pytest.raises(ConfigError, match=r"lacks .'transform', 'dataset'"):
        store(tmp_path, backbone=backbone, identity={"model": "small"})
    with pytest.raises(DataError, match="no images"):
        store(tmp_path, Images(0), backbone)
    with pytest.raises(DataError, match="the label 2; there are 2 classes"):
        store(tmp_path, backbone=backbone, classes=("cat", "dog"))
    with pytest.raises(InputError, match=r"tensors \(C, 32, 32\).*image 0 is \(3, 40, 40\)"):
        store(tmp_path, Images(size=40), backbone)
    with pytest.raises(InputError, match="5 labels for 22 images"):
        LiveFeatures(backbone, Images(), torch.zeros(5), CLASSES)


def test_estimate():
    with torch.device("meta"):
        plain = timm.create_model("vit_base_patch16_224", class_token=False, global_pool="avg")
        whole = timm.create_model("vit_base_patch16_224", reg_tokens=4)
    imagenet = 1_281_167
    assert estimate(Backbone(plain, image_size=224), imagenet, "fp16") == 385_703_012_352 == imagenet * 196 * 768 * 2
    found = Backbone(whole, [0, -1], image_size=224)
    assert estimate(found, 10, "fp32") == 2 * 10 * (196 + 1 + 4) * 768 * 4
    assert estimate(found, 10, "int8") == 2 * 10 * (196 + 1 + 4) * (768 + 2)


def test_no_room(backbone, tmp_path, monkeypatch):
    line = space_line(backbone, 10_000_000, "fp16", tmp_path / "none" / "yet")
    assert line.startswith("Tokens of 10,000,000 images (blocks.0 4x4x24, blocks.2 4x4x24) in fp16: 18 GB; free: ")
    free = estimate(backbone, 22, "fp16")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free - 1))
    with pytest.raises(StorageError, match=r"LiveFeatures.*int8"):
        store(tmp_path / "store", backbone=backbone)
    assert not list(tmp_path.rglob("*.bin"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    assert len(store(tmp_path / "store", backbone=backbone)) == 22
