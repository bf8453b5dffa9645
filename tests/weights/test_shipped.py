"""The weights in the package: each has a card, is small, loads offline, and keeps what its card says."""

import re
from pathlib import Path

import numpy as np
import pytest
import skimage
import timm
import torch

import visionattn
import visionattn.evaluate
from benchmarks.shipped.measures import HELD_OUT, classifier
from tools.generated_objects import write
from visionattn.export import OnnxModel, export_onnx
from visionattn.weights import SHIPPED

DATA = Path(visionattn.__file__).parents[2] / "shared" / "data"
SET5 = DATA / "sr" / "Set5" / "HR"
TEDDY = DATA / "stereo" / "teddy"
CIFAR10 = DATA / "cifar10"
FILES = sorted(SHIPPED.glob("*.safetensors"))
CLASSIFIERS = [
    SHIPPED / f"{name}.safetensors"
    for name in (
        "va_halonet_nano_32",
        "va_minimal_vit_micro_patch4_32_ep",
        "va_minimal_vit_micro_patch4_32_ep.tuned_cifar10",
        "va_mobilenetv2_ulsam_050_32",
    )
]
UPSCALERS = [file for file in FILES if file.stem.startswith("va_span")]


def test_names_and_files_are_the_same():
    named = [timm.get_pretrained_cfg(name).file for name in timm.list_pretrained("va_*")]
    assert set(FILES) == {Path(file) for file in named if file}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
class TestFile:
    def test_card_and_size(self, file):
        card = file.with_suffix(".md").read_text()
        for part in ("Data:", "Command:", "Measured:", "Licence:"):
            assert part in card
        assert file.stat().st_size <= 2e6

    def test_loads_by_name_and_by_file(self, file):
        model = timm.create_model(file.stem, pretrained=True).eval()
        views = 2 if model.task in ("stereo", "flow") else 1
        images = torch.rand(views, 1, *model.pretrained_cfg["input_size"])
        assert torch.equal(model(*images), visionattn.load(file, file.stem).eval()(*images))


@pytest.mark.parametrize("file", UPSCALERS, ids=lambda file: file.stem)
class TestUpscaler:
    def test_the_name_need_not_be_said(self, file):
        model = visionattn.load(file)
        assert model(torch.rand(1, 3, 12, 17)).shape == (1, 3, 12 * model.scale, 17 * model.scale)

    def test_exported_file_computes_the_same_on_a_photograph(self, file, tmp_path):
        model = visionattn.load(file)
        exported = export_onnx(model, tmp_path / "model.onnx")
        assert exported.spec.dynamic_axes == ["batch", "height", "width"]
        photograph = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].float() / 255
        model.double()
        for height, width in ((64, 64), (37, 101), (128, 21), (1, 3)):
            x = photograph[..., 100 : 100 + height, 150 : 150 + width]
            expected = model(x.double()).detach().numpy()
            actual = OnnxModel(tmp_path / "model.onnx")(x.numpy())[0]
            assert np.abs(actual - expected).max() < 1e-5

    @pytest.mark.skipif(not SET5.is_dir(), reason="Set5 is not there")
    def test_reaches_what_its_card_says(self, file):
        card = file.with_suffix(".md").read_text()
        jpeg, gain = (75, 0.9) if file.stem.endswith(".real") else (None, 1.5)
        stated = re.search(r"Set5, 75 \| ([\d.]+) dB" if jpeg else r"Set5 ([\d.]+) dB", card)
        bicubic, network = visionattn.evaluate.evaluate_sr([file], SET5, jpeg=jpeg).means()
        assert network.psnr_y == pytest.approx(float(stated[1]), abs=0.005)
        assert network.psnr_y > bicubic.psnr_y + gain


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not there")
@pytest.mark.parametrize("file", CLASSIFIERS, ids=lambda file: file.stem)
def test_classifier_reaches_what_its_card_says(file):
    stated = float(re.search(r"held-out training images ([\d.]+) %", file.with_suffix(".md").read_text())[1])
    measured = {row.data: row.value for row in classifier(file.stem, CIFAR10, splits=("val",))}
    assert measured[HELD_OUT] == pytest.approx(stated, abs=0.1)


def test_search_tells_colours_apart_on_objects_that_it_has_not_seen(tmp_path):
    write(tmp_path / "objects", 400, 64, seed=1)
    found = visionattn.evaluate.evaluate_retrieval("va_cca_halonet_nano_32", tmp_path / "objects/objects.csv")
    for attribute, gain in {"colour": 0.6, "background": 0.2}.items():
        (own,) = (score.map for score in found.own("va_cca_halonet_nano_32") if score.attribute == attribute)
        (chance,) = (score.map for score in found.own("random") if score.attribute == attribute)
        assert own > chance + gain


def test_flow_reaches_what_its_card_says():
    pytest.importorskip("cv2")
    from benchmarks.stereo.flow_pairs import by_network, measure, motorcycle

    card = (SHIPPED / "va_match_flow_nano.md").read_text()
    stated = [float(found) for found in re.search(r"EPE is ([\d.]+) .*?exchanged ([\d.]+) ", card, re.DOTALL).groups()]
    network = by_network(timm.create_model("va_match_flow_nano", pretrained=True).eval())
    for transposed, epe in enumerate(stated):
        found = measure(motorcycle(bool(transposed)), {"flow": network})
        assert found["flow"]["epe"] == pytest.approx(epe, abs=0.02)


@pytest.mark.skipif(not TEDDY.is_dir(), reason="Middlebury's Teddy is not there")
def test_stereo_reaches_what_its_card_says():
    stated = float(re.search(r"teddy ([\d.]+)", (SHIPPED / "va_match_stereo_nano.md").read_text())[1])
    evaluation = visionattn.evaluate.evaluate_stereo(["va_match_stereo_nano"], [TEDDY], factor=4)
    rows = {(row.scene, row.region): row for row in evaluation.rows}
    assert rows["teddy", "all"].errors.bad_2 == pytest.approx(stated, abs=0.1)
