from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image

from tests.export import graphs
from visionattn.data.restore.bicubic import downscale
from visionattn.errors import DataError, InputError
from visionattn.export import examples
from visionattn.export.examples import check_task, load_examples
from visionattn.export.spec import ExportSpec


def spec_of(**facts):
    return ExportSpec.of(graphs.Facts(**facts), None, True, 20, "drawn", None)


RESTORE = {"task": "restore", "scale": 2, "output_names": ("upscaled",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine pictures in two classes, one of them a GIF, beside what is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(9):
        path = folder / ("cat" if number < 4 else "dog") / f"{number}.{'gif' if number == 8 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (41, 63, 3), np.uint8)).save(path)
    (folder / "dog" / "notes.txt").write_text("notes")
    (folder / ".hidden").mkdir()
    Image.new("RGB", (40, 40)).save(folder / ".hidden" / "a.png")
    (folder / "dog" / "broken.png").write_bytes(b"broken")
    return folder


def test_the_network_gets_small_pictures(folder):
    found = load_examples(spec_of(**RESTORE), folder, least=8)
    assert len(found) == 9  # the broken one is left out
    truth = np.asarray(Image.open(folder / "cat" / "0.png"))[:40, :62]
    np.testing.assert_array_equal(found[0].truth, truth)
    np.testing.assert_array_equal(found[0].images[0], downscale(truth, 2))


def test_folders_are_classes(folder):
    spec = spec_of(size=32, task="classify", num_classes=2)
    found = load_examples(spec, folder)
    assert [example.truth for example in found] == [0] * 4 + [1] * 5
    assert {example.images[0].shape for example in found} == {(32, 32, 3)}
    named = replace(spec, num_classes=3, labels=["dog", "cow", "cat"])
    assert [example.truth for example in load_examples(named, folder)] == [2] * 4 + [0] * 5
    other = spec_of(size=32, task="classify", num_classes=5)
    assert {example.truth for example in load_examples(other, folder)} == {None}


def test_grey_models_get_grey_pictures(folder):
    spec = replace(spec_of(**RESTORE), input_size=[1, 16, 16], mean=None, std=None)
    example = load_examples(spec, folder)[0]
    assert (example.images[0].shape, example.truth.shape) == ((20, 31, 1), (40, 62, 1))


def test_a_stereo_pair_keeps_its_disparity_at_another_size(monkeypatch):
    monkeypatch.setattr(examples, "_GENERATED", (1, (256, 384), 64.0))
    monkeypatch.setattr(examples, "_stereo_pairs", cache(examples._stereo_pairs.__wrapped__))
    spec = spec_of(size=64, task="stereo", input_names=("left", "right"), size_multiple=32, size_minimum=64)
    free = load_examples(spec, None)
    sizes = [example.images[0].shape for example in free]
    assert sizes == [(480, 736, 3), (224, 352, 3), (256, 384, 3)]
    fixed = load_examples(replace(spec, dynamic_axes=["batch"], input_size=[3, 128, 192]), None)
    assert fixed[2].truth.shape == (128, 192)
    assert np.nanmedian(fixed[2].truth) == pytest.approx(np.nanmedian(free[2].truth) / 2, rel=0.02)


@pytest.mark.parametrize(
    ("facts", "place", "message"),
    [
        (RESTORE, "cat", "cat contains 4 images; calibration needs at least 8"),
        (RESTORE, "absent", "no folder"),
        ({"task": "stereo"}, "cat", "no stereo pair with ground truth"),
    ],
)
def test_too_few_are_refused(facts, place, message, folder):
    with pytest.raises(DataError, match=message):
        load_examples(spec_of(**facts), folder / place, least=8)


def test_a_task_without_a_metric_is_refused():
    with pytest.raises(
        InputError, match=r"require a task among 'restore', 'classify', 'stereo'; .* has the task 'flow'"
    ):
        check_task(spec_of(task="flow"))
