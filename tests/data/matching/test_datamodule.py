"""Pairs for matching: each data set's layout on a small made tree, windows that keep the truth, workers, errors."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")

from visionattn.data.matching.datamodule import MatchData, RandomWindows, read_stereo
from visionattn.data.matching.disparity import write_disparity, write_flow
from visionattn.data.matching.flow_sets import find_flow_scenes
from visionattn.data.matching.pairs import MatchPair
from visionattn.data.matching.stereo import find_scenes
from visionattn.data.samplers import IGNORED, SampleKey
from visionattn.errors import ConfigError, DataError, MissingPackageError

H, W = 6, 10
LEFT = np.full((H, W), 2.0, np.float32)
LEFT[2, 5] = 5  # not what the right view says of its match
RIGHT = np.full((H, W), 2.0, np.float32)


def image(path, value, size=(H, W)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def truth(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_disparity(path, values)


def check(pair, with_right):
    assert pair.views[:, 0, 0, 0].tolist() == [1, 2]
    np.testing.assert_array_equal(pair.fields[0, ..., 0], -LEFT)
    np.testing.assert_array_equal(pair.fields[0, ..., 1], np.zeros((H, W)))
    if with_right:
        np.testing.assert_array_equal(pair.fields[1, ..., 0], RIGHT)
    else:
        assert np.isnan(pair.fields[1, ..., 0]).all()
        assert not pair.seen[1].any()
    expected = np.ones((H, W), bool)
    expected[:, :2] = False  # out of the right view
    if with_right:
        expected[2, 5] = False
    else:
        expected[2, 2] = False  # behind the pixel that is nearer
    np.testing.assert_array_equal(pair.seen[0], expected)


def test_sceneflow(tmp_path):
    for kind in ("frames_cleanpass", "frames_finalpass"):
        for number in ("0007", "0006"):
            image(tmp_path / kind / "TRAIN/A/0000/left" / f"{number}.png", 1)
            image(tmp_path / kind / "TRAIN/A/0000/right" / f"{number}.png", 2)
    for number in ("0007", "0006"):
        truth(tmp_path / "disparity/TRAIN/A/0000/left" / f"{number}.pfm", LEFT)
        truth(tmp_path / "disparity/TRAIN/A/0000/right" / f"{number}.pfm", -RIGHT)
    scenes = find_scenes(tmp_path)
    kinds = ("frames_cleanpass", "frames_finalpass")
    assert [one.name for one in scenes] == [f"{k}/TRAIN/A/0000/{n}" for k in kinds for n in ("0006", "0007")]
    for scene in scenes:
        check(read_stereo(scene), with_right=True)


def test_fsd(tmp_path):
    place = tmp_path / "manipulation/dataset/data"
    image(place / "left/rgb/0001.jpg", 1)
    image(place / "right/rgb/0001.jpg", 2)
    (place / "left/disparity").mkdir()
    thousandths = np.rint(LEFT * 1000).astype(int)
    digits = np.stack([thousandths // 255**2, thousandths // 255 % 255, thousandths % 255], -1)
    Image.fromarray(digits.astype(np.uint8)).save(place / "left/disparity/0001.png")
    (scene,) = find_scenes(tmp_path)
    assert scene.name == "manipulation/dataset/data/0001"
    check(read_stereo(scene), with_right=False)
    digits[0, 0] = 0
    Image.fromarray(digits.astype(np.uint8)).save(place / "left/disparity/0001.png")
    assert np.isnan(scene.read().truth[0, 0])
    Image.fromarray(digits[..., 0].astype(np.uint8)).save(place / "left/disparity/0001.png")
    with pytest.raises(DataError, match="not a PNG with three channels"):
        scene.read()


def test_booster(tmp_path):
    place = tmp_path / "train/balanced/Bathroom"
    for light in ("im0", "im1"):
        image(place / f"camera_00/{light}.png", 1)
        image(place / f"camera_02/{light}.png", 2)
    np.save(place / "disp_00.npy", LEFT)
    np.save(place / "disp_02.npy", RIGHT)
    scenes = find_scenes(tmp_path)
    assert [one.name for one in scenes] == ["Bathroom/im0", "Bathroom/im1"]
    check(read_stereo(scenes[1]), with_right=True)
    mask = np.full((H, W), 255, np.uint8)
    mask[0] = 0
    Image.fromarray(mask).save(place / "mask_00.png")
    np.save(place / "disp_00.npy", np.where(np.arange(W) == 3, 0, LEFT))
    pair = read_stereo(find_scenes(tmp_path)[0])
    assert np.isnan(pair.fields[0, :, 3]).any(-1).all()
    np.testing.assert_array_equal(pair.seen[0], (mask > 0) & (np.arange(W) != 3))


class FakeFile(dict):
    """What h5py gives of a file, from numpy's."""

    def __init__(self, path):
        with open(path, "rb") as file:
            super().__init__(disparity=np.load(file))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_spring(tmp_path, monkeypatch):
    place = tmp_path / "train/0001"
    for side, number, values in (("left", 1, LEFT), ("right", 2, RIGHT)):
        image(place / f"frame_{side}/frame_{side}_0001.png", number)
        large = values.repeat(2, 0).repeat(2, 1)
        large[1::2], large[:, 1::2] = 99, 99
        (place / f"disp1_{side}").mkdir()
        with open(place / f"disp1_{side}/disp1_{side}_0001.dsp5", "wb") as file:
            np.save(file, large)
    (scene,) = find_scenes(tmp_path)
    assert scene.name == "0001/0001"
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingPackageError, match="pip install h5py"):
        scene.read()
    fake = ModuleType("h5py")
    fake.File = FakeFile
    monkeypatch.setitem(sys.modules, "h5py", fake)
    check(read_stereo(scene), with_right=True)


def test_spring_with_h5py(tmp_path):
    h5py = pytest.importorskip("h5py")
    from visionattn.data.matching.stereo_sets import _every_second

    with h5py.File(tmp_path / "a.dsp5", "w") as file:
        file["disparity"] = np.arange(24.0).reshape(4, 6)
    assert _every_second(tmp_path / "a.dsp5").tolist() == [[0, 2, 4], [12, 14, 16]]


FLOW = np.stack([np.full((H, W), 1.0), np.full((H, W), -2.0)], -1).astype(np.float32)


def check_flow(pair, hidden=()):
    assert pair.views[:, 0, 0, 0].tolist() == [1, 2]
    np.testing.assert_array_equal(pair.fields[0], FLOW)
    assert np.isnan(pair.fields[1]).all()
    expected = np.zeros((H, W), bool)
    expected[2:, :-1] = True
    for place in hidden:
        expected[place] = False
    np.testing.assert_array_equal(pair.seen[0], expected)
    assert not pair.seen[1].any()


def test_sintel(tmp_path):
    place = tmp_path / "training"
    for kind in ("clean", "final"):
        for number in (1, 2):
            image(place / kind / "alley_1" / f"frame_{number:04}.png", number)
    for part in ("flow", "occlusions"):
        (place / part / "alley_1").mkdir(parents=True)
    write_flow(place / "flow/alley_1/frame_0001.flo", FLOW)
    hidden = np.zeros((H, W), np.uint8)
    hidden[3, 4] = 255
    Image.fromarray(hidden).save(place / "occlusions/alley_1/frame_0001.png")
    for folder in (tmp_path, place):
        scenes = find_flow_scenes(folder)
        assert [one.name for one in scenes] == ["clean/alley_1/0001", "final/alley_1/0001"]
        check_flow(scenes[0].read(), hidden=[(3, 4)])
    (place / "invalid/alley_1").mkdir(parents=True)
    Image.fromarray(hidden).save(place / "invalid/alley_1/frame_0001.png")
    field = find_flow_scenes(tmp_path, "sintel")[0].read().fields[0]
    assert np.isnan(field[3, 4]).all()
    assert np.isfinite(field).sum() == 2 * (H * W - 1)


def test_chairs(tmp_path):
    for number in (1, 2):
        image(tmp_path / f"data/00001_img{number}.ppm", number)
    write_flow(tmp_path / "data/00001_flow.flo", FLOW)
    (scene,) = find_flow_scenes(tmp_path)
    assert scene.name == "00001"
    check_flow(scene.read())
    image(tmp_path / "data/00001_img2.ppm", 2, (H, W + 1))
    with pytest.raises(
        DataError, match=r"00001_img1\.ppm, 00001_img2\.ppm and 00001_flow\.flo differ in size: 6 x 10, "
    ):
        scene.read()


@pytest.mark.parametrize("images", ["image_2", "colored_0"])
def test_kitti_flow(tmp_path, images):
    pytest.importorskip("cv2")
    for number, name in enumerate(("000000_10", "000000_11"), 1):
        image(tmp_path / "training" / images / f"{name}.png", number)
    shown = FLOW.copy()
    shown[4, 4] = np.nan
    for folder, values in (("flow_occ", FLOW), ("flow_noc", shown)):
        (tmp_path / "training" / folder).mkdir()
        write_flow(tmp_path / "training" / folder / "000000_10.png", values)
    (scene,) = find_flow_scenes([tmp_path])
    assert scene.name == "000000_10"
    check_flow(scene.read(), hidden=[(4, 4)])


def test_wrong_flow_folders(tmp_path):
    with pytest.raises(ConfigError, match="layout must be one of 'sintel', 'chairs', 'kitti'; got 'sintl'"):
        find_flow_scenes(tmp_path, "sintl")
    with pytest.raises(DataError, match="There is no folder"):
        find_flow_scenes(tmp_path / "none")
    with pytest.raises(DataError, match="no image pairs with flow in any layout of sintel, chairs, kitti"):
        find_flow_scenes(tmp_path)


def ramp(size=(220, 260), disparity=7):
    """A pair whose colour says the place on the surface."""
    height, width = size
    row = np.arange(width) // 2
    left = np.broadcast_to(np.stack([row, row, row], -1), (height, width, 3))
    right = np.broadcast_to((np.arange(width)[:, None] + disparity) // 2, (height, width, 3))
    fields = np.zeros((2, height, width, 2), np.float32)
    fields[0, ..., 0], fields[1, ..., 0] = -disparity, disparity
    x = np.arange(width)
    seen = np.stack([np.broadcast_to(x >= disparity, size), np.broadcast_to(x < width - disparity, size)])
    return MatchPair(np.stack([left, right]).astype(np.uint8), fields, seen)


def test_windows_keep_the_truth():
    draw, rng = RandomWindows((192, 224), 1.5, 0.0, exchange=True), np.random.default_rng(0)
    disparities, directions = set(), set()
    for _ in range(12):
        pair = draw(ramp(), rng)
        assert pair.views.shape == (2, 192, 224, 3)
        assert (pair.fields[0, ..., 0] < 0).all()
        assert (pair.fields[1, ..., 0] > 0).all()
        for view in (0, 1):
            y, x = np.nonzero(pair.seen[view])
            match = np.rint(x + pair.fields[view, y, x, 0]).astype(int)
            assert match.min() >= 0
            assert match.max() < 224
            colours = pair.views[view, y, x, 0].astype(int), pair.views[1 - view, y, match, 0].astype(int)
            assert np.abs(colours[0] - colours[1]).max() <= 2
        disparities.add(float(pair.fields[1, 0, 0, 0]))
        directions.add(bool(pair.views[0, 0, 0, 0] < pair.views[0, 0, -1, 0]))
    assert len(disparities) > 8
    assert min(disparities) >= 7 * 192 / 220 / 1.5
    assert max(disparities) <= 7 * 1.5**1.2 * 1.01
    assert directions == {True, False}


def test_colours_change_apart():
    draw, rng = RandomWindows((192, 224), 1.0, 0.2, exchange=True), np.random.default_rng(0)
    grey = ramp()._replace(views=np.full((2, 220, 260, 3), 100, np.uint8))
    ratios = [np.log(pair.views[0, 0, 0] / pair.views[1, 0, 0]) for pair in (draw(grey, rng) for _ in range(40))]
    assert 0.15 < np.std(ratios) < 0.5


def save(folder, pair):
    folder.mkdir(parents=True)
    for name, view in zip(("left", "right"), pair.views):
        Image.fromarray(view).save(folder / f"{name}.png")
    write_disparity(folder / "disp_left.pfm", -pair.fields[0, ..., 0])
    write_disparity(folder / "disp_right.pfm", pair.fields[1, ..., 0])


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "pairs/a", ramp())
    save(tmp_path / "pairs/b", ramp((200, 200), 12))
    return str(tmp_path / "pairs")


def batches(loader):
    return [torch.cat([part.double().flatten() for part in batch]) for batch in loader]


@pytest.mark.parametrize("generated", [True, False])
def test_workers_change_nothing(folder, generated):
    found = []
    for num_workers in (0, 2):
        data = MatchData(
            None if generated else folder,
            folder,
            crop_size=(192, 192),
            epoch_pairs=4,
            batch_size=2,
            max_disparity=30,
            num_workers=num_workers,
        )
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        found.append(batches(loader))
    assert all(x.equal(y) or (x.isnan() == y.isnan()).all() for x, y in zip(*found))
    assert torch.equal(found[0][0].nan_to_num(), found[1][0].nan_to_num())
    loader.sampler.set_epoch(2)
    assert not torch.equal(batches(loader)[0].nan_to_num(), found[0][0].nan_to_num())


def test_parts(folder):
    data = MatchData(None, folder, crop_size=(192, 224), epoch_pairs=4, val_pairs=3, batch_size=2, max_disparity=30)
    data.setup("fit")
    data.setup("test")
    views, fields, seen, numbers = next(iter(data.train_dataloader()))
    assert views.shape == (2, 2, 3, 192, 224)
    assert fields.shape == (2, 2, 192, 224, 2)
    assert seen.shape == (2, 2, 192, 224)
    assert (views.dtype, fields.dtype, seen.dtype) == (torch.uint8, torch.float32, torch.bool)
    assert numbers.shape == (2,)
    whole = [batch[0].shape for batch in data.val_dataloader()]
    assert whole == [(1, 2, 3, 220, 260), (1, 2, 3, 200, 200)]
    assert len(data.test_dataloader()) == 2  # the validation pairs
    assert data.image_shape == (3, 192, 224)

    data = MatchData(crop_size=(192, 192), val_pairs=3, batch_size=2, max_disparity=30, rectification=2.0)
    data.setup("fit")
    data.setup("test")
    parts = [batches(loader) for loader in (data.val_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert torch.equal(parts[0][0], parts[1][0])
    assert not torch.equal(parts[0][0], parts[2][0])
    assert data.val_dataloader().dataset[SampleKey(0, 0, is_copy=True)][3] == IGNORED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": (160, 384)}, "multiples of 32 from 192 on; got 160 x 384"),
        ({"crop_size": (192, 200)}, "multiples of 32"),
        ({"scaling": 0.5}, "scaling must be at least 1"),
        ({"epoch_pairs": 3}, r"epoch_pairs must be at least data\.batch_size \(4\); got 3"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        MatchData(**settings)


def test_damaged_files_are_skipped_and_named(folder, tmp_path):
    (tmp_path / "pairs/a/disp_left.pfm").write_bytes(b"Pf\n9")
    data = MatchData(None, folder, crop_size=(192, 192), max_disparity=30)
    data.setup("validate")
    scenes = int(data.describe("val").split()[0])
    numbers = [number for *_, numbers in data.val_dataloader() for number in numbers.tolist()]
    assert sorted(numbers) == [IGNORED, *(n for n in range(scenes) if n != numbers.index(IGNORED))]
    (why,) = data.skipped()
    assert "a/disp_left.pfm" in why


def scaled_pairs(root, factors):
    """Scenes of a folder whose PNGs of 8 or 16 bits hold the disparity 7 times a factor."""
    for name, (dtype, factor) in factors.items():
        save(root / name, ramp())
        (root / name / "disp_right.pfm").unlink()
        (root / name / "disp_left.pfm").unlink()
        Image.fromarray(np.full((220, 260), 7 * factor, dtype)).save(root / name / "disp_left.png")
    return str(root)


def test_factors_reach_the_pairs(tmp_path):
    train = scaled_pairs(tmp_path / "train", {"a": (np.uint16, 64), "b": (np.uint8, 2)})
    val = scaled_pairs(tmp_path / "val", {"c": (np.uint16, 256)})
    settings = {"crop_size": (192, 192), "epoch_pairs": 4, "max_disparity": 30}
    data = MatchData(train, train, factor={"a": 64.0, "b": 2.0}, **settings)
    data.setup("fit")
    for part in ("train", "val"):
        for scene in data._pairs[part].scenes:
            np.testing.assert_array_equal(read_stereo(scene).fields[0, ..., 0], np.full((220, 260), -7))
    data = MatchData(train, val, factor={"a": 64.0, "b": 2.0}, **settings)
    with pytest.warns(UserWarning, match="c: 16-bit disparities are divided by 256, as in KITTI"):
        data.setup("fit")
    with pytest.raises(DataError, match="an unknown scale factor"):
        MatchData(train, factor={"a": 64.0}, **settings).setup("fit")
    with pytest.raises(ConfigError, match=r"data\.factor applies to disparities"):
        MatchData(train, factor=2.0, flow=True, **settings).setup("fit")


@pytest.mark.parametrize(("folder", "damage"), [("occlusions", b"junk"), ("invalid", b""), ("flow", b"PIEH")])
def test_broken_files_of_sintel_are_one_line(tmp_path, folder, damage):
    test_sintel(tmp_path)
    name = "frame_0001.flo" if folder == "flow" else "frame_0001.png"
    (tmp_path / "training" / folder / "alley_1" / name).write_bytes(damage)
    (tmp_path / "training/flow/alley_1/frame_last.flo").touch()  # which has no next frame
    scenes = find_flow_scenes(tmp_path)
    assert len(scenes) == 2
    with pytest.raises(DataError, match=f"Could not read .*{name}") as error:
        scenes[0].read()
    assert "\n" not in str(error.value)


def test_masks_of_another_size_are_named(tmp_path):
    test_sintel(tmp_path)
    Image.new("LA", (W, H + 1)).save(tmp_path / "training/occlusions/alley_1/frame_0001.png")
    with pytest.raises(DataError, match=r"frame_0001\.png and .*frame_0001\.png differ in size: 7 x 10 and 6 x 10"):
        find_flow_scenes(tmp_path)[0].read()


@pytest.mark.parametrize("stored", [np.zeros((2, 2, 2)), np.array([["a", "b"]]), None])
def test_broken_files_of_spring_are_one_line(tmp_path, monkeypatch, stored):
    from visionattn.data.matching.stereo_sets import _every_second

    class File(FakeFile):
        def __init__(self, path):
            dict.__init__(self, {} if stored is None else {"disparity": stored})

    fake = ModuleType("h5py")
    fake.File = File
    monkeypatch.setitem(sys.modules, "h5py", fake)
    with pytest.raises(DataError, match=r"Could not read .*|must hold a disparity \(H, W\)"):
        _every_second(tmp_path / "a.dsp5")
