"""Calibration files of Middlebury, KITTI and OpenCV: the numbers that depth needs, and files that are damaged."""

from __future__ import annotations

import numpy as np
import pytest

from tests.predict.calibrations import KITTI, MIDDLEBURY, OPENCV
from visionattn.errors import DataError, InputError
from visionattn.predict.calibration import Calibration, read_calibration
from visionattn.predict.stereo import open_calibration


def read(tmp_path, text):
    path = tmp_path / "calib.txt"
    path.write_text(text)
    return read_calibration(path)


def test_middlebury(tmp_path):
    found = read(tmp_path, MIDDLEBURY)
    assert found == Calibration(3979.911, 0.193001, 124.343, (1244.772, 1019.507), 3979.912, (1988, 2964))


def test_kitti(tmp_path):
    found = read(tmp_path, KITTI)
    assert (found.focal, found.doffs, found.principal_point, found.size) == (721.5, 1.0, (609.5, 172.8), (375, 1242))
    assert found.baseline == pytest.approx((44.85728 + 339.5242) / 721.5)
    objects = KITTI.replace("P_rect_02", "P2").replace("P_rect_03", "P3")
    assert read(tmp_path, objects).baseline == found.baseline
    assert read(tmp_path, objects).size is None


def test_opencv(tmp_path):
    found = read(tmp_path, OPENCV)
    assert found == Calibration(500, 0.12, 10, (320, 240), 501, (480, 640))


def test_opencv_by_its_own_numbers(tmp_path):
    cv2 = pytest.importorskip("cv2")
    camera = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    right = camera + np.array([[0, 0, 12], [0, 0, 0], [0, 0, 0]])
    turn, shift = cv2.Rodrigues(np.array([0.01, -0.02, 0.005]))[0], np.array([[-0.12], [0.002], [0.001]])
    parts = cv2.stereoRectify(camera, np.zeros(5), right, np.zeros(5), (640, 480), turn, shift, flags=0)
    points = []
    for names in (("P1", "P2"), ("Q",)):
        storage = cv2.FileStorage(str(tmp_path / "stereo.yaml"), cv2.FILE_STORAGE_WRITE)
        for name in names:
            storage.write(name, {"P1": parts[2], "P2": parts[3], "Q": parts[4]}[name])
        storage.release()
        found = read_calibration(tmp_path / "stereo.yaml")
        assert found.baseline == pytest.approx(np.linalg.norm(shift))
        points.append(found.focal * found.baseline / (40 + found.doffs))
    homogeneous = parts[4] @ [100, 100, 40, 1]
    assert points == pytest.approx([homogeneous[2] / homogeneous[3]] * 2)


def test_a_baseline_that_seems_to_be_of_millimetres_is_told(tmp_path):
    found = read(tmp_path, OPENCV.replace("-60.", "-60000."))
    assert found.baseline == 120
    assert "assumed to be in metres: if it is in millimetres, give --baseline 0.12" in found.notes[0]
    given = open_calibration(tmp_path / "calib.txt", None, 0.12)
    assert (given.baseline, given.notes) == (0.12, ())


def test_images_of_another_size(tmp_path):
    found = read(tmp_path, MIDDLEBURY).at(497, 741)
    assert (found.focal, found.doffs) == (3979.911 / 4, 124.343 / 4)
    assert found.principal_point == (1244.772 / 4, 1019.507 / 4)
    assert found.notes == ("the calibration for 1988 x 2964 pixels was scaled to the images",)
    with pytest.raises(InputError, match="the images have 400 x 741 and were cropped"):
        read(tmp_path, MIDDLEBURY).at(400, 741)
    assert Calibration(1, 1).at(3, 4) == Calibration(1, 1)


def test_numbers_beside_a_file(tmp_path):
    read(tmp_path, MIDDLEBURY)
    with pytest.raises(InputError, match="already gives --focal, --doffs: leave that out"):
        open_calibration(tmp_path / "calib.txt", 3.0, None, doffs=1.0)
    assert open_calibration(None, 100.0, 0.2, doffs=3.0, fy=99.0) == Calibration(100, 0.2, 3, None, 99)
    with pytest.raises(InputError, match=r"--fy requires --focal and --baseline, or --calibration\."):
        open_calibration(None, None, None, fy=99.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be Middlebury's"),
        ("just words", "must be Middlebury's"),
        (MIDDLEBURY.replace("3979.912", ""), "9 numbers are required; got 8"),
        (MIDDLEBURY.replace("baseline=193.001", ""), "lacks baseline"),
        (MIDDLEBURY.replace("193.001", "nan"), "finite and above 0"),
        (MIDDLEBURY.replace("193.001", "-1"), "finite and above 0"),
        (MIDDLEBURY.replace("1988", "0"), "at least 1 x 1"),
        (MIDDLEBURY.replace("1988", "9" * 5000), "damaged"),
        (KITTI.replace("P_rect_03", "P_rect_07"), "lacks the projections P2 and P3"),
        (KITTI.replace("721.5", "0"), "damaged"),
        (OPENCV.replace("P2", "P3"), "must be Middlebury's"),
        (OPENCV.replace("[ 500.", "[ "), "damaged"),
        (OPENCV.replace("500.", ".nan"), "finite and above 0"),
        (OPENCV.replace("data: [", "data: [[["), "damaged"),
        ("Q: " + "[" * 5000, "damaged"),
        ("Q: !!python/object/apply:os.system [true]", "damaged"),
        ("Q: [" + "1, " * 15 + "a]", "damaged"),
        ("Q: [" + "0, " * 15 + "0]", "damaged"),
        ("%YAML:1.0\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]\n" for n in range(9))
         + "Q: *a8\n", "damaged"),
    ],
)  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, text, words):
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
