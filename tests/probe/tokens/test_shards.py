"""The files of a store: tokens as the backbone computes them, kept whole through kills, damage and full disks."""

import json
import resource
import warnings

import pytest
import torch

from tests.probe.stores import CLASSES, Images, assert_equal, contents, read, store, vit
from visionattn.errors import DataError, StorageError
from visionattn.files import exclusive
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.features import LiveFeatures, StoredFeatures, estimate
from visionattn.probe.tokens.shards import PRECISIONS


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_stored_tokens_are_those_of_the_backbone(backbone, tmp_path, precision):
    dataset = Images()
    found = store(tmp_path, dataset, backbone, precision=precision)
    exact = backbone(dataset.images)
    assert found.layers == backbone.layers
    assert found.classes == CLASSES
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == [row % 3 for row in range(22)]
    assert len(found) == 22
    tolerance = {"fp32": (1e-5, 1e-5), "fp16": (1e-3, 1e-3), "bf16": (1e-2, 1e-2)}
    stored = read(found, range(22))
    assert all(part.dtype == torch.float32 for layer in stored for part in layer)
    if precision == "int8":
        for one, other in zip(stored, exact):
            for part, expected in zip(one, other):
                assert ((part - expected).abs() <= 0.01 * expected.abs().amax(-1, keepdim=True)).all()
                assert not torch.equal(part, expected)
    else:
        rtol, atol = tolerance[precision]
        assert_equal(stored, exact, rtol=rtol, atol=atol)
    assert sum(path.stat().st_size for path in found.folder.glob("*.bin")) == estimate(backbone, 22, precision)


@pytest.mark.parametrize("stop", [0, 7, 8, 13, 21])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_killed_extraction_goes_on(backbone, tmp_path, monkeypatch, stop, precision):
    whole = store(tmp_path / "whole", Images(broken=[9]), backbone, precision=precision)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "killed", Images(broken=[9], stop=stop), backbone, precision=precision)
    (folder,) = (tmp_path / "killed").iterdir()
    assert not list(folder.glob("*.part"))
    with pytest.raises(DataError, match="did not finish"):
        StoredFeatures(folder)
    # A kill by the system leaves a file half written, and files of a shard whose summary is missing.
    (folder / f"{stop // 8:06d}.0.patches.part").write_bytes(b"half")
    (folder / f"{stop // 8:06d}.0.class.bin").write_bytes(b"half")
    read_rows = []
    original = Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda self, row: (read_rows.append(row), original(self, row))[1])
    store(tmp_path / "killed", Images(broken=[9]), backbone, precision=precision)
    assert read_rows == list(range(stop // 8 * 8, 22))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert whole.skipped == [(9, "image 9 is truncated")]


def test_a_finished_store_is_only_opened(backbone, tmp_path, monkeypatch):
    first = store(tmp_path, backbone=backbone)
    before = contents(tmp_path)
    monkeypatch.setattr(Images, "__getitem__", None)
    again = store(tmp_path, backbone=backbone, shard_images=5)
    assert again.folder == first.folder
    assert contents(tmp_path) == before


def damage_byte(folder):
    path = folder / "000001.0.registers.bin"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)


def shorten(folder):
    path = folder / "000001.1.patches.bin"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    "damage",
    [
        damage_byte,
        shorten,
        lambda folder: (folder / "000001.0.class.bin").unlink(),
        lambda folder: (folder / "000001.json").write_text("{"),
        lambda folder: (folder / "000001.json").write_text("[]"),
    ],
    ids=["byte", "short", "missing", "summary", "other summary"],
)
def test_a_damaged_shard_is_found_and_computed_again(backbone, tmp_path, damage):
    found = store(tmp_path, backbone=backbone)
    before = contents(tmp_path)
    damage(found.folder)
    with pytest.raises(DataError, match=r"000001.*Call extract again"):
        StoredFeatures(found.folder)
    with pytest.warns(UserWarning, match="Shard 1 is extracted again"):
        store(tmp_path, backbone=backbone)
    assert contents(tmp_path) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store(tmp_path, backbone=backbone)


def flip_label(folder):
    path = folder / "000001.json"
    content = json.loads(path.read_text())
    content["labels"][0] = (content["labels"][0] + 1) % 3
    path.write_text(json.dumps(content))


def test_a_changed_label_is_found(backbone, tmp_path):
    found = store(tmp_path, backbone=backbone)
    before = contents(tmp_path)
    flip_label(found.folder)
    with pytest.warns(UserWarning, match="The checksum of 000001.json"):
        store(tmp_path, backbone=backbone)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("wrong", [[8], "8", 0, None, True])
def test_a_damaged_description_is_written_anew(backbone, tmp_path, wrong):
    found = store(tmp_path, backbone=backbone)
    before = contents(tmp_path)
    path = found.folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shard_images": wrong}))
    with pytest.raises(DataError, match="damaged"):
        StoredFeatures(found.folder)
    with pytest.warns(UserWarning, match="The shards that match are kept"):
        store(tmp_path, backbone=backbone)
    assert contents(tmp_path) == before


def test_files_without_checksums_of_their_own_are_read(backbone, tmp_path):
    found = store(tmp_path, backbone=backbone)
    for path in found.folder.glob("*.json"):
        content = json.loads(path.read_text())
        del content["crc32"]
        path.write_text(json.dumps(content))
    assert_equal(read(StoredFeatures(found.folder), range(22)), read(found, range(22)))


def test_shards_of_another_length_are_not_taken(backbone, tmp_path):
    found = store(tmp_path, backbone=backbone, shard_images=5)
    (found.folder / "meta.json").unlink()
    with pytest.warns(UserWarning, match="must have 8 images"):
        again = store(tmp_path, backbone=backbone)
    assert again.labels.tolist() == [row % 3 for row in range(22)]


def test_two_writers_of_a_store(backbone, tmp_path):
    found = store(tmp_path / "a", backbone=backbone)
    (tmp_path / "b").mkdir()
    with exclusive(tmp_path / "b" / found.folder.name), pytest.raises(StorageError, match="Another run is writing"):
        store(tmp_path / "b", backbone=backbone)
    with exclusive(found.folder):  # what is finished is only read
        assert len(store(tmp_path / "a", backbone=backbone)) == 22


def test_tokens_that_are_not_finite_name_the_image(tmp_path):
    dataset = Images()
    dataset.images[10, 0, 0, 0] = float("nan")
    names = [f"cat/{row}.png" for row in range(22)]
    with pytest.raises(DataError, match=r"images: cat/10.png\.$"):
        store(tmp_path, dataset, names=names)


def test_a_missing_shard(backbone, tmp_path):
    found = store(tmp_path, backbone=backbone)
    (found.folder / "000002.json").unlink()
    with pytest.raises(DataError, match="lacks shard 2"):
        StoredFeatures(found.folder)
    assert len(store(tmp_path, backbone=backbone)) == 22
    with pytest.raises(DataError, match="not a feature store"):
        StoredFeatures(tmp_path)


def test_a_shard_of_unreadable_images(backbone, tmp_path):
    found = store(tmp_path, Images(33, broken=[9, 10, 11]), backbone, shard_images=3)
    assert found.labels.tolist() == [row % 3 for row in range(33) if row not in (9, 10, 11)]
    assert len(read(found, range(30))[0][0]) == 30


def test_tokens_that_do_not_fit(tmp_path):
    model = vit()
    model.norm.weight.data[0] = 1e6
    with pytest.raises(DataError, match=r"layer blocks.2 .*maximum of fp16.*bf16 or fp32.*images: 0, 1, 2\."):
        store(tmp_path, backbone=Backbone(model, image_size=32))
    assert not list(tmp_path.rglob("*.part"))
    for precision in ("bf16", "fp32", "int8"):
        found = store(tmp_path, backbone=Backbone(model, image_size=32), precision=precision)
        assert found.batches(torch.arange(1), 1).__next__()[1][0].patches[..., 0].abs().max() > 65504
    dataset = Images()
    dataset.images[10, 0, 0, 0] = float("nan")
    for precision in PRECISIONS:
        with pytest.raises(DataError, match=r"blocks.2 are NaN .*images: 10\.$"):
            store(tmp_path / "nan", dataset, precision=precision)
    with pytest.raises(DataError, match=r"blocks.2 contain NaN .*images: 10\.$"):
        read(LiveFeatures(Backbone(vit(), image_size=32), dataset, torch.zeros(22), CLASSES), range(22))


def test_int8_as_it_is_stored(backbone, tmp_path):
    found = store(tmp_path, backbone=backbone, precision="int8")
    rows = torch.randperm(22)
    batches = zip(found.batches(rows, 5), found.stored_batches(rows, 5), strict=True)
    for (some, floats), (same, tokens, scales) in batches:
        assert torch.equal(some, same)
        for layer in zip(floats, tokens, scales, strict=True):
            for expected, numbers, by in zip(*layer, strict=True):
                assert numbers.dtype == torch.int8
                assert numbers.shape[:-1] == by.shape
                assert torch.equal(expected, numbers.float() * by[..., None])


def test_zero_tokens_in_int8(tmp_path):
    model = vit()
    torch.nn.init.zeros_(model.norm.weight)
    torch.nn.init.zeros_(model.norm.bias)
    found = store(tmp_path, backbone=Backbone(model, image_size=32), precision="int8")
    assert read(found, range(22))[0][0].abs().max() == 0


def test_a_full_disk(backbone, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # a shard's patches at one layer take 6144 bytes
    try:
        with pytest.raises(StorageError, match=r"Could not write shard 0 .*File too large. Earlier shards are kept"):
            store(tmp_path / "a", backbone=backbone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("*.part"))
    store(tmp_path / "a", backbone=backbone)
    store(tmp_path / "b", backbone=backbone)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
