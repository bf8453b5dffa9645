"""What the runner predicts is what PyTorch computes; what it is given wrongly is refused in one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import visionattn
from tests.runtime import toys
from visionattn_runtime import Model, Pair, RunError, load

ROOT = Path(__file__).parents[2]


def prepared(model, photo, channels=3):
    """A photograph as timm prepares it for a model."""
    image = Image.fromarray(photo).convert("RGB" if channels == 3 else "L")
    config = {
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        **model.pretrained_cfg,
    }
    known = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return create_transform(**{key: config[key] for key in known})(image)


def test_classes_are_pytorchs(files, photo):
    network, model = toys.Labelled().eval(), load(files["Labelled"])
    images = [photo, photo[::-1].copy(), photo.transpose(1, 0, 2).copy()]
    with torch.no_grad():
        logits = network(torch.stack([prepared(network, image) for image in images]))
    np.testing.assert_allclose(model.features(*images), logits, atol=1e-6)
    np.testing.assert_allclose(model.probabilities(*images), logits.softmax(1), atol=1e-6)
    (best, *_), *_ = found = model.classify(*images, top=2)
    assert [len(classes) for classes in found] == [2, 2, 2]
    assert best[0] == ["cat", "dög", "hen"][int(logits[0].argmax())]
    assert best[1] == pytest.approx(float(logits.softmax(1)[0].max()), abs=1e-6)
    np.testing.assert_array_equal(model.predict(*images), model.probabilities(*images))


def test_a_fixed_batch_is_filled(files, photo):
    images = [photo, photo[::-1].copy(), photo[:, ::-1].copy()]
    free, fixed = (load(files[name]).features(*images) for name in ("Labelled", "Batch2"))
    np.testing.assert_allclose(free, fixed, atol=1e-6)


def test_features_of_grey_images(files, photo):
    network, model = toys.Features().eval(), load(files["Features"])
    with torch.no_grad():
        expected = network(prepared(network, photo[..., 0], channels=1)[None])
    np.testing.assert_allclose(model.predict(photo[..., 0]), expected, atol=1e-6)
    with pytest.raises(RunError, match="has no classes"):
        model.classify(photo)


@pytest.mark.parametrize("name", ["Enlarger", "EnlargerStatic"])
@pytest.mark.parametrize("shape", [(36, 50), (16, 16), (17, 200)])
def test_upscaling_is_visionattns(files, name, shape):
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    expected = visionattn.upscale(photo, toys.Enlarger().eval())
    found = load(files[name]).upscale(photo, tile=13)
    # The sums of a convolution have another order: a value between two levels may be rounded either way.
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 1e-3


def test_images_smaller_than_a_fixed_tile(files):
    photo = np.random.default_rng(0).integers(0, 256, (9, 30, 3), np.uint8)
    expected = visionattn.upscale(photo, toys.Enlarger().eval())
    found = load(files["EnlargerStatic"]).upscale(photo)
    assert found.shape == expected.shape
    assert np.abs(found[:-4].astype(int) - expected[:-4]).max() <= 1  # the last rows see repeated ones


def views(height, width):
    return np.random.default_rng(0).random((2, height, width, 3), np.float32)


@pytest.mark.parametrize("size", [(24, 32), (16, 40), (21, 29), (9, 50)])
def test_stereo_is_pytorchs_on_padded_views(files, size):
    left, right = views(*size)
    height, width = (max(16, 8 * -(-side // 8)) for side in size)
    padded = np.pad([left, right], ((0, 0), (0, height - size[0]), (0, width - size[1]), (0, 0)), mode="edge")
    with torch.no_grad():
        expected = toys.Stereo().eval()(*torch.from_numpy(padded).movedim(3, 1)[:, None])[0, 0].numpy()
    expected = np.where(expected > 0, expected, np.nan)[: size[0], : size[1]]
    assert 0.1 < np.isnan(expected).mean() < 0.9
    np.testing.assert_allclose(load(files["Stereo"]).stereo(left, right), expected, atol=1e-5)


def test_stereo_is_visionattns(files):
    left, right = views(24, 32)
    expected = visionattn.stereo(left, right, toys.Stereo().eval()).disparity
    for name in ("Stereo", "StereoStatic"):
        np.testing.assert_allclose(load(files[name]).predict(left, right), expected, atol=1e-5)


def test_flow_is_visionattns(files):
    first, second = views(24, 32)
    expected = visionattn.flow(first, second, toys.Flow().eval()).flow
    np.testing.assert_allclose(load(files["Flow"]).predict(first, second), expected, atol=1e-5)


def test_retrieval_is_pytorchs(files, photo):
    tower, head, pair = toys.Tower().eval(), toys.Head().eval(), load(files["Pair"])
    assert pair.attributes == ["colour", "kind", "season"]
    images = [photo, photo[::-1].copy()]
    with torch.no_grad():
        expected = head(tower(torch.stack([prepared(tower, image) for image in images])), torch.tensor([2, 1]))
    np.testing.assert_allclose(pair.embed(*images, attributes=["season", "kind"]), expected, atol=1e-6)
    assert pair.predict(photo).shape == (1, 3, 3)
    with pytest.raises(RunError, match=r"There is no attribute 'price'; it must be one of 'colour', 'kind'"):
        pair.embed(photo, attributes=["price"])
    other = Model(files["Labelled"])
    with pytest.raises(RunError, match="Tower and head are of different models"):
        Pair(pair.tower, other)


def test_half_precision(files, photo, tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(files["Labelled"])), tmp_path / "half.onnx")
    exact, half = (load(path).features(photo) for path in (files["Labelled"], tmp_path / "half.onnx"))
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < 1e-3


def changed(source, target, **metadata):
    model = onnx.load(source)
    for entry in model.metadata_props:
        entry.value = metadata.get(entry.key, entry.value)
    onnx.save(model, target)
    return target


def test_files_that_are_not_taken(files, tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    foreign = onnx.load(files["Labelled"])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    changed(files["Labelled"], tmp_path / "renamed.onnx", input_names='["picture"]')
    for name, told in {
        "absent.onnx": r"There is no file .*absent\.onnx",
        "text.onnx": r"cannot load .*text\.onnx",
        "foreign.onnx": r"foreign\.onnx lacks the metadata .*its entry model is missing",
        "renamed.onnx": r"renamed\.onnx has inputs or outputs that differ from its metadata: image, logits",
    }.items():
        with pytest.raises(RunError, match=told) as raised:
            load(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_what_a_file_does_not_take(files, photo):
    left, right = views(24, 32)
    for call, told in (
        (lambda: load(files["Labelled"]).upscale(photo), r"Toy|Labelled.* is for the task 'classify', not 'restore'"),
        (lambda: load(files["Labelled"]).features(), r"No image was given"),
        (lambda: load(files["Enlarger"]).classify(photo), r"is for the task 'restore', not 'classify'"),
        (lambda: load(files["Enlarger"]).upscale(photo, tile=0), r"tile must be at least 1 pixel; got 0"),
        (lambda: load(files["Enlarger"]).predict(photo, photo), r"requires 1 image; got 2"),
        (lambda: load(files["Stereo"]).predict(photo), r"requires 2 images; got 1"),
        (
            lambda: load(files["Stereo"]).stereo(left, right[1:]),
            r"must have the same size; got 24 x 32 and 23 x 32: crop one",
        ),
        (lambda: load(files["StereoStatic"]).stereo(*views(25, 32)), r"are 25 x 32; this file accepts at most 24 x 32"),
        (lambda: load(files["Features"]).compute([photo[..., :1]]), r"is 36 x 50; this file requires 8 x 12"),
    ):
        with pytest.raises(RunError, match=told):
            call()


def test_results_that_are_not_finite(files, photo, tmp_path):
    broken = onnx.load(files["Labelled"])
    for tensor in broken.graph.initializer:
        if len(tensor.dims) == 4:
            values = onnx.numpy_helper.to_array(tensor).copy()
            values.flat[0] = np.nan
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(RunError, match="is not finite: the file is broken"):
        load(tmp_path / "broken.onnx").features(photo)


def test_nothing_but_three_packages_is_imported(files, tmp_path, photo):
    np.save(tmp_path / "photo.npy", photo)
    code = f"""
import sys
from importlib.machinery import PathFinder
class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "timm", "visionattn", "onnx", "rich"):
            raise ModuleNotFoundError(name)
        return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import numpy as np, visionattn_runtime
print(visionattn_runtime.load({str(files["Labelled"])!r}).features(np.load({str(tmp_path / "photo.npy")!r})).tolist())
standard = set(sys.stdlib_module_names) | set(sys.builtin_module_names)
found = {{name.split(".")[0] for name in sys.modules}} - standard
assert found & {{"torch", "torchvision", "timm", "visionattn", "onnx"}} == set(), found
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    expected = Model(files["Labelled"]).features(photo)
    np.testing.assert_allclose(eval(found.stdout), expected, atol=1e-6)


def prepared_by(config, photo):
    return create_transform(**config)(Image.fromarray(photo))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["va_span_ch26_x4", "va_match_stereo_nano", "va_minimal_vit_micro_patch4_32"])
def test_shipped_models(name, tmp_path):
    visionattn.export(name, tmp_path / "model.onnx", check=False)
    model, network = load(tmp_path / "model.onnx"), timm.create_model(name, pretrained=True).eval()
    rng = np.random.default_rng(0)
    if network.task == "restore":
        photo = rng.integers(0, 256, (70, 90, 3), np.uint8)
        difference = model.upscale(photo, tile=40).astype(int) - visionattn.upscale(photo, network)
        assert np.abs(difference).max() <= 1
    elif network.task == "stereo":
        left = rng.integers(0, 256, (161, 203, 3), np.uint8)
        expected = visionattn.stereo(left, np.roll(left, -5, 1), network).disparity
        assert np.nanmedian(np.abs(model.stereo(left, np.roll(left, -5, 1)) - expected)) < 1e-4
    else:
        photo = rng.integers(0, 256, (70, 90, 3), np.uint8)
        with torch.no_grad():
            expected = network(prepared_by(resolve_model_data_config(network), photo)[None])
        np.testing.assert_allclose(model.features(photo), expected, atol=1e-4)
