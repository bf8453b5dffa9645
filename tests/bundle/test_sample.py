"""Sample images a task, and PyTorch in the place of ONNX Runtime."""

import numpy as np
import pytest
import torch
from PIL import Image

import visionattn
from tests.runtime import toys
from visionattn.errors import InputError
from visionattn.export.bundle.sample import compute_expected, draw_result, sample_images, write_images
from visionattn.export.spec import ExportSpec
from visionattn_runtime import load
from visionattn_runtime.verify import sample_error


def spec_of(model, **settings):
    return ExportSpec.of(model, None, settings.get("dynamic"), 20, "drawn", None)


@pytest.mark.parametrize("name", ["Labelled", "Enlarger", "Stereo", "Flow"])
def test_expected_results(name, tmp_path):
    network = getattr(toys, name)().eval()
    spec = spec_of(network)
    images, source = sample_images(spec)
    assert len(images) == len(spec.input_names)
    assert source
    names = write_images(images, spec, tmp_path)
    paths = [tmp_path / name for name in names]
    for path, pixels in zip(paths, images):
        for suffix in (".png", ".ppm"):
            np.testing.assert_array_equal(np.asarray(Image.open(path.with_suffix(suffix))), pixels)
    file = toys.write(network, tmp_path / "toy.onnx")
    expected = compute_expected(network, load(file), paths)
    assert sample_error(load(file).predict(*paths), expected) < 1e-5
    assert np.nanstd(expected) > 1e-3
    drawn = draw_result(expected, spec)
    assert (drawn is not None) == (name in ("Enlarger", "Stereo"))
    if name == "Enlarger":
        difference = np.asarray(drawn).astype(int) - visionattn.upscale(images[0], network)
        assert np.abs(difference).max() <= 1


def test_a_pair_of_files(files, tmp_path):
    tower, head = toys.Tower().eval(), toys.Head().eval()

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.forward_tokens, self.head = tower, head

    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    expected = compute_expected(Both(), load(files["Pair"]), [tmp_path / "a.png"])
    np.testing.assert_allclose(load(files["Pair"]).embed(tmp_path / "a.png"), expected, atol=1e-6)


def test_digits_and_fixed_sizes():
    images, source = sample_images(spec_of(toys.Features()))
    assert images[0].shape == (8, 12, 1)
    assert "Digits" in source
    images, _ = sample_images(spec_of(toys.Stereo(), dynamic=False))
    assert [image.shape for image in images] == [(24, 32, 3)] * 2


def test_what_has_no_sample():
    class Five(toys.Labelled):
        pretrained_cfg = {"input_size": (5, 8, 8)}

    with pytest.raises(InputError, match=r"needs a sample image, .* task 'classify' and 5 channels"):
        sample_images(spec_of(Five()))
