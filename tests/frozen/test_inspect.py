"""`visionattn.inspect` and its command."""

import csv
import importlib
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import visionattn
from visionattn.cli import main
from visionattn.errors import InputError
from visionattn.frozen.curves import prune_curves
from visionattn.frozen.plan import Plan
from visionattn.frozen.sheet import contact_sheet, to_image


def vit(**options):
    torch.manual_seed(0)
    settings = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**{**settings, **options}).eval()
    model.pretrained_cfg = {"input_size": (3, 24, 24), "fixed_input_size": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


def pictures(count):
    return [np.random.default_rng(n).integers(0, 256, (24, 24, 3)).astype(np.uint8) for n in range(count)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, picture in enumerate(pictures(6)):
        target = folder / ("cats", "dogs")[number % 2] / f"{number}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(target)
    (folder / "cats" / "broken.png").write_bytes(b"no image")
    return folder


def test_a_report_with_everything(photos, tmp_path, monkeypatch):
    few = partial(prune_curves, keep=[0.5], scores=["grid"])  # all of them take ten seconds
    monkeypatch.setattr(importlib.import_module("visionattn.frozen.inspect"), "prune_curves", few)
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = visionattn.inspect(
        model, photos, masks=4, policy=["window"], budget=0.25, tokens=True, heads=True, maps=2,
        output=tmp_path / "report", progress=False,
    )  # fmt: skip
    assert found.classes == ("cats", "dogs")
    assert len(found.names) == 6
    assert [name for name, _ in found.skipped] == ["cats/broken.png"]
    assert found.logits
    folder = tmp_path / "report"
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["blocks.0.attn", "blocks.1.attn"]
    assert float(rows[1]["effective_keys"]) == found.look.layers[1].effective_keys
    assert float(rows[1]["pearson"]) == pytest.approx(found.agreement.mean)
    mean_map = (found.look.maps[0] + found.look.maps[1]) / 2
    assert found.mean_map_correlation[0] == pytest.approx(found.agreement.correlation(mean_map).mean())
    assert set(found.agreement.deletion) == {"map", "mean over layers", "saliency", "random"}
    for file in ("policies.csv", "pruning.csv", "occlusion.csv", "pruning.svg", "maps.jpg", "report.md"):
        assert (folder / file).stat().st_size > 0
    assert {row["policy"] for row in found.policies} == {"dense", "strided", "random", "window"}
    assert Plan.load(folder / "plan.json") == found.plan
    page = (folder / "report.html").read_text()
    for words in ("Attention of VisionTransformer", "Contact sheet", "Sparse attention", "Pruned models", "broken"):
        assert words in page
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="already contains a report"):
        visionattn.inspect(model, photos, output=folder, progress=False)
    again = visionattn.inspect(model, photos, count=3, masks=4, output=folder, overwrite=True, progress=False, maps=0)
    assert len(again.names) == 3
    assert not (folder / "plan.json").exists()
    assert not (folder / "maps.jpg").exists()


def test_images_in_python_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = visionattn.inspect(vit(num_classes=0, reg_tokens=2), pictures(2), masks=4, progress=False)
    assert found.folder is None
    assert found.plan is None
    assert not found.logits
    assert found.classes == ()
    assert repr(found) == "Inspection(VisionTransformer, 2 layers of 6 x 6 patches, 2 images)"
    assert list(tmp_path.iterdir()) == []


def test_the_command(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "va_minimal_vit_micro_patch4_32"
    assert main(["inspect", name, "--images", str(photos), "--count", "4", "--masks", "2", "--maps", "1"]) == 1
    told = capsys.readouterr()
    assert "blocks.7.attn" in told.out
    assert f"The report is runs/inspect/{name}/report.html" in told.out
    assert "left out: cats/broken.png" in told.err
    assert (tmp_path / "runs" / "inspect" / name / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 1}, "count must be a whole number of at least 2; got 1"),
        ({"masks": True}, "masks must be"),
        ({"budget": 0}, "in \\(0, 1\\]"),
        ({"budget": 1.5}, "in \\(0, 1\\]"),
        ({"policy": "best"}, "'best'|best"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(InputError, match=words):
        visionattn.inspect(vit(), pictures(2), **{"masks": 2, "progress": False, **arguments})


def test_what_cannot_be_pruned_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(importlib.import_module("visionattn.frozen.inspect"), "look", None)
    model = timm.create_model("eva02_tiny_patch14_224", depth=2, img_size=28)
    with pytest.raises(InputError, match="positions in addition to the tokens"):
        visionattn.inspect(model, pictures(2), tokens=True, progress=False)


def test_sinks_have_frames():
    image = Image.new("RGB", (120, 120), "white")
    values = torch.full((1, 9), 0.1)
    values[0, 4] = 0.2
    marked = torch.zeros(1, 9, dtype=torch.bool)
    marked[0, 4] = True
    sheet = np.asarray(contact_sheet([image], [values], [marked], ["last"], (3, 3)))
    assert sheet.shape == (120, 244, 3)
    assert sheet[40, 124 + 60].tolist() == [0x17, 0xBE, 0xCF]
    assert sheet[10, 124 + 110].tolist() == [255, 255, 255]
    assert sheet[60, 124 + 60].tolist() == [255, 255, 64]  # yellow at the largest, a quarter of it grey


def test_normalisation_is_undone():
    pixels = torch.tensor([[[0.0, 1.0]], [[0.5, 0.25]], [[0.2, 0.8]]])
    image = to_image((pixels - 0.5) / 0.25, (0.5,) * 3, (0.25,) * 3)
    assert np.asarray(image).tolist() == [[[0, 128, 51], [255, 64, 204]]]


def test_one_image_is_refused_before_the_work_begins(tmp_path):
    image = Image.new("RGB", (24, 24), "red")
    with pytest.raises(InputError, match=r"requires at least two readable images; .* has 1\."):
        visionattn.inspect(vit(), [image], output=tmp_path / "report", progress=False)
    assert not (tmp_path / "report").exists() or not list((tmp_path / "report").iterdir())
