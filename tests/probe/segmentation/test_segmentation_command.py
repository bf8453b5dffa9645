"""`visionattn probe --task segmentation` from folder to report."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import visionattn
from tests.probe.scenes import write_scenes
from visionattn.cli import main
from visionattn.errors import DataError, InputError
from visionattn.probe.settings import ProbeSettings

QUICK = ["--random", "--task", "segmentation", "--device", "cpu", "--epochs", "4", "--lrs", "0.01", "--maps", "2"]
QUICK += ["--batch-size", "4"]
OPTIONS = {"task": "segmentation", "random": True, "device": "cpu", "epochs": 1, "lrs": [0.01], "no_pixels": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, {"train": 24, "val": 6})
    return root


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("done")
    words = ["probe", "test_vit", "--data", str(folder), "--image-size", "64x96", "--output", str(path), *QUICK]
    assert main(words) == 0
    return path


def test_the_numbers(done, folder):
    found = json.loads((done / "results.json").read_text())
    assert found["task"] == "segmentation"
    assert found["layers"][0]["grid"] == [4, 6]
    assert [row["class"] for row in found["classes"]] == ["ground", "disc", "square"]
    assert (found["data"]["train_images"], found["data"]["test_images"]) == (24, 6)
    masks = [np.asarray(Image.open(path)) for path in sorted((folder / "val" / "masks").iterdir())]
    counts = sum(np.bincount(mask.flatten(), minlength=3) for mask in masks)
    assert [row["test pixels"] for row in found["classes"]] == counts.tolist()
    heads = {row["head"]: row for row in found["heads"]}
    assert list(heads) == ["linear", "attentive", "pixels"]
    for head in heads.values():
        assert head["miou_low"] <= head["miou"] <= head["miou_high"] <= 1
        mean = np.mean([row[f"{head['head']} iou"] for row in found["classes"]])
        assert head["miou"] == pytest.approx(mean)
    assert heads["pixels"]["layer_index"] is None
    assert heads["pixels"]["miou"] > 0.5  # colours tell these classes apart
    best = max((heads["linear"], heads["attentive"]), key=lambda head: head["held_out"])
    assert found["summary"].startswith(f"Best head: {best['head']}, mIoU {100 * best['miou']:.1f} [")
    other = next(one for one in found["differences"] if one["other"] == "pixels")
    assert other["value"] == pytest.approx(best["miou"] - heads["pixels"]["miou"])
    assert "--image-size=64x96" in found["command"]
    assert "--batch-size=4" in found["command"]


def test_the_files(done):
    with (done / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["head"], row["chosen"]) for row in rows] == [(n, "True") for n in ("linear", "attentive", "pixels")]
    with (done / "classes.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["ground", "disc", "square"]
    page = (done / "report.html").read_text()
    assert page.count("<img") == len(list((done / "examples").glob("*.jpg"))) == 2
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "boundary mIoU" in (done / "report.md").read_text()
    assert Image.open(next((done / "examples").glob("*.jpg"))).width > 3 * 48


def test_the_same_run_goes_on_and_another_is_refused(done, folder):
    before = json.loads((done / "results.json").read_text())
    words = ["probe", "test_vit", "--data", str(folder), "--image-size", "64x96", "--output", str(done), *QUICK]
    assert main(words) == 0
    after = json.loads((done / "results.json").read_text())
    assert after["heads"] == before["heads"]
    assert main([*words, "--seeds", "1"]) == 2


def test_in_python(folder):
    report = visionattn.probe("test_resnet", folder, image_size=64, heads=["linear"], **OPTIONS)
    assert [head.name for head in report.chosen()] == ["linear"]
    assert report.folder is None
    assert report.layers[0].grid == (2, 2)
    assert "mIoU" in report._repr_html_()


def test_live_tokens_give_what_stored_ones_give(folder):
    options = {**OPTIONS, "heads": ["linear"], "image_size": 64}
    stored = visionattn.probe("test_vit", folder, dtype="float32", **options)
    live = visionattn.probe("test_vit", folder, live=True, **options)
    assert live.chosen()[0].scores == stored.chosen()[0].scores


def test_voc_and_ade(tmp_path):
    write_scenes(tmp_path, {"train": 6, "val": 2})
    voc, ade = tmp_path / "voc", tmp_path / "ade"
    for path in (voc / "ImageSets/Segmentation", voc / "JPEGImages", voc / "SegmentationClass"):
        path.mkdir(parents=True)
    for part, name in (("train", "training"), ("val", "validation")):
        stems = [f"{part}{path.stem}" for path in sorted((tmp_path / part / "masks").iterdir())]
        (voc / "ImageSets/Segmentation" / f"{part}.txt").write_text("\n".join(stems))
        for kind in ("images", "annotations"):
            (ade / kind / name).mkdir(parents=True)
        for path in (tmp_path / part / "masks").iterdir():
            image = Image.open(tmp_path / part / "images" / path.name)
            mask = np.array(Image.open(path))
            image.save(voc / "JPEGImages" / f"{part}{path.stem}.jpg")
            image.save(ade / "images" / name / f"{path.stem}.jpg")
            coloured = Image.frombytes("P", image.size, np.where(mask == 2, 255, mask).astype(np.uint8).tobytes())
            coloured.putpalette(list(range(256)) * 3)
            coloured.save(voc / "SegmentationClass" / f"{part}{path.stem}.png")
            Image.fromarray(mask).save(ade / "annotations" / name / path.name)
    found = visionattn.probe("test_vit", voc, image_size=64, **OPTIONS)
    assert found.classes[:2] == ("background", "aeroplane")
    assert found.counts["test pixels"][2:] == [0] * 19
    found = visionattn.probe("test_vit", ade, image_size=64, **OPTIONS)
    assert found.classes == ("0", "1")
    assert min(found.counts["test pixels"]) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "train/masks/003.png").unlink(), r"has no masks for 003\.png"),
        (lambda root: Image.new("L", (9, 9), 1).save(root / "train/masks/001.png"), r"001\.png has 9 x 9 pixels, but"),
        (lambda root: Image.new("RGB", (48, 48)).save(root / "val/masks/000.png"), r"000\.png has the mode RGB"),
        (lambda root: (root / "classes.txt").write_text("a\nb"), r"\.png has the class 2, but there are 2 classes"),
        (lambda root: (root / "val/masks/000.png").write_bytes(b"no"), r"000\.png"),
        (lambda root: whiten(root, 0), r"have 1 class\(es\) besides 255.*replace 255 by 1"),
    ],
)
def test_what_is_refused(change, words, tmp_path):
    write_scenes(tmp_path, {"train": 4, "val": 2}, 48, 49)
    change(tmp_path)
    with pytest.raises(DataError, match=words):
        visionattn.probe("test_vit", tmp_path, image_size=64, **OPTIONS)


def whiten(root, low):
    """Masks of 0 and 255, as many tools write binary ones."""
    for path in root.glob("*/masks/*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask > low, 255, 0).astype(np.uint8)).save(path)


def test_an_image_that_cannot_be_read_is_left_out(tmp_path, capsys):
    write_scenes(tmp_path, {"train": 8, "val": 3})
    (tmp_path / "val" / "images" / "001.png").write_bytes(b"no picture")
    words = ["probe", "test_vit", "--data", str(tmp_path), "--image-size", "64", "--output", str(tmp_path / "out")]
    assert main([*words, *QUICK, "--heads", "linear", "--no-pixels"]) == 1
    assert "left out of test: val/images/001.png" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data"]["test_images"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "depth"}, "task must be one of 'classification', 'segmentation', .*; got 'depth'"),
        ({"task": "segmentation", "few_shot": (1,)}, "--few-shot is an option of the task classification, not of seg"),
        ({"task": "segmentation", "export": "linear"}, "--export is an option of the task classification"),
        ({"classes": "names.txt"}, "--classes is an option of the task segmentation, not of classification"),
        ({"image_size": (64, 96)}, "image_size must be one whole number for classification"),
        ({"task": "regression", "image_size": [64, 96]}, "image_size must be one whole number for regression"),
        ({"task": "segmentation", "image_size": (64, 0)}, "image_size must be a side, or height and width"),
    ],
)
def test_settings(options, words):
    with pytest.raises(InputError, match=words):
        ProbeSettings(**options)


def test_heads_of_other_tasks(folder):
    with pytest.raises(InputError, match="heads of segmentation must be some of 'linear', 'attentive'; got 'ep_32'"):
        visionattn.probe("test_vit", folder, image_size=64, heads=["ep_32"], **OPTIONS)
    with pytest.raises(InputError, match="data must be a folder of images and masks; got tuple"):
        visionattn.probe("test_vit", ([], []), **OPTIONS)
