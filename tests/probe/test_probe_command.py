"""`visionattn probe` on real digits, from the command line to its files."""

import csv
import json
import os
import re
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

from tests.probe.runs import NAME, TINY, pictures, table
from visionattn.card import KEY, Card
from visionattn.checkpoints import create
from visionattn.cli import main
from visionattn.data.classify.datamodule import ClassifyData
from visionattn.export import OnnxModel
from visionattn.opening import open_model
from visionattn.probe import ProbeSettings, work
from visionattn.probe.heads.banks import head_tokens
from visionattn.probe.heads.training import HeadTraining
from visionattn.probe.report.report import load_head
from visionattn.probe.tokens.backbone import Backbone

FEW = ["--heads", "cls,gap,ep_8", "--lrs", "0.01,0.1", "--epochs", "3"]


def command(folder, *more):
    return ["probe", NAME, "--random", "--data", "digits", "--output", str(folder), "--device", "cpu", *more]


@pytest.fixture(scope="module", autouse=True)
def _short_few_shot():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "FEW_SHOT_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe")
    more = ["--layers", "2,5", "--few-shot", "1,5,1000", "--draws", "2", "--maps", "2", "--export", "ep_8"]
    assert main(command(path, *FEW, *more)) == 0
    return path


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_file_is_there(folder, results):
    heads = {f"{pooling}-layer{layer}" for pooling in ("cls", "gap", "ep_8") for layer in (2, 5)}
    assert {path.stem for path in (folder / "heads").glob("*.safetensors")} == heads
    assert {path.stem for path in (folder / "heads").glob("*.md")} == heads
    assert len(list((folder / "maps").glob("*.jpg"))) == 2
    for name in ("report.md", "report.html", "layers.svg", "few_shot.svg", "ep_8.onnx"):
        assert (folder / name).stat().st_size > 0
    assert results["data"]["train_images"] == 1437  # training and validation part
    assert results["data"]["test_images"] == 360
    assert [layer["index"] for layer in results["layers"]] == [2, 5]
    assert any("No head was trained with 1000 images per class" in note for note in results["notes"])
    assert {entry["size"] for entry in results["few_shot"]} == {1, 5}


def test_json_and_csv_agree(folder, results):
    with (folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert lines == [
        {key: "" if value is None else str(value) for key, value in row.items()} for row in results["heads"]
    ]
    assert sum(row["method"] == "head" for row in lines) == 3 * 2 * 2
    assert {row["pooling"] for row in lines if row["method"] == "k-NN"} == {"class", "mean"}


def test_the_page_needs_no_other_file(folder):
    page = (folder / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"<script|<link|href=|url\(|@import", page)


def test_every_value_lies_in_its_interval(results):
    for row in results["heads"]:
        for key, low in (("test_best", "test_best_low"), ("held_out_accuracy", "held_out_low")):
            assert row[low] < row[key] < row[low.replace("_low", "_high")] or row[key] in (0, 1)


def test_the_command_in_the_report_gives_the_same_table_and_computes_nothing(folder, results, monkeypatch, capsys):
    before, page = (folder / "results.csv").read_bytes(), (folder / "report.html").read_bytes()

    def computed(*_, **__):
        raise AssertionError("This was known.")

    monkeypatch.setattr("visionattn.probe.tokens.features._compute", computed)
    monkeypatch.setattr(HeadTraining, "_train_epoch", computed)
    monkeypatch.setattr(work, "nearest_neighbours", computed)
    words = shlex.split(results["command"])
    assert words[0] == "visionattn"
    assert main(words[1:]) == 0
    assert (folder / "results.csv").read_bytes() == before
    assert (folder / "report.html").read_bytes() == page
    shown = capsys.readouterr().out
    for name in ("k-NN class", "cls", "gap", "ep_8"):
        row = next(line for line in shown.splitlines() if line.strip().startswith(name))
        assert re.search(r"\d\d\.\d +\d\d\.\d to \d\d\.\d", row)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_sweep_that_was_killed_ends_with_the_same_table(folder, tmp_path, monkeypatch, number, code):
    more = ["--layers", "2,5", "--few-shot", "", "--maps", "0", "--cache", str(folder / "features")]
    true = HeadTraining._train_epoch
    done = []

    def killed(self, bar):
        done.append(self.epoch)
        if len(done) == 2:
            os.kill(os.getpid(), number)
        return true(self, bar)

    monkeypatch.setattr(HeadTraining, "_train_epoch", killed)
    # Processes that a shell starts in the background ignore SIGINT.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(command(tmp_path, *FEW, *more)) == code
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not (tmp_path / "results.json").exists()
    assert main(command(tmp_path, *FEW, *more)) == 0
    assert done == [0, 1, 1, 2, 0, 1, 2]  # the last three are of the pixels
    assert table(tmp_path) == table(folder)


def test_the_onnx_file_is_backbone_and_head(folder, results):
    exported = OnnxModel(folder / "ep_8.onnx")
    file = exported.spec.weights.split("; ")[1]
    assert exported.spec.dynamic_axes == ["batch"]
    assert exported.spec.labels == [str(digit) for digit in range(10)]
    torch.manual_seed(0)
    model = create(NAME)
    config = resolve_model_data_config(model)
    data = ClassifyData("digits", image_size=28, in_chans=1, mean=list(config["mean"]), std=list(config["std"]))
    data.setup("test")
    loaded = [data.test_dataloader().dataset[number] for number in range(360)]
    images, labels = torch.stack([image for image, _ in loaded]), torch.tensor([label for _, label in loaded])
    index = int(re.search(r"layer(\d+)", file)[1])
    head, backbone = load_head(folder / file), Backbone(model, [index], image_size=28)
    with torch.no_grad():
        expected = head(head_tokens(backbone(images)[0], head.pooling.tokens))
    for count in (1, 7):
        np.testing.assert_allclose(exported(images[:count].numpy())[0], expected[:count], atol=2e-5)
    # Stored tokens are rounded to fp16: an image in 360 may change sides.
    row = next(
        row for row in results["heads"] if (row["pooling"], row["layer_index"], row["chosen"]) == ("ep_8", index, True)
    )
    assert float((expected.argmax(1) == labels).float().mean()) == pytest.approx(row["test_best"], abs=1 / 359)


@pytest.mark.parametrize("live", [[], ["--live"]])
def test_unreadable_images_and_classes_without_test_images_are_told(tmp_path, capsys, live):
    parts = {"train": {"none": 12, "one": 12, "rest": 12}, "test": {"none": 6, "one": 6}}
    data = pictures(tmp_path / "data", parts, ["train/one/3.png", "test/none/0.png"])
    assert main(["probe", NAME, "--random", *data, "--output", str(tmp_path / "out"), *TINY, *live]) == 1
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in told] == ["left out of train", "left out of test"]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(entry["part"], entry["name"]) for entry in content["skipped"]] == [
        ("train", "one/3.png"),
        ("test", "none/0.png"),
    ]
    assert (content["data"]["train_images"], content["data"]["test_images"]) == (35, 11)
    assert any("no test images" in note and "rest" in note for note in content["notes"])
    assert "one/3.png" in (tmp_path / "out" / "report.html").read_text()


def test_one_class_is_refused(tmp_path, capsys):
    data = pictures(tmp_path / "data", {"train": {"one": 5}, "test": {"one": 2}})
    assert main(["probe", NAME, "--random", *data, "--output", str(tmp_path / "out"), *TINY]) == 2
    assert "has only one class" in capsys.readouterr().err


def test_broken_weights_are_refused(tmp_path, capsys):
    state = create(NAME).state_dict()
    state["norm.weight"].fill_(float("nan"))
    save_file(state, tmp_path / "net.safetensors")
    arguments = ["probe", str(tmp_path / "net.safetensors"), "--data", "digits", "--output", str(tmp_path), *TINY]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "holds NaN or infinite values" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", "-1", "at least 1"),
        ("--draws", "0", "at least 1"),
        ("--batch-size", "0", "at least 1"),
        ("--maps", "-1", "at least 0"),
        ("--lrs", "0.1,nan", "finite number above 0"),
        ("--lrs", "inf", "finite number above 0"),
        ("--weight-decays", "-1", "at least 0"),
        ("--seeds", str(2**70), "from 0 to"),
        ("--few-shot", "0", "at least 1"),
        ("--few-shot", "1.5", "at most 1"),
        ("--image-size", "1000000000", "from 1 to 2048"),
        ("--workers", "-1", "from 0 to"),
    ],
)
def test_absurd_numbers_are_refused(tmp_path, capsys, option, value, message):
    assert main(command(tmp_path / "out", f"{option}={value}")) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert option in told
    assert message in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NAME, "--random", "--data", "digits", "--devices", "1000000"], "--devices must be at most"),
        ([NAME, "--random", "--data", ""], "--data must name a folder or a dataset"),
        ([NAME, "--random", "--data", "digits", "--num-classes", "3"], "10 classes, but --num-classes is 3"),
        (
            [NAME, "--random", "--data", "digits", "--seeds", ""],
            "weight_decays and seeds must each have at least one number",
        ),
        ([NAME, "--random", "--data", "digits", "--device", "meta"], "The device 'meta' cannot be used"),
        ([NAME, "--random", "--data", "digits", "--cache", "a" * 300], "File name too long"),
        ([NAME, "--random", "--data", "digits", "--cache", "a\0b"], "null byte"),
        (["va_match_stereo_nano", "--random", "--data", "digits"], "cannot be probed"),
        (["va_halonet_nano_32", "--random", "--data", "digits", "--heads", "cls"], "reads the class token"),
        (["va_span_ch26_x4", "--random", "--data", "digits"], "SPAN cannot be probed"),
        ([NAME, "--data", "digits"], f"No weights are published for {NAME}"),
        ([NAME, "--random", "--data", "mnist"], "needs a folder: set --root"),
        ([NAME, "--random", "--data", "nowhere"], "There is no folder nowhere"),
        ([NAME, "--random", "--data", "digits", "--layers", "9"], "must be from 0 to 5"),
        ([NAME, "--random", "--data", "digits", "--heads", "gap", "--export", "ep_8"], "must be one of the heads gap"),
        ([NAME, "--random", "--data", "digits", "--heads", "wave"], "There is no pooling 'wave'"),
        ([NAME, "--random", "--data", "digits", "--heads", "ep_7"], "out_dim divisible by num_queries"),
        ([NAME, "--random", "--data", "digits", "--device", "moon"], "The device 'moon' cannot be used"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, arguments, message):
    assert main(["probe", *arguments, "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_tokens_are_computed_again(folder, tmp_path, capsys):
    shutil.copytree(folder / "features", tmp_path / "features")
    damaged = next((tmp_path / "features").glob("*/000000.0.patches.bin"))
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 255
    damaged.write_bytes(content)
    more = ["--layers", "2,5", "--few-shot", "", "--maps", "0"]
    assert main(command(tmp_path, *FEW, *more)) == 0
    assert "Shard 0 is extracted again" in " ".join(capsys.readouterr().out.split())
    assert table(tmp_path) == table(folder)


def test_a_weight_file_without_a_classifier_is_read(tmp_path):
    net = create(NAME)
    save_file(create(NAME, num_classes=0).state_dict(), tmp_path / "bare.safetensors")
    save_file(net.state_dict(), tmp_path / "whole.safetensors")
    for file in ("bare", "whole"):
        arguments = [NAME, "--checkpoint", str(tmp_path / f"{file}.safetensors"), "--data", "digits"]
        assert main(["probe", *arguments, "--output", str(tmp_path / file), *TINY]) == 0
        rows = json.loads((tmp_path / file / "results.json").read_text())["heads"]
        assert [row["method"] for row in rows].count("head") == 1


def test_a_weight_file_of_another_model_is_refused(tmp_path, capsys):
    file = tmp_path / "other.safetensors"
    save_file(create("va_minimal_vit_nano_patch4_32").state_dict(), file)
    arguments = ["probe", NAME, "--checkpoint", str(file), "--data", "digits", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    message = r"other.safetensors does not fit \S+: patch_embed.proj.weight is \(64, 3, 7, 7\), not \(64, 1, 7, 7\)"
    assert re.search(message, capsys.readouterr().err)


def test_counters_of_batch_norms_may_be_missing(tmp_path):
    net = create("va_halonet_nano_32")
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "net.safetensors")
    read = open_model("va_halonet_nano_32", tmp_path / "net.safetensors", drop_classifier=True).model
    read = read.state_dict()
    assert len(state) < len(net.state_dict())
    assert all(torch.equal(read[key], value) for key, value in state.items() if key in read)
    assert len(read) == len(net.state_dict()) - 2  # less the classifier's


def test_folders_are_read_as_in_training(tmp_path, capsys):
    root = tmp_path / "data"
    pictures(root, {"train": {"none": 8, "one": 8}, "test": {"none": 4, "one": 4}})
    (root / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copy(root / "train/none/0.png", root / "train/.ipynb_checkpoints/0.png")
    (root / "train/one/night").mkdir()
    for number in range(4):
        Image.open(root / f"train/one/{number}.png").save(root / f"train/one/night/{number}.webp")
        (root / f"train/one/{number}.png").rename(root / f"train/one/{number}.PNG")
    (root / "train/one/notes.txt").write_text("no image")
    assert main(["probe", NAME, "--random", "--data", str(root), *TINY, "--output",
                 str(tmp_path / "out")]) == 0  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "Training images: 18 images in 2 classes (none 7, one 11)." in shown
    assert "Validation images, also used for training: 2 images in 2 classes (none 1, one 1)." in shown
    assert "notes.txt" in shown
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert content["classes"] == ["none", "one"]
    assert any("notes.txt" in note for note in content["notes"])
    (root / "train/empty").mkdir()
    assert main(["probe", NAME, "--random", "--data", str(root), *TINY, "--output",
                 str(tmp_path / "more")]) == 2  # fmt: skip
    assert "no images of the class empty" in capsys.readouterr().err


def test_a_few_images_of_each_class_are_enough(tmp_path, capsys):
    root = tmp_path / "data"
    pictures(
        root, {"train": {"none": 5, "one": 4}, "test": {"none": 2, "one": 2}}
    )  # a tenth is one image of two classes
    assert main(["probe", NAME, "--random", "--data", str(root), *TINY, "--output",
                 str(tmp_path / "out")]) == 0  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "Training images: 6 images in 2 classes" in shown
    assert "Validation images, also used for training: 3 images in 2 classes" in shown


def test_a_checkpoint_of_fit_brings_its_images(images, tmp_path):
    net = create("va_halonet_nano_32", num_classes=2)
    card = Card.of(net, {"input_size": (3, 64, 64), "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.6]})
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, KEY: card.to_dict()}, tmp_path / "best.ckpt")
    for words in (["best.ckpt"], ["va_halonet_nano_32", "--checkpoint", "best.ckpt"]):
        words[-1] = str(tmp_path / words[-1])
        out = tmp_path / str(len(words))
        assert main(["probe", *words, "--data", str(images), *TINY, "--output", str(out)]) == 0
        content = json.loads((out / "results.json").read_text())
        expected = "resized and cropped to 64 x 64 pixels, mean 0.1, 0.2, 0.3, deviation 0.5, 0.5, 0.6"
        assert content["data"]["transform"] == expected


def test_pixels_that_beat_the_backbone_are_said(done, results):
    content = json.loads((done / "results.json").read_text())
    # Bright against dark pictures: pixels are enough.
    methods = [row["method"] for row in content["heads"] if row["pooling"] == "pixels"]
    assert methods == ["pixels k-NN"] * (methods.count("pixels k-NN")) + ["pixels head"]
    wins = [entry for entry in results["pixels"] if entry["pixels_win"]]
    assert wins
    assert "16 x 16 pixels beat the backbone: " in results["summary"]
    assert f"{100 * wins[0]['pixels']:.1f} % against {100 * wins[0]['backbone']:.1f} %" in results["summary"]
    standardized = [row["standardized"] for row in content["heads"] if row["method"] == "k-NN" and row["chosen"]]
    assert standardized == [False, True, False, True]  # of the class token, then of the mean


def test_heads_are_made_where_they_fit():
    backbone = Backbone(create("tf_efficientnet_lite0"), range(5), image_size=64)
    widths = [layer.dim for layer in backbone.layers]
    assert widths == [16, 24, 40, 112, 1280]
    specs, notes = ProbeSettings(lrs=[0.1]).specs(backbone.layers, 10)
    found = {(spec.pooling, spec.layer) for spec in specs}
    fitting = {"gap": range(5), "ep_8": range(5), "ep_16": (0, 3, 4), "ep_32": (4,)}
    assert found == {(pooling, place) for pooling, places in fitting.items() for place in places}
    assert [note.split(" was skipped at ")[0] for note in notes] == ["ep_16", "ep_32"]


def test_two_processes_report_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "FEW_SHOT_STEPS", 200)  # other processes do not see the module's shorter few-shot
    small = ["--heads", "gap,ep_8", "--lrs", "0.01,0.1", "--epochs", "2", "--few-shot", "5", "--draws", "1"]
    tables = {}
    for devices in (1, 2):
        path = tmp_path / str(devices)
        assert main(command(path, *small, "--devices", str(devices))) == 0
        found = json.loads((path / "results.json").read_text())
        tables[devices] = found["heads"], found["few_shot"]
        assert (path / "report.html").exists()
    # k-NN is the same to the bit; in a bank of heads the order of sums depends on how many there are.
    for row, other in zip(*(heads for heads, _ in tables.values()), strict=True):
        assert (row["pooling"], row["lr"]) == (other["pooling"], other["lr"])
        allowed = 0 if row["method"] == "k-NN" else 3 / 360
        assert row["test_best"] == pytest.approx(other["test_best"], abs=allowed + 1e-12)
    for row, other in zip(*(few for _, few in tables.values()), strict=True):
        assert row["mean"] == pytest.approx(other["mean"], abs=5 / 360)


def test_an_error_of_several_processes_is_said_once(tmp_path, capsys, monkeypatch):
    # Forked, which spares them the imports; the test above starts them as the command does.
    monkeypatch.setattr("lightning.fabric.Fabric", lambda **given: Fabric(**{**given, "strategy": "ddp_fork"}))
    assert main(command(tmp_path, "--heads", "gap,dolgx", "--devices", "2")) == 2
    assert "dolgx" in capsys.readouterr().err
