"""A saved head with its backbone as one network, and its file: what `predict --head` says, for every kind of head."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from tests.probe.scenes import scene
from visionattn.cli import main
from visionattn.errors import InputError
from visionattn.export import OnnxModel, export_onnx
from visionattn.opening import open_backbone
from visionattn.probe import Backbone, create_pooling, head_network, open_classifier
from visionattn.probe.heads.banks import Head
from visionattn.probe.heads.files import save_head
from visionattn.probe.segmentation.heads import create_segmenter
from visionattn.weights.hashing import hash_state
from visionattn_runtime import load
from visionattn_runtime.command import main as main_without_pytorch

NAME, NAMES, SIZE = "va_minimal_vit_nano_patch4_32", ("cat", "dög", "hen"), 32
KINDS = {"classification": "ep_2", "segmentation": "attentive", "multilabel": "gap", "regression": "gap"}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A file of each kind, with drawn weights, on the first layer of a small backbone."""
    folder = tmp_path_factory.mktemp("heads")
    model = open_backbone(NAME, None, random=True).model
    reader = Backbone(model, [0], image_size=SIZE)
    layer = reader.layers[0]
    for task, pooling in KINDS.items():
        torch.manual_seed(1)
        if task == "segmentation":
            head = create_segmenter(pooling, layer.dim, 3)
        else:
            head = Head(create_pooling(pooling, layer.dim, layer.grid), 3)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        facts = {
            "task": task,
            "pooling": pooling,
            "layer": {"index": 0, **asdict(layer)},
            "classes": NAMES,
            "backbone": {
                "name": NAME,
                "sha256": hash_state(model.state_dict()),
                "given": False,
                "random": True,
                "checkpoint": None,
                "weights": "drawn",
                "license": "cc0",
            },
            "data": {
                "image_size": [SIZE, SIZE] if task == "segmentation" else SIZE,
                "mean": [0.4, 0.5, 0.6],
                "std": [0.2, 0.25, 0.3],
            },
            "command": "visionattn probe",
        }
        save_head(head.eval(), facts, folder / f"{task}.safetensors")
    return {task: folder / f"{task}.safetensors" for task in KINDS}


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(scene(np.random.default_rng(0), 57, 83)[0]).save(path)
    return path


@pytest.mark.parametrize("task", KINDS)
def test_it_computes_what_the_head_says(heads, task):
    network, weights, licence = head_network(heads[task])
    assert (weights, licence) == (f"drawn; {task}.safetensors", "cc0")
    classifier = open_classifier(heads[task], device="cpu")
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        found = network(images)
    if task == "segmentation":
        assert found.shape == (2, 3, SIZE, SIZE)
        for image, logits in zip(images, found):
            np.testing.assert_array_equal(logits.argmax(0), classifier.segment(image, (SIZE, SIZE)))
    else:
        found = found.softmax(1) if task == "classification" else found
        torch.testing.assert_close(found, classifier(images))


def test_a_file_of_masks(heads, photo, tmp_path, capsys):
    file = tmp_path / "model.onnx"
    assert main(["export", "--head", str(heads["segmentation"]), "--output", str(file)]) == 0
    assert "pass" in capsys.readouterr().out
    spec = OnnxModel(file).spec
    assert (spec.task, spec.output_names, spec.crop_mode) == ("segment", ["logits"], "squash")
    assert (spec.labels, spec.mean, spec.num_classes) == (list(NAMES), [0.4, 0.5, 0.6], 3)
    mask = open_classifier(heads["segmentation"], device="cpu").apply([photo]).masks[0]
    assert len(np.unique(mask)) > 1
    assert main_without_pytorch([str(file), str(photo), "--output", str(tmp_path / "mask.png")]) == 0
    found = np.asarray(Image.open(tmp_path / "mask.png"))
    assert found.shape == mask.shape == (57, 83)
    # Logits are interpolated twice, from tokens to input and from input to photograph: only boundaries may move.
    assert (found == mask).mean() > 0.97


def test_a_file_of_labels(heads, photo, tmp_path):
    file = tmp_path / "model.onnx"
    assert main(["export", "--head", str(heads["multilabel"]), "--output", str(file)]) == 0
    said = open_classifier(heads["multilabel"], device="cpu").apply([photo]).probabilities
    found = load(file).probabilities(photo)
    np.testing.assert_allclose(found, said, rtol=1e-3, atol=1e-4)
    assert load(file).classify(photo, top=1)[0][0] == (NAMES[int(said[0].argmax())], pytest.approx(found.max()))


def test_a_bundle_of_numbers(heads, photo, tmp_path, capsys):
    folder = tmp_path / "bundle"
    words = ["export", NAME, "--head", str(heads["regression"]), "--bundle", str(folder)]
    assert main(words) == 2  # of the name alone, no weights are published
    assert "No weights are published" in capsys.readouterr().err
    assert main([words[0], *words[2:]]) == 0
    assert (folder / "labels.txt").read_text(encoding="utf-8") == "cat\ndög\nhen\n"
    assert "Weights: drawn; regression.safetensors" in (folder / "README.md").read_text(encoding="utf-8")
    said = open_classifier(heads["regression"], device="cpu").apply([photo]).probabilities[0]
    expected = pytest.approx(dict(zip(NAMES, said.tolist())), rel=1e-3, abs=1e-4)
    assert load(folder / "model.onnx").measure(photo) == [expected]
    capsys.readouterr()
    words = [str(folder / "model.onnx"), str(photo)]
    assert main_without_pytorch([*words, "--output", str(tmp_path / "n.json")]) == 0
    assert json.loads((tmp_path / "n.json").read_text(encoding="utf-8")) == {str(photo): expected}
    assert f"cat {said[0]:.3g}"[:7] in capsys.readouterr().out
    assert main_without_pytorch([*words, "--output", str(tmp_path / "n.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "n.npy")[0], said, rtol=1e-3, atol=1e-4)


def test_what_a_head_fixes(heads, tmp_path, capsys):
    words = ["export", "--head", str(heads["segmentation"]), "--output", str(tmp_path / "a.onnx")]
    for option in (["--num-classes", "4"], ["--image-size", "64", "64"], ["--random-weights"]):
        assert main([*words, *option]) == 2
        assert f"leave out {option[0]}." in capsys.readouterr().err
    assert main([*words, "--int8"]) == 2
    assert "Variants require a task among" in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()
    with pytest.raises(InputError, match="must have shape"):
        export_onnx(head_network(heads["multilabel"]).model, tmp_path / "a.onnx", input_size=(64, 64))
