"""Generated objects: an image shows its values, the table is one that training reads, and both follow from the seed."""

import numpy as np
import pytest
from PIL import Image

from tools.generated_objects import ATTRIBUTES, COLOURS, SHAPES, SIZES, draw, write
from visionattn.data.retrieval.catalogue_files import read_catalogue
from visionattn.errors import DataError


def test_an_image_follows_from_its_generator_and_attributes_are_independent():
    first, second = (draw(np.random.default_rng(3), 16) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert first[0].shape == (16, 16, 3)
    assert tuple(first[1]) == ATTRIBUTES
    drawn = [draw(np.random.default_rng(n), 4)[1] for n in range(400)]
    assert [len({values[name] for values in drawn}) for name in ATTRIBUTES] == [8, 11, 5, 3, 3]
    table = np.zeros((len(SHAPES), len(SIZES)))
    for values in drawn:
        table[[*SHAPES].index(values["shape"]), [*SIZES].index(values["size"])] += 1
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 29.1  # chi-squared, 14 degrees of freedom, 1 %


def test_an_object_has_its_colour_and_size():
    areas = {name: [] for name in SIZES}
    for n in range(200):
        image, values = draw(np.random.default_rng((1, n)), 24)
        if (values["texture"], values["background"], values["shape"]) != ("plain", "plain", "disc"):
            continue
        around = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
        inside = np.abs(image - around).max(-1) > 12
        areas[values["size"]].append(inside.mean())
    assert max(areas["small"], default=0) < min(areas["medium"], default=1)
    assert max(areas["medium"], default=0) < min(areas["large"], default=1)
    assert len(COLOURS) == 11


def test_the_table_is_read_by_training(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for n in range(10):
        Image.new("RGB", (20, 14), (25 * n, 0, 0)).save(photographs / f"{n}.png")
    write(tmp_path / "made", 30, 12, sorted(photographs.iterdir()))
    catalogue = read_catalogue("table", tmp_path / "made/objects.csv")
    assert catalogue.attributes == ATTRIBUTES
    assert [len(catalogue.part(name).images) for name in ("train", "val", "test")] == [24, 3, 3]
    assert "photograph" in catalogue.values["background"]
    assert catalogue.images.open("00007.png").size == (12, 12)
    with pytest.raises(DataError, match=r"objects\.csv exists: give another folder"):
        write(tmp_path / "made", 30, 12)
