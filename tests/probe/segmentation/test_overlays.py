"""Panels of a picture of masks: sizes, and the colours of classes."""

import numpy as np
from PIL import Image

from visionattn.data.segment.masks import PALETTE
from visionattn.probe.segmentation.overlays import compare_masks


def test_panels_have_the_colours_of_the_classes():
    image = Image.new("RGB", (80, 40), (100, 100, 100))
    truth, said = np.zeros((40, 80), np.uint8), np.full((40, 80), 2, np.uint8)
    truth[:, 40:] = 255
    sheet = compare_masks(image, truth, said, ["ground", "disc", "square"])
    assert sheet.size == (3 * 320 + 2 * 4, 160 + 4 + 16)
    assert sheet.getpixel((160, 80)) == (100, 100, 100)
    left, right, other = (sheet.getpixel((x, 80)) for x in (324 + 80, 324 + 240, 648 + 160))
    for found, colour in ((left, PALETTE[0]), (right, (224,) * 3), (other, PALETTE[2])):
        assert found == tuple(np.round(0.4 * 100 + 0.6 * np.asarray(colour)).astype(int))


def test_any_size_and_many_classes():
    image = Image.new("L", (3, 900))
    mask = (np.arange(2700) % 200).astype(np.uint8).reshape(900, 3)
    sheet = compare_masks(image, mask, mask, [f"class {number}" for number in range(200)])
    assert sheet.width == 3 * 1 + 2 * 4
