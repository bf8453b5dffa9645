"""Every layout of stereo data sets on small made trees: files found, truth decoded, what both views see."""

import numpy as np
import pytest
from PIL import Image

from visionattn.data.disparity import write_disparity
from visionattn.data.stereo import find_scenes
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
    with pytest.raises(DataError, match="no stereo pair with its truth in any layout of middlebury,"):
        find_scenes(tmp_path)
    with pytest.raises(ConfigError, match="There is no layout 'sintel'"):
        find_scenes(tmp_path, "sintel")
    middlebury2006(tmp_path)
    with pytest.raises(DataError, match="no stereo pair with its truth in the layout kitti2015"):
        find_scenes(tmp_path, "kitti2015")
    with pytest.raises(DataError, match="a factor that it does not say: give --factor"):
        find_scenes(tmp_path)[0].read()
    Image.new("RGB", (W, H + 1)).save(tmp_path / "a" / "view5.png")
    with pytest.raises(DataError, match=f"view5.png and .* differ in size: 7 x {W} and 6 x {W}"):
        find_scenes(tmp_path, factor=3)[0].read()
