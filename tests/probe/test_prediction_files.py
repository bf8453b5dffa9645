"""Masks of saved segmentation heads: the report's own figures follow from them, at any size of images."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.probe.scenes import NAMES, write_scenes
from visionattn.cli import main
from visionattn.data.segment.masks import PALETTE, read_mask
from visionattn.errors import CheckpointError, InputError
from visionattn.metrics.segmentation import count_boundary, count_pixels, iou, mean_iou, pixel_accuracy
from visionattn.probe import apply_head, load_head, open_classifier

# Live tokens, as `predict` computes them: stored ones are rounded, so that single pixels could change their class.
QUICK = ["--random", "--task", "segmentation", "--device", "cpu", "--epochs", "4", "--lrs", "0.01", "--maps", "0"]
QUICK += ["--live", "--batch-size", "4", "--image-size", "64x96", "--no-pixels"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, {"train": 24, "val": 6})
    return root


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("done")
    words = ["probe", "test_vit", "--data", str(folder), "--output", str(path), *QUICK]
    assert main(words) == 0
    return path


@pytest.fixture(scope="module")
def head(done):
    return next((done / "heads").glob("attentive-*.safetensors"))


def predict(head, images, output, *more):
    return main(["predict", str(images), "--head", str(head), "--output", str(output), "--device", "cpu", *more])


def test_masks_give_the_figures_of_the_report(done, folder, tmp_path):
    report = json.loads((done / "results.json").read_text())
    assert report["data"]["image_size"] == [64, 96]
    assert {path.name for path in (done / "heads").iterdir()} == {
        f"{name}-layer5{suffix}" for name in ("linear", "attentive") for suffix in (".safetensors", ".md")
    }
    for entry in report["heads"]:
        output = tmp_path / entry["head"]
        assert predict(done / f"heads/{entry['head']}-layer5.safetensors", folder / "val/images", output) == 0
        pixels, boundaries = [], []
        for truth in sorted((folder / "val/masks").iterdir()):
            pair = [torch.from_numpy(read_mask(path).astype(int)) for path in (output / truth.name, truth)]
            pixels.append(count_pixels(*pair, 3))
            boundaries.append(count_boundary(*pair, 3))
        assert len(pixels) == 6
        assert entry["miou"] == float(mean_iou(sum(pixels)))
        assert entry["pixel_accuracy"] == float(pixel_accuracy(sum(pixels)))
        assert entry["boundary_iou"] == float(mean_iou(sum(boundaries)))
        assert [row[f"{entry['head']} iou"] for row in report["classes"]] == iou(sum(pixels)).tolist()


def test_the_files(head, folder, tmp_path, capsys):
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    pixels = np.asarray(Image.open(folder / "val/images/000.png"))
    Image.fromarray(pixels).save(images / "a.png")
    Image.fromarray(pixels[:30, :11, 0]).save(images / "more" / "b.webp", lossless=True)
    Image.fromarray(pixels.repeat(4, 0)).save(images / "more" / "c.tif")
    output = images / "masks"  # inside of the inputs: its files are not inputs of the next run
    assert predict(head, images, output, "--color") == 0
    assert capsys.readouterr().out.count("wrote ") == 3
    assert json.loads((output / "classes.json").read_text()) == [
        {"label": label, "class": name, "color": PALETTE[label].tolist()} for label, name in enumerate(NAMES)
    ]
    names = ("a.png", "more/b.png", "more/c.png")
    applied = apply_head(images, head, device="cpu")
    known = dict(zip(applied.images, applied.masks))
    for name, source in zip(names, ("a.png", "more/b.webp", "more/c.tif")):
        with Image.open(output / name) as mask:
            assert mask.mode == "P"
            assert mask.getpalette() == PALETTE.ravel().tolist()
            found = np.asarray(mask)
        assert found.shape == Image.open(images / source).size[::-1]
        assert np.array_equal(found, known[source])
        overlay = np.asarray(Image.open((output / name).with_name(f"{(output / name).stem}_color.png")), float)
        grey = np.asarray(Image.open(images / source).convert("L"), float)[:, :, None]
        np.testing.assert_allclose(overlay, 0.4 * grey + 0.6 * PALETTE[found], atol=0.51)
    before = (output / "a.png").stat().st_mtime_ns
    assert predict(head, images, output, "--color") == 1
    assert capsys.readouterr().out.count("exists. Use --overwrite to replace it, or --skip-existing to keep it") == 3
    assert predict(head, images, output, "--color", "--skip-existing") == 0
    assert (output / "a.png").stat().st_mtime_ns == before
    assert predict(head, images, output, "--color", "--overwrite") == 0
    assert (output / "a.png").stat().st_mtime_ns > before
    assert not (output / "masks").exists()


def test_arrays_and_files_give_the_same(head, folder):
    files = sorted((folder / "val/images").iterdir())
    arrays = [np.asarray(Image.open(file)) for file in files]
    from_files, from_arrays = apply_head(files, head, device="cpu"), apply_head(arrays, head, device="cpu")
    assert (from_files.task, from_files.classes) == ("segmentation", NAMES)
    assert [mask.shape for mask in from_arrays.masks] == [array.shape[:2] for array in arrays]
    assert {mask.dtype for mask in from_arrays.masks} == {np.dtype(np.uint8)}
    assert all(map(np.array_equal, from_files.masks, from_arrays.masks))
    shares = [[(mask == label).mean() for label in range(3)] for mask in from_files.masks]
    np.testing.assert_allclose(from_files.probabilities.numpy(), shares, rtol=1e-6)
    assert from_files.top()[0][0] == (NAMES[int(np.argmax(shares[0]))], pytest.approx(max(shares[0])))


def test_an_opened_head(head, folder):
    classifier = open_classifier(head, device="cpu")
    image = classifier.transform(Image.open(folder / "val/images/000.png"))
    assert image.shape == (3, 64, 96)
    both = classifier(torch.stack([image, image.flip(2)]))
    assert both.shape == (2, 24, 3)
    torch.testing.assert_close(both.sum(2), torch.ones(2, 24))
    # At the size of the grid nothing is interpolated.
    assert classifier.segment(image, (4, 6)).ravel().tolist() == both[0].argmax(1).tolist()
    assert torch.equal(classifier.transform(image), image)
    logits = load_head(head)(classifier.backbone(image[None])[0].patches)
    torch.testing.assert_close(logits.softmax(2)[0], both[0], rtol=1e-5, atol=1e-6)


def test_what_is_refused(head, folder, tmp_path, capsys):
    images = folder / "val/images"
    torch.save(timm.create_model("test_vit", img_size=(64, 96)).state_dict(), tmp_path / "net.pth")
    for more, words in (
        (["--top", "2"], "--top is for heads of classification; "),
        (["--probabilities"], "--probabilities is for heads of classification or multilabel or regression; "),
        (["--backbone", "test_vit", "--checkpoint", str(tmp_path / "net.pth")], "was trained on test_vit with other w"),
    ):
        assert predict(head, images, tmp_path / "masks", *more) == 2
        err = capsys.readouterr().err
        assert words in err
        assert len(err.splitlines()) == 1
    assert predict(head, images, tmp_path / "found.csv") == 2
    assert "Masks are written to a folder, not to a file: " in capsys.readouterr().err
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(head.read_bytes()[:-100])
    assert predict(damaged, images, tmp_path / "masks") == 2
    assert "damaged.safetensors is not a head written by `visionattn probe`" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/classes.json").write_text("[]")
    assert predict(head, images, tmp_path / "masks") == 2
    assert "classes.json has other classes than the head" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is not a head"):
        load_head(damaged)


def test_one_bad_image_does_not_end_the_run(head, folder, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes((folder / "val/images/000.png").read_bytes())
    (images / "b.png").write_bytes(b"no picture")
    assert predict(head, images, tmp_path / "masks") == 1
    out = capsys.readouterr().out
    assert "b.png" in next(line for line in out.splitlines() if line.startswith("failed: "))
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.png", "classes.json"]
    assert predict(head, images, images, "--overwrite") == 1
    assert "the output would replace the input" in capsys.readouterr().out


def test_masks_require_a_head_of_segmentation(done, head):
    classifier = open_classifier(head, device="cpu")
    classifier.head = torch.nn.Identity()
    classifier.task = "regression"
    with pytest.raises(InputError, match="Masks require a head for segmentation; this is a head for regression"):
        classifier.segment(torch.zeros(3, 64, 96), (64, 96))
