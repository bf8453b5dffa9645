from __future__ import annotations

import sys

import numpy as np
import pytest

import visionattn
from visionattn.errors import InputError, MissingPackageError
from visionattn.predict.filling import fill_inconsistent, fill_left


def views_of(disparity):
    """Views in which each disparity has a colour, so that smoothing crosses no edge."""
    return [np.repeat((40 * np.nan_to_num(view)).astype(np.uint8)[..., None], 3, 2) for view in disparity]


def a_wall_behind_an_object():
    """Both views of a wall of disparity 2 and an object of disparity 5 at columns 8 to 11 of the left view."""
    left, right = np.full((99, 16), 2.0), np.full((99, 16), 2.0)
    left[:, 8:12], right[:, 3:7] = 5, 5
    return np.stack([left, right])


def test_occluded_pixels_take_the_value_of_the_background():
    truth = a_wall_behind_an_object()
    guessed = truth.copy()
    guessed[0, :, :2] = 9  # outside of the right view
    guessed[0, :, 5:8] = 3.2  # occluded by the object
    guessed[0, 1, 14] = np.nan  # not known
    guessed[1, :, 7:10] = 3.2  # occluded in the right view
    guessed[1, :, 14:] = 7  # outside of the left view
    np.testing.assert_allclose(fill_inconsistent(guessed, *views_of(truth)), truth)
    np.testing.assert_allclose(fill_inconsistent(truth, *views_of(truth)), truth)
    assert fill_inconsistent(guessed.astype(np.float32), *views_of(truth)).dtype == np.float32


def test_a_row_that_nothing_confirms_stays():
    pair = np.stack([np.full((1, 6), 1.0), np.full((1, 6), 4.0)])
    np.testing.assert_allclose(fill_inconsistent(pair, *views_of(pair)), pair)


@pytest.mark.parametrize("tolerance", [0.2, 1.0])
def test_tolerance(tolerance):
    pair = np.full((2, 99, 12), 2.0)
    pair[0, :, 9] = 2.5
    edges = [255 * (np.arange(12) % 2).astype(np.uint8) + np.zeros((99, 1), np.uint8)] * 2  # no value crosses them
    found = fill_inconsistent(pair, *edges, tolerance)
    np.testing.assert_allclose(found[0, :, 9], 2 if tolerance < 0.5 else 2.5)


def test_small_regions_fill_no_others():
    disparity = np.full((2, 40, 60), 6.0)
    disparity[0, 10:15, 30:35] = disparity[1, 10:15, 28:33] = 2.0  # 25 pixels that confirm each other
    disparity[0, 10:15, 35:40] = np.nan  # next to them
    flat = np.zeros((40, 60), np.uint8)
    found = fill_left(disparity, flat)
    assert abs(found[10:15, 35:40] - 6).max() < 0.2
    disparity[0, 5:35, 30:35] = disparity[1, 5:35, 28:33] = 2.0
    large = np.full((40, 60), 128, np.uint8)
    large[5:35, 30:35] = 0
    assert abs(fill_left(disparity, large)[10:15, 30:35] - 2).max() < 0.1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_disparities_follow_those_of_the_same_colour(kind):
    peak = 1 if kind is np.float32 else np.iinfo(kind).max
    left = np.full((12, 40, 3), 0.2 * peak).astype(kind)
    left[:, 20:] = 0.8 * peak
    right = np.roll(left, -4, 1)
    truth = np.full((2, 12, 40), 4.0)
    noise = np.random.default_rng(0).normal(0, 0.1, truth.shape)
    guessed = truth + noise
    guessed[0, :, 25:30] = 9.0  # wrong: the right view does not confirm it
    error = np.abs(fill_inconsistent(guessed, left, right) - truth)[0]
    assert error.max() < 0.1 < np.abs(noise).max()


@pytest.mark.parametrize("layout", [lambda x: x, np.asfortranarray, lambda x: np.ascontiguousarray(x.T).T])
def test_rows_without_any_value_take_those_of_the_next(layout):
    # Strong texture lets little through: confidences of far rows would vanish.
    texture = np.random.default_rng(0).normal(128, 40, (150, 60)).clip(0, 255).astype(np.uint8)
    disparity = np.full((2, 150, 60), 7.3)
    disparity[:, :140] = np.nan
    np.testing.assert_allclose(fill_inconsistent(layout(disparity), texture, texture), 7.3)


def test_shapes_that_do_not_match():
    flat = np.zeros((40, 60), np.uint8)
    for disparity, left, right in (
        (np.ones((2, 40, 60)), flat[1:], flat),
        (np.ones((2, 40, 60)), flat, flat[:, 1:]),
        (np.ones((40, 60)), flat, flat),
        (np.ones((3, 40, 60)), flat, flat),
    ):
        with pytest.raises(InputError, match="must be"):
            fill_inconsistent(disparity, left, right)


def test_opencv_is_missed_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cv2", None)
    for call in (visionattn.stereo, visionattn.stereo_files):
        with pytest.raises(MissingPackageError, match="images"):
            call(tmp_path / "absent.png", tmp_path / "absent.png", fill=True)
    with pytest.raises(MissingPackageError, match="images"):
        visionattn.evaluate_stereo("va_match_stereo_nano", tmp_path, fill=True)


def test_nothing_known():
    pair = np.full((2, 3, 5), np.nan)
    np.testing.assert_array_equal(fill_inconsistent(pair, *[np.zeros((3, 5), np.uint8)] * 2), pair)
