"""Masks of all kinds give the same classes; colours, large values and classes without a name are refused."""

import numpy as np
import pytest
from PIL import Image

from visionattn.data.segment.masks import IGNORE, PALETTE, check_labels, read_mask, resize_mask
from visionattn.errors import DataError

VALUES = np.array([[0, 1, 2], [20, 255, 3]], np.uint8)


def palette_image():
    image = Image.fromarray(VALUES).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


@pytest.mark.parametrize("kind", ["palette", "grey", "16 bits", "32 bits"])
def test_indices(kind, tmp_path):
    image = {
        "palette": palette_image,
        "grey": lambda: Image.fromarray(VALUES),
        "16 bits": lambda: Image.fromarray(VALUES.astype(np.uint16)),
        "32 bits": lambda: Image.fromarray(VALUES.astype(np.int32)),
    }[kind]()
    path = tmp_path / ("mask.tif" if kind == "32 bits" else "mask.png")
    image.save(path)
    found = read_mask(path)
    assert found.dtype == np.uint8
    assert found.tolist() == VALUES.tolist()
    assert read_mask(path, zero_is_ignored=True).tolist() == [[255, 0, 1], [19, 255, 2]]


def test_one_bit(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[1, 0]]


def test_the_palette_of_voc():
    assert PALETTE[[0, 1, 2, 15, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [224, 224, 192],
    ]


def test_what_is_refused(tmp_path):
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (4, 3)).save(tmp_path / "colours.png")
        with pytest.raises(DataError, match=rf"colours\.png has the mode {mode}; a palette or grey image is required"):
            read_mask(tmp_path / "colours.png")
    Image.fromarray(np.array([[0, 300]], np.uint16)).save(tmp_path / "large.png")
    with pytest.raises(
        DataError, match=r"large\.png has the value 300; classes must be 0 to 254, or 255 for ignored pixels"
    ):
        read_mask(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"broken\.png"):
        read_mask(tmp_path / "broken.png")
    check_labels(VALUES, "mask.png", range(21))
    with pytest.raises(DataError, match=r"mask\.png has the class 20, but there are 20 classes: 0 to 19"):
        check_labels(VALUES, "mask.png", range(20))
    check_labels(np.full((2, 2), IGNORE, np.uint8), "mask.png", range(2))


def test_resizing_makes_no_new_classes():
    mask = np.kron(VALUES, np.ones((4, 4), np.uint8))
    assert resize_mask(mask, (2, 3)).tolist() == VALUES.tolist()
    assert set(np.unique(resize_mask(mask, (5, 7)))) <= set(VALUES.flatten())
