"""Pairs of pictures: alignment, determinism under workers, folders and what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")

from visionattn.data.images import find_images, pair_by_name, read_rgb
from visionattn.data.restore.bicubic import downscale
from visionattn.data.restore.datamodule import CropsByArea, Degradation, Pair, RandomPatches, RestoreData
from visionattn.data.restore.degradation import compress
from visionattn.errors import ConfigError, DataError, InputError


def pictures(folder, sizes, seed=0):
    """Smooth colour pictures with some detail."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number, (height, width) in enumerate(sizes):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")


@pytest.fixture
def folders(tmp_path):
    pictures(tmp_path / "train", [(64, 48), (40, 56), (48, 48)])
    pictures(tmp_path / "val", [(33, 42), (50, 21)], seed=1)
    return tmp_path


def opened(folders, **settings):
    settings = {"scale": 2, "patch_size": 8, "epoch_crops": 24, "batch_size": 4, **settings}
    data = RestoreData(train=str(folders / "train"), val=str(folders / "val"), **settings)
    data.setup("fit")
    data.setup("test")
    return data


def all_patches(data):
    return [torch.cat(parts) for parts in zip(*[batch[:2] for batch in data.train_dataloader()])]


def orientations(image):
    """The eight of (3, H, W)."""
    return [torch.rot90(view, turns, (1, 2)) for view in (image, image.flip(2)) for turns in range(4)]


def test_patches_belong_together(folders):
    data = opened(folders)
    pairs = [data._pairs["train"][index][0] for index in range(3)]
    for pair in pairs:
        assert np.array_equal(pair.small, downscale(pair.large, 2))
    views = [
        (view_small, view_large)
        for pair in pairs
        for view_small, view_large in zip(*(orientations(torch.tensor(p).permute(2, 0, 1)) for p in pair))
    ]
    small, large = all_patches(data)
    assert small.shape == (24, 3, 8, 8)
    assert large.shape == (24, 3, 16, 16)
    assert small.dtype == large.dtype == torch.uint8
    for s, l in zip(small, large):
        found = []
        for number, (view, view_large) in enumerate(views):
            windows = view.unfold(1, 8, 1).unfold(2, 8, 1)  # (3, y, x, 8, 8)
            for y, x in (windows == s[:, None, None]).all(-1).all(-1).all(0).nonzero().tolist():
                assert torch.equal(view_large[:, 2 * y : 2 * y + 16, 2 * x : 2 * x + 16], l)
                found.append(number)
        assert found


def test_all_orientations_occur():
    small = np.arange(16, dtype=np.uint8).reshape(4, 4, 1).repeat(3, axis=2)
    pair = Pair(small, small.repeat(2, axis=0).repeat(2, axis=1))
    draw = RandomPatches(4, 2, Degradation(0, 0, None))
    seen = set()
    for _ in range(200):
        s, l = draw(pair)
        assert torch.equal(s.repeat_interleave(2, 1).repeat_interleave(2, 2), l)
        seen.add(tuple(s[0].flatten().tolist()))
    assert seen == {tuple(view[0].flatten().tolist()) for view in orientations(torch.tensor(small).permute(2, 0, 1))}


@pytest.mark.parametrize("settings", [{"num_workers": 2}, {"memory_gb": 0.0}])
def test_patches_depend_on_the_seed_only(folders, settings):
    expected = all_patches(opened(folders))
    assert all(torch.equal(*parts) for parts in zip(expected, all_patches(opened(folders, **settings))))
    assert not torch.equal(expected[0], all_patches(opened(folders, seed=1))[0])


def test_epochs_differ_and_a_resumed_one_goes_on(folders):
    data = opened(folders)
    loader = data.train_dataloader()
    first = [batch[0] for batch in loader]
    loader.sampler.set_epoch(1)
    second = []
    for number, batch in enumerate(loader):
        second.append(batch[0])
        if number == 1:
            place = loader.state_dict()
    assert not torch.equal(first[0], second[0])
    resumed = opened(folders).train_dataloader()
    resumed.load_state_dict(place)
    assert all(torch.equal(*pair) for pair in zip([batch[0] for batch in resumed], second[2:], strict=True))


def test_large_pictures_give_more_patches():
    pairs = list(zip("abc"))
    crops = CropsByArea(pairs, [100, 50, 250], 16)
    assert [crops[index][0] for index in range(len(crops))] == list("aaaabbcccccccccc")


def test_whole_pictures_are_shown_once(folders):
    data = opened(folders)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        assert [tuple(small.shape) for small, _, _ in batches] == [(1, 3, 16, 21), (1, 3, 25, 10)]
        assert [tuple(large.shape) for _, large, _ in batches] == [(1, 3, 32, 42), (1, 3, 50, 20)]
        assert [number.item() for *_, number in batches] == [0, 1]
        picture = read_rgb(folders / "val/0.png")[:32]
        assert np.array_equal(batches[0][1][0].permute(1, 2, 0), picture)
        assert np.array_equal(batches[0][0][0].permute(1, 2, 0), downscale(picture, 2))


def test_what_is_no_picture_is_told(folders):
    (folders / "train" / "a.heic").touch()
    (folders / "train" / "sub").mkdir()
    assert opened(folders).left_out() == [f"{folders / 'train'}: 1 in sub-folders (sub), 1 with suffix .heic (a.heic)"]


def test_given_small_pictures(folders):
    (folders / "small").mkdir()
    for number, path in enumerate(find_images(folders / "train")):
        name = path.name if number else "0x2.png"
        Image.fromarray(255 - downscale(read_rgb(path), 2)).save(folders / "small" / name)
    data = opened(folders, train_small=[str(folders / "small")])
    expected = all_patches(opened(folders))
    found = all_patches(data)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], 255 - expected[0])
    assert pair_by_name([folders / "train/1.png"], folders / "small", 2) == [folders / "small/1.png"]


def test_degradations_are_seeded_and_leave_the_target(folders):
    plain = all_patches(opened(folders))
    for settings in ({"blur": 2.0}, {"noise": 20.0}, {"jpeg": 20}, {"blur": 1.0, "noise": 5.0, "jpeg": 50}):
        first, second = (all_patches(opened(folders, **settings)) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert not torch.equal(first[0], plain[0])
        assert torch.equal(first[1], plain[1])
        close = (first[0].float() - plain[0].float()).abs().mean()
        assert 0.1 < close < 40


def test_validation_images_after_jpeg(folders):
    plain, coded = (list(opened(folders, **settings).val_dataloader()) for settings in ({}, {"val_jpeg": 50}))
    for (small, large, _), (found, same, _) in zip(plain, coded, strict=True):
        assert torch.equal(large, same)
        expected = compress(small[0].permute(1, 2, 0).numpy(), 50)
        assert np.array_equal(found[0].permute(1, 2, 0), expected)
        assert not torch.equal(found, small)


def test_noise_has_the_drawn_strength():
    np.random.seed(0)
    grey = np.full((64, 64, 3), 128, np.uint8)
    found = [Degradation(0, 10, None).after(grey).std() for _ in range(200)]
    assert np.mean(found) == pytest.approx(5, rel=0.15)
    assert max(found) < 10.5


def test_too_small_pictures_are_left_out(folders):
    with pytest.warns(UserWarning, match=r"1 of 3 training images have less than 48 pixels per side .*1\.png"):
        data = opened(folders, patch_size=24)
    assert len(data._pairs["train"]) == 2
    with pytest.raises(DataError, match=r"No training image has at least 200 pixels per side"):
        opened(folders, patch_size=100)


def test_whatever_pillow_reads(tmp_path):
    for suffix in ("png", "jpg", "webp", "bmp", "tiff"):
        Image.new("RGB", (16, 12), (10, 20, 30)).save(tmp_path / f"{suffix}.{suffix}")
    Image.new("L", (16, 12), 7).save(tmp_path / "grey.PNG")
    Image.new("RGBA", (16, 12), (1, 2, 3, 0)).save(tmp_path / "alpha.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    found = {path.name: read_rgb(path) for path in find_images(tmp_path)}
    assert sorted(found) == ["alpha.png", "bmp.bmp", "grey.PNG", "jpg.jpg", "png.png", "tiff.tiff", "webp.webp"]
    assert {image.shape for image in found.values()} == {(12, 16, 3)}
    assert found["grey.PNG"][0, 0].tolist() == [7, 7, 7]
    assert found["alpha.png"][0, 0].tolist() == [1, 2, 3]


def test_wrong_input(folders):
    with pytest.raises(ConfigError, match=r"set data\.train to a folder"):
        RestoreData(val=str(folders / "val"), scale=2).setup("fit")
    with pytest.raises(ConfigError, match=r"data\.scale must be given"):
        opened(folders, scale=None)
    with pytest.raises(DataError, match=r"There is no folder nowhere"):
        RestoreData(train="nowhere", val="nowhere", scale=2).setup("fit")
    with pytest.raises(ConfigError, match=r"one folder for each in data\.train \(1\), in the same order; got 2"):
        opened(folders, train_small=["a", "b"])
    with pytest.raises(ConfigError, match=r"are not degraded"):
        opened(folders, train_small=["a"], noise=3.0)
    with pytest.raises(ConfigError, match=r"a quality from 1 to 94"):
        opened(folders, jpeg=99)
    with pytest.raises(ConfigError, match=r"val_jpeg must be a quality from 1 to 100; got 0"):
        opened(folders, val_jpeg=0)
    with pytest.raises(ConfigError, match=r"epoch_crops must be at least data\.batch_size \(4\); got 2"):
        opened(folders, epoch_crops=2).train_dataloader()
    with pytest.raises(DataError, match=r"has no low-resolution images for 2\.png"):
        (folders / "train/2.png").rename(folders / "2.png")
        (folders / "some").mkdir()
        for name in ("0.png", "1.png"):
            Image.fromarray(downscale(read_rgb(folders / "train" / name), 2)).save(folders / "some" / name)
        (folders / "2.png").rename(folders / "train/2.png")
        opened(folders, train_small=str(folders / "some"))
    with pytest.raises(InputError, match=r"0\.png downscaled 4 times; got 32 x 24 for 64 x 48"):
        Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(folders / "some/2.png")
        opened(folders, scale=4, patch_size=4, train_small=str(folders / "some"))


@pytest.mark.parametrize("memory_gb", [0.0, 1.0])
def test_damaged_and_deep_pictures_are_skipped_and_named(folders, memory_gb):
    whole = (folders / "train/1.png").read_bytes()
    (folders / "train/1.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(folders / "train/3.png")
    (folders / "train/4.png").write_bytes(b"no image")
    data = opened(folders, memory_gb=memory_gb)
    assert data.describe("train") == "4 pictures, 24 patches per epoch"
    list(data.train_dataloader())
    found = {why.partition(".png")[0].rpartition("/")[2]: why for why in data.skipped()}
    assert sorted(found) == ["1", "3", "4"]
    assert "3.png has more than 8 bits per channel" in found["3"]
    assert "4.png: cannot identify image file" in found["4"]
    for path in (folders / "val").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"None of the 2 images can be read\. The first: Could not read the image"):
        opened(folders)
