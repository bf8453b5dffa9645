"""Every layout of stereo data sets on small made trees: files found, truth decoded, what both views see."""

import os
import re

import numpy as np
import pytest
from PIL import Image

from visionattn.data.matching.disparity import write_disparity
from visionattn.data.matching.stereo import find_scenes, summarize
from visionattn.data.matching.stereo_files import Scene, read_mask
from visionattn.errors import ConfigError, DataError

H, W = 6, 10
RIGHT = np.full((H, W), 2.0)  # the right view's truth: a plane of disparity 2
MASK = np.tile(np.array([0, 128] + 8 * [255], np.uint8), (H, 1))


def truth():
    values = np.full((H, W), 2.0)
    values[0, 0] = np.nan
    values[2, 5] = 5  # not what the right view says of its match
    return values


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((H, W, 3), value, np.uint8)).save(path)


def eight_bits(path, values, factor):
    Image.fromarray((np.nan_to_num(values) * factor).astype(np.uint8)).save(path)


def middlebury(root, name="disp0.pfm"):
    for scene in ("b", "a"):
        image(root / scene / "im0.png", 1)
        image(root / scene / "im1.png", 2)
        (root / scene / "calib.txt").write_text("doffs=0\n")
        write_disparity(root / scene / name, truth())
    Image.fromarray(MASK).save(root / "a" / "mask0nocc.png")
    return root


def middlebury2006(root, left=("view1", "disp1"), right=("view5", "disp5")):
    for (view, disparity), values, number in ((left, truth(), 1), (right, RIGHT, 2)):
        image(root / "a" / f"{view}.png", number)
        eight_bits(root / "a" / f"{disparity}.png", values, 3)
    return root


def kitti(root, folders=("image_2", "image_3", "disp_occ_0", "disp_noc_0")):
    seen = np.where(MASK == 255, truth(), np.nan)
    for name in ("000001_10", "000000_10"):
        image(root / folders[0] / f"{name}.png", 1)
        image(root / folders[1] / f"{name}.png", 2)
        for folder, values in zip(folders[2:], (truth(), seen)):
            (root / folder).mkdir(exist_ok=True)
            write_disparity(root / folder / f"{name}.png", values)
    image(root / folders[0] / "000000_11.png")  # the next frame, which has no truth
    return root


def check(pair):
    assert (pair.left[0, 0, 0], pair.right[0, 0, 0]) == (1, 2)
    np.testing.assert_array_equal(pair.truth, truth())


def by_right_view():
    seen = np.ones((H, W), bool)
    seen[:, :2] = False  # out of the right view
    seen[2, 5] = False
    return seen


@pytest.mark.parametrize("name", ["disp0.pfm", "disp0GT.pfm"])
def test_middlebury_and_eth3d(tmp_path, name):
    scenes = find_scenes(middlebury(tmp_path, name))
    assert [scene.name for scene in scenes] == ["a", "b"]
    masked, plain = (scene.read() for scene in scenes)
    check(masked)
    np.testing.assert_array_equal(masked.nonocc, MASK == 255)
    check(plain)
    assert plain.nonocc is None


def test_one_scene_is_a_folder_too(tmp_path):
    (scene,) = find_scenes(middlebury(tmp_path) / "b")
    assert scene.name == "b"


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("middlebury2006", (("view1", "disp1"), ("view5", "disp5"))),
        ("middlebury2003", (("im2", "disp2"), ("im6", "disp6"))),
        ("pairs", (("left", "disp_left"), ("right", "disp_right"))),
    ],
)
def test_layouts_with_the_truth_of_both_views(tmp_path, layout, names):
    middlebury2006(tmp_path, *names)
    for asked in (None, layout):
        (scene,) = find_scenes(tmp_path, asked, factor=3)
        pair = scene.read()
        check(pair)
        np.testing.assert_array_equal(pair.nonocc, by_right_view())


@pytest.mark.parametrize(("height", "factor"), [(375, 4), (370, 3), (555, 2), (1110, 1), (288, 16)])
def test_middleburys_factors_by_height(tmp_path, height, factor):
    for name in ("view1", "view5"):
        Image.new("RGB", (2, height)).save(tmp_path / f"{name}.png")
    Image.new("L", (2, height), 48).save(tmp_path / "disp1.png")
    (scene,) = find_scenes(tmp_path)
    assert scene.read().truth[0, 0] == 48 / factor


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(
    "folders",
    [
        ("image_2", "image_3", "disp_occ_0", "disp_noc_0"),
        ("colored_0", "colored_1", "disp_occ", "disp_noc"),
        ("image_0", "image_1", "disp_occ", "disp_noc"),
    ],
)
def test_kitti(tmp_path, above, folders):
    kitti(tmp_path / "training" if above else tmp_path, folders)
    scenes = find_scenes(tmp_path)
    assert [scene.name for scene in scenes] == ["000000_10", "000001_10"]
    pair = scenes[0].read()
    check(pair)
    np.testing.assert_array_equal(pair.nonocc, (MASK == 255) & np.isfinite(truth()))


def test_several_folders_in_one_run(tmp_path):
    middlebury(tmp_path / "one")
    kitti(tmp_path / "two")
    assert [scene.name for scene in find_scenes([tmp_path / "one", tmp_path / "two"])] == [
        "a",
        "b",
        "000000_10",
        "000001_10",
    ]


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        find_scenes(tmp_path / "none")
    with pytest.raises(DataError, match="no stereo pair with ground truth in any layout of middlebury,"):
        find_scenes(tmp_path)
    with pytest.raises(ConfigError, match=r"layout must be one of 'middlebury', .*; got 'sintel'"):
        find_scenes(tmp_path, "sintel")
    middlebury2006(tmp_path)
    with pytest.raises(DataError, match="no stereo pair with ground truth in the layout kitti2015"):
        find_scenes(tmp_path, "kitti2015")
    with pytest.raises(DataError, match="an unknown scale factor: give --factor"):
        find_scenes(tmp_path)[0].read()
    Image.new("RGB", (W, H + 1)).save(tmp_path / "a" / "view5.png")
    with pytest.raises(DataError, match=f"view5.png and .* differ in size: 7 x {W} and 6 x {W}"):
        find_scenes(tmp_path, factor=3)[0].read()


def pairs(root, name="a", dtype=np.uint16, factor=64):
    """A scene of one's own, whose PNG holds the truth times a factor."""
    for view, number in (("left", 1), ("right", 2)):
        image(root / name / f"{view}.png", number)
    numbers = np.rint(np.nan_to_num(truth()) * factor).astype(dtype)
    Image.fromarray(numbers).save(root / name / "disp_left.png")
    return root


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_factor_counts_for_png_of_any_depth(tmp_path, dtype):
    factor = 64 if dtype == np.uint16 else 40
    (scene,) = find_scenes(pairs(tmp_path, dtype=dtype, factor=factor), factor=factor)
    pair = scene.read()
    check(pair)
    assert pair.notes == ()
    assert scene.assumed() == []


def test_the_factor_counts_for_kitti(tmp_path):
    kitti(tmp_path)
    np.testing.assert_array_equal(find_scenes(tmp_path, factor=64)[0].read().truth, 4 * truth())


def test_what_is_assumed_is_noted(tmp_path):
    (scene,) = find_scenes(pairs(tmp_path / "own", factor=256))
    pair = scene.read()
    check(pair)
    assert pair.notes == ("16-bit disparities are divided by 256, as in KITTI",)
    assert scene.assumed() == list(pair.notes)
    for name in ("view1", "view5"):
        Image.new("RGB", (2, 370)).save(tmp_path / f"{name}.png")
    Image.new("L", (2, 370), 48).save(tmp_path / "disp1.png")
    (scene,) = find_scenes(tmp_path, "middlebury2006")
    assert scene.read().notes == ("8-bit disparities are divided by 3, as in Middlebury at 370 rows",)
    assert scene.assumed() == list(scene.read().notes)
    scenes = find_scenes(middlebury(tmp_path / "2014"), factor=4)
    check(scenes[0].read())
    assert scenes[0].read().notes == ("disp0.pfm holds disparities in pixels: the factor 4 is not used",)
    assert summarize((scene.name, note) for scene in scenes for note in scene.assumed()) == [
        "a, b: disp0.pfm holds disparities in pixels: the factor 4 is not used"
    ]


@pytest.mark.parametrize(("left", "right", "disparity"), [("left", "right", "disp_left"), ("im0", "im1", "disp0")])
def test_no_factor_is_guessed_for_files_of_ones_own(tmp_path, left, right, disparity):
    for name in (left, right):
        Image.new("RGB", (2, 375)).save(tmp_path / f"{name}.png")
    Image.new("L", (2, 375), 48).save(tmp_path / f"{disparity}.png")
    (scene,) = find_scenes(tmp_path)
    message = re.escape(f"give --factor F for all scenes, or --factor {tmp_path.name}=F")
    for read in (scene.read, scene.assumed):
        with pytest.raises(DataError, match=message):
            read()


def test_no_factor_is_guessed_for_kitti(tmp_path):
    kitti(tmp_path)
    Image.new("L", (W, 375)).save(tmp_path / "disp_occ_0" / "000000_10.png")
    with pytest.raises(DataError, match="an unknown scale factor"):
        find_scenes(tmp_path)[0].read()


def test_a_factor_for_each_scene(tmp_path):
    pairs(tmp_path, "a", np.uint8, 40)
    pairs(tmp_path, "b", np.uint8, 20)
    for scene in find_scenes(tmp_path, factor={"a": 40, "b": 20}):
        check(scene.read())
    with pytest.raises(ConfigError, match=r"a factor for c, but no such scene: there are a, b\."):
        find_scenes(tmp_path, factor={"a": 40, "c": 20})


@pytest.mark.parametrize("factor", [0, -4.0, float("nan"), float("inf"), {"a": float("nan")}])
def test_factors_that_make_no_sense(tmp_path, factor):
    with pytest.raises(ConfigError, match="must be a finite number above 0"):
        find_scenes(pairs(tmp_path), factor=factor)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_masks_of_any_mode(tmp_path, mode):
    grey = Image.fromarray(np.where(MASK == 255, 255, 0).astype(np.uint8))
    picture = grey.convert("RGB").quantize(2) if mode == "P" else grey.convert(mode)
    picture.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), MASK == 255)


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x89PNG\r\n\x1a\n" + bytes(30), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_broken_masks_are_one_line(tmp_path, content):
    middlebury(tmp_path)
    mask = tmp_path / "a" / "mask0nocc.png"
    whole = mask.read_bytes()
    for damaged in (content, whole[: len(whole) // 2], whole[:40] + bytes(8) + whole[48:]):
        mask.write_bytes(damaged)
        with pytest.raises(DataError, match=r"Could not read the image .*mask0nocc\.png") as error:
            find_scenes(tmp_path)[0].read()
        assert "\n" not in str(error.value)


def test_masks_of_another_size_are_named(tmp_path):
    middlebury(tmp_path)
    Image.new("L", (W, H + 1)).save(tmp_path / "a" / "mask0nocc.png")
    with pytest.raises(DataError, match=r"mask0nocc\.png and .*im0\.png differ in size: 7 x 10 and 6 x 10"):
        find_scenes(tmp_path)[0].read()


def test_truth_beyond_all_sizes_is_no_match(tmp_path):
    values = np.full((H, W), 2.0)
    values[0, :3] = 1e30, -1e30, -4
    for name, array in (("left", values), ("right", RIGHT)):
        image(tmp_path / f"{name}.png", 1)
        write_disparity(tmp_path / f"disp_{name}.pfm", array)
    (scene,) = find_scenes(tmp_path)
    seen = np.ones((H, W), bool)
    seen[:, :2] = False
    seen[0, 2] = False
    np.testing.assert_array_equal(scene.read().nonocc, seen)


def test_hidden_folders_and_files_are_no_scenes(tmp_path):
    middlebury(tmp_path)
    middlebury(tmp_path / ".ipynb_checkpoints")
    (tmp_path / "a").rename(tmp_path / ".a")
    assert [scene.name for scene in find_scenes(tmp_path)] == ["b"]
    kitti(tmp_path / "kitti")
    (tmp_path / "kitti" / "disp_occ_0" / "._000000_10.png").write_bytes(b"junk")
    image(tmp_path / "kitti" / "image_2" / "._000000_10.png")
    assert len(find_scenes(tmp_path / "kitti")) == 2


def test_scenes_go_into_sets():
    assert len({Scene("a", "l", "r", "t"), Scene("a", "l", "r", "t")}) == 1


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"Cannot read the folder .*: File name too long"):
        find_scenes("a" * 300)
    with pytest.raises(DataError, match=r"Cannot read the folder .*: embedded null byte"):
        find_scenes("a\0")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="There is no folder"):
        find_scenes(tmp_path / "file")
    scandir = os.scandir

    def closed(path="."):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(DataError, match=r"Cannot read the folder .*locked: Permission denied"):
        find_scenes(tmp_path)
