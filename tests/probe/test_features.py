"""The feature store: tokens as the model computes them, kept whole through kills, damage and unreadable images."""

import json
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Dataset, Subset

from visionattn.data.sources import ReaderImages
from visionattn.errors import ConfigError, DataError, InputError, StorageError
from visionattn.probe import features
from visionattn.probe.backbone import Backbone
from visionattn.probe.features import LiveFeatures, StoredFeatures, estimate, extract, find_readable, space_line

IDENTITY = {"model": "small", "transform": "none", "dataset": "noise"}
CLASSES = ("cat", "dog", "owl")


class Images(Dataset):
    """Noise, of which some images are broken; `stop` is the row at which reading is killed."""

    def __init__(self, count=22, size=32, broken=(), stop=None):
        self.images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
        self.broken = broken
        self.stop = stop

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        if row == self.stop:
            raise KeyboardInterrupt
        if row in self.broken:
            raise (OSError, SyntaxError, DataError)[row % 3](f"image {row} is truncated")
        return self.images[row], row % 3


def vit(reg_tokens=0, class_token=True, **options):
    pool = "token" if class_token else "avg"
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, **options}
    model = VisionTransformer(reg_tokens=reg_tokens, class_token=class_token, global_pool=pool, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def small(name, size, **options):
    return timm.create_model(name, **options).eval(), torch.randn(2, 3, size, size)


def store(folder, dataset=None, backbone=None, **options):
    backbone = backbone or Backbone(vit(), image_size=32)
    options = {"identity": IDENTITY, "classes": CLASSES, "batch_size": 3, "shard_images": 8, **options}
    return extract(backbone, Images() if dataset is None else dataset, folder, **options)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone(vit(reg_tokens=2), [0, -1], image_size=32)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def read(found, rows, batch_size=5):
    """All rows at once: a list of tokens a layer, each a list of parts."""
    batches = list(found.batches(torch.as_tensor(rows), batch_size))
    assert torch.cat([some for some, _ in batches]).tolist() == list(rows)
    layers = zip(*(tokens for _, tokens in batches))
    return [[None if p[0] is None else torch.cat(p) for p in zip(*layer)] for layer in layers]


def assert_equal(ours, theirs, **tolerance):
    for one, other in zip(ours, theirs, strict=True):
        for part, expected in zip(one, other, strict=True):
            assert (part is None) == (expected is None)
            if part is not None:
                torch.testing.assert_close(part, expected, **(tolerance or {"rtol": 0, "atol": 0}))


# --- the backbone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("reg_tokens", "class_token"), [(0, True), (4, True), (4, False), (0, False)])
def test_a_vit_gives_its_own_tokens_apart(dtype, reg_tokens, class_token):
    model = vit(reg_tokens, class_token).to(dtype)
    found = Backbone(model, image_size=32)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    (tokens,) = found(images)
    expected = model.forward_features(images)
    assert found.layers[0].has_class is class_token
    assert found.layers[0].num_registers == reg_tokens
    assert found.layers[0].grid == (4, 4)
    parts = [tokens.class_token.unsqueeze(1)] if class_token else []
    parts += [tokens.registers] if reg_tokens else []
    assert torch.equal(torch.cat([*parts, tokens.patches], 1), expected)
    assert not tokens.patches.requires_grad
    assert not tokens.patches.is_inference()


def test_layers_in_the_order_asked_before_and_after_the_norm():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    after = Backbone(model, [-1, 0, 1], image_size=32)
    before = Backbone(model, [-1, 0, 1], norm=False, image_size=32)
    assert [layer.name for layer in after.layers] == ["blocks.2", "blocks.0", "blocks.1"]
    outputs = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[-1])) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    for index, raw, normed in zip((2, 0, 1), before(images), after(images)):
        assert torch.equal(raw.patches, outputs[index][:, 1:])
        assert torch.equal(raw.class_token, outputs[index][:, 0])
        torch.testing.assert_close(normed.patches, model.norm(outputs[index])[:, 1:])


def test_a_non_square_image_is_read_row_by_row():
    model = vit(img_size=(16, 40))
    found = Backbone(model, image_size=(16, 40))
    images = torch.randn(2, 3, 16, 40)
    assert found.layers[0].grid == (2, 5)
    maps = model.forward_intermediates(images, indices=[2], norm=True, intermediates_only=True)[0]
    assert torch.equal(found(images)[0].patches, maps.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "size", "layers", "dims"),
    [
        ("convnext_atto", 64, [0, -1], [40, 320]),  # (B, C, H, W)
        ("test_mambaout", 64, [0, -1], [16, 64]),  # (B, H, W, C)
        ("resnet10t", 64, [0, 2, -1], [64, 128, 512]),
        ("efficientnet_lite0", 64, [0, -1], [16, 1280]),  # a convolution behind the last stage
        ("va_halonet_nano_32", 32, [-1], [128]),
    ],
)
def test_maps_become_the_tokens_of_forward_features(name, size, layers, dims):
    model, images = small(name, size)
    found = Backbone(model, layers, image_size=size)
    assert [layer.dim for layer in found.layers] == dims
    tokens = found(images)
    for layer, one in zip(found.layers, tokens):
        assert one.patches.shape == (2, layer.grid[0] * layer.grid[1], layer.dim)
        assert one.class_token is None
        assert one.registers is None
    expected = model.forward_features(images.contiguous(memory_format=torch.channels_last))
    flat = expected.flatten(1, 2) if name == "test_mambaout" else expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[-1].patches, flat, rtol=1e-5, atol=1e-6)


def test_our_vit_keeps_its_class_token_apart():
    model, images = small("va_minimal_vit_nano_patch4_32_minimum", 32)
    (tokens,) = Backbone(model, image_size=32)(images)
    assert torch.equal(torch.cat([tokens.class_token[:, None], tokens.patches], 1), model.forward_features(images))


def test_the_backbone_stands_still():
    model, images = small("resnet10t", 64, drop_rate=0.5)
    found = Backbone(model, image_size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = found(images)[0].patches
    model.train()
    assert torch.equal(found(images)[0].patches, first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_autocast_computes_in_the_given_dtype():
    model = vit()
    (tokens,) = Backbone(model, norm=False, image_size=32, autocast=torch.bfloat16)(torch.randn(2, 3, 32, 32))
    (exact,) = Backbone(model, norm=False, image_size=32)(torch.randn(2, 3, 32, 32))
    assert not torch.equal(tokens.patches, exact.patches)
    assert tokens.patches.float().isfinite().all()


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (lambda: torch.nn.Linear(3, 3), {}, "no forward_intermediates"),
        (vit, {"layers": [3]}, "layers 0 to 2"),
        (vit, {"layers": []}, "layers 0 to 2"),
        (vit, {"image_size": 40}, "40 x 40 pixels"),
        (lambda: timm.create_model("hiera_tiny_224"), {"image_size": 224}, "norm=False"),
    ],
)
def test_what_cannot_be_probed(build, options, words):
    with pytest.raises(InputError, match=words):
        Backbone(build(), **{"image_size": 32, **options})


def test_a_backbone_without_patches():
    model = vit()
    model.forward_intermediates = lambda x, indices=None, norm=False, output_fmt="", intermediates_only=False: (
        [x.mean((2, 3))] if intermediates_only else (None, [x.mean((2, 3))])
    )
    with pytest.raises(InputError, match="no patch tokens"):
        Backbone(model, image_size=32)


def test_images_of_another_size():
    with pytest.raises(InputError, match=r"\(B, C, 32, 32\)"):
        Backbone(vit(), image_size=32)(torch.zeros(1, 3, 40, 40))


# --- the store --------------------------------------------------------------------------------------------------------


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


def test_a_missing_shard(backbone, tmp_path):
    found = store(tmp_path, backbone=backbone)
    (found.folder / "000002.json").unlink()
    with pytest.raises(DataError, match="lacks shard 2"):
        StoredFeatures(found.folder)
    assert len(store(tmp_path, backbone=backbone)) == 22
    with pytest.raises(DataError, match="no feature store"):
        StoredFeatures(tmp_path)


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
    with pytest.raises(DataError, match="Image 3 cannot be read: image 3 is truncated find_readable"):
        read(LiveFeatures(backbone, dataset, torch.zeros(30), CLASSES), range(6))


def test_a_shard_of_unreadable_images(backbone, tmp_path):
    found = store(tmp_path, Images(33, broken=[9, 10, 11]), backbone, shard_images=3)
    assert found.labels.tolist() == [row % 3 for row in range(33) if row not in (9, 10, 11)]
    assert len(read(found, range(30))[0][0]) == 30


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
    with pytest.raises(DataError, match=r"More than 10% of the 22 images.*image 1: image 1 is truncated"):
        store(tmp_path, Images(broken=[1, 2, 15]), backbone)
    with pytest.raises(DataError, match="More than 10%"):
        find_readable(Images(broken=[1, 2, 15]))
    assert not list(tmp_path.rglob("*.part"))


def test_tokens_that_do_not_fit(tmp_path):
    model = vit()
    model.norm.weight.data[0] = 1e6
    with pytest.raises(DataError, match=r"layer blocks.2 .*beyond fp16.*bf16 or fp32.*images: 0, 1, 2\."):
        store(tmp_path, backbone=Backbone(model, image_size=32))
    assert not list(tmp_path.rglob("*.part"))
    for precision in ("bf16", "fp32", "int8"):
        found = store(tmp_path, backbone=Backbone(model, image_size=32), precision=precision)
        assert found.batches(torch.arange(1), 1).__next__()[1][0].patches[..., 0].abs().max() > 65504
    dataset = Images()
    dataset.images[10, 0, 0, 0] = float("nan")
    for precision in features.PRECISIONS:
        with pytest.raises(DataError, match=r"blocks.2 are NaN .*images: 10\.$"):
            store(tmp_path / "nan", dataset, precision=precision)
    with pytest.raises(DataError, match=r"blocks.2 are NaN .*images: \[10, 11, 12, 13, 14\]"):
        read(LiveFeatures(Backbone(vit(), image_size=32), dataset, torch.zeros(22), CLASSES), range(22))


def test_zero_tokens_in_int8(tmp_path):
    model = vit()
    torch.nn.init.zeros_(model.norm.weight)
    torch.nn.init.zeros_(model.norm.bias)
    found = store(tmp_path, backbone=Backbone(model, image_size=32), precision="int8")
    assert read(found, range(22))[0][0].abs().max() == 0


def test_bad_arguments(backbone, tmp_path):
    with pytest.raises(ConfigError, match="fp16, bf16, fp32, int8"):
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


def test_worker_processes_change_nothing(backbone, tmp_path):
    store(tmp_path / "one", Images(broken=[9]), backbone)
    store(tmp_path / "two", Images(broken=[9]), backbone, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(InputError) as caught:
        store(tmp_path / "bad", Images(size=40), backbone, num_workers=1)
    assert "Traceback" not in str(caught.value)


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


def test_a_full_disk(backbone, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # a shard's patches at one layer take 6144 bytes
    try:
        with pytest.raises(StorageError, match=r"Could not write shard 0 .*File too large. The shards before it stay"):
            store(tmp_path / "a", backbone=backbone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("*.part"))
    store(tmp_path / "a", backbone=backbone)
    store(tmp_path / "b", backbone=backbone)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
