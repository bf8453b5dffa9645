"""Users' mistakes, command by command: one line that names what was given, exit code 2, no traceback, nothing written.

Commands run in this process, in a folder with the files of `place`. A row is a command line and what its message says.
"""

import builtins
import os
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.cli import main

SR, STEREO, VIT = "va_span_ch26_x2", "va_match_stereo_nano", "va_minimal_vit_micro_patch4_32"
LONG = "n" * 300

MISTAKES = [
    # list, show, and no command at all
    ("", r"required: COMMAND\. See visionattn --help"),
    ("lost", r"invalid choice: 'lost'"),
    ("list resnet", r"No model name fits 'resnet'"),
    ("list a b", r"unrecognized arguments: b"),
    ("show", r"required: name\. See visionattn show --help"),
    ("show va_span_ch99_x2", r"There is no model 'va_span_ch99_x2'\. Did you mean va_span"),
    ("show good.png", r"good\.png is a file: show takes the name of a model"),
    (f"show {LONG}", r"There is no model"),
    # export
    ("export", r"one of the arguments --output --bundle is required"),
    ("export --output a.onnx", r"A model is required: its name, a weight file, or --head FILE"),
    ("export --head lost.safetensors --output a.onnx", r"There is no file lost\.safetensors"),
    ("export --head broken.pth --output a.onnx", r"broken\.pth is not a head"),
    ("export --head broken.pth --output a.onnx --num-classes 2", r"leave out --num-classes"),
    ("export va_span --output a.onnx", r"There is no model 'va_span'"),
    ("export absent.ckpt --output a.onnx", r"There is no file absent\.ckpt"),
    (f"export {SR}.bogus --output a.onnx", r"[Ii]nvalid pretrained tag"),
    (f"export {SR} --output a.tflite", r"a\.tflite: the file name must end in \.onnx"),
    (f"export {SR} --output taken.onnx", r"taken\.onnx exists\. Give --overwrite"),
    (f"export {SR} --output photos.onnx", r"photos\.onnx: it is a folder"),
    (f"export {SR} --output pipe.onnx", r"pipe\.onnx: it is not a regular file"),
    (f"export {SR} --output notes.txt/a.onnx", r"notes\.txt.*Not a directory"),
    (f"export {SR} --output {LONG}.onnx", r"File name too long"),
    (f"export {SR} --output a.onnx --opset 3", r"operator set must be from 18 to \d+; got 3"),
    (f"export {SR} --output a.onnx --opset 1.5", r"argument --opset: .*'1\.5'"),
    (f"export {SR} --output a.onnx --image-size 0 0", r"input size must be .*; got 0 x 0"),
    (f"export {SR} --output a.onnx --image-size 1000000 1000000", r"at most .*; got 1000000 x 1000000"),
    (f"export {SR} --output a.tflite --int8", r"a\.tflite: the file name must end in \.onnx or \.ort or \.pt2"),
    (f"export {SR} --output a.onnx --format ort", r"a\.onnx must end in \.ort for this format: rename it"),
    (f"export {SR} --output a.onnx --format tflite", r"argument --format: invalid choice: 'tflite'"),
    (f"export {SR} --output a.pt2 --int8", r"no variants: leave out --int8"),
    (f"export {SR} --output a.onnx --int8 photos", r"photos contains 4 images; calibration needs at least 8"),
    (f"export {SR} --output a.onnx --int8 absent", r"no folder absent"),
    (f"export {SR} --output a.onnx --int8 notes.txt", r"no folder notes\.txt"),
    (f"export {SR} --output a.onnx --int8 empty", r"no images in empty"),
    (f"export {SR} --output a.onnx --fp16 --test-data empty", r"no images in empty"),
    (f"export {STEREO} --output a.onnx --int8 photos", r"photos holds no stereo pair with ground truth"),
    (
        "export va_cca_vit_tiny_patch16_224 --output a.onnx --fp16",
        r"Variants require a task among .* has the task 'retrieve'",
    ),
    (f"export {SR} --output a.onnx --batch 0", r"argument --batch: must be a whole number from 1"),
    (f"export {SR} --output 'n\0ul.onnx'", r"embedded null"),
    (f"export {VIT} --output a.onnx --num-classes -1", r"argument --num-classes: must be a whole number"),
    (f"export {VIT} --output a.onnx --checkpoint absent.pth", r"absent\.pth"),
    (f"export {VIT} --output a.onnx --checkpoint notes.txt", r"notes\.txt"),
    (f"export {VIT} --output a.onnx --checkpoint photos", r"photos"),
    (f"export {VIT} --output a.onnx --checkpoint other.pth", r"other\.pth does not fit"),
    ("export broken.pth --output a.onnx", r"broken\.pth"),
    ("export other.pth --output a.onnx", r"other\.pth fits no model"),
    ("export photos --output a.onnx", r"photos holds no config\.json"),
    ("export other.pth --num-classes 3 --output a.onnx", r"leave out --num-classes"),
    (f"export {SR}", r"one of the arguments --output --bundle is required"),
    (f"export {SR} --bundle photos", r"The folder photos holds other files"),
    (f"export {SR} --bundle notes.txt", r"notes\.txt is not a folder"),
    (f"export {SR} --bundle new --output a.onnx", r"not allowed with argument"),
    (f"export {SR} --bundle new --format ort", r"leave out --format, --no-check and"),
    # check
    ("check", r"required: FILE"),
    ("check absent.onnx", r"There is no file absent\.onnx"),
    ("check broken.onnx", r"broken\.onnx is not an ONNX file, or is truncated"),
    ("check good.png", r"good\.png is not an ONNX file"),
    ("check photos", r"There is no file photos"),
    ("check pipe.onnx", r"There is no file pipe\.onnx"),
    ("check broken.onnx --json taken.onnx", r"taken\.onnx: the file name must end in \.json"),
    ("check broken.onnx --image-size 0 3", r"argument --image-size: must be a whole number from 1"),
    ("check broken.onnx --model va_lost", r"There is no model 'va_lost'"),
    ("check broken.onnx --checkpoint absent.pth", r"absent\.pth"),
    # upscale
    ("upscale good.png", r"required: .*output"),
    ("upscale absent.png a.png", r"absent\.png"),
    ("upscale 'n\0ul.png' a.png", r"There is no file or folder n"),
    (f"upscale {LONG}.png a.png", r"nnn \.\.\. nnn"),
    ("upscale empty out", r"empty contains no image"),
    ("upscale good.png notes.txt/a.png", r"notes\.txt"),
    (f"upscale good.png a.png --model {VIT}", r"it is a 'classify' model; a 'restore' model is required"),
    (f"upscale good.png a.png --model {STEREO}", r"it is a 'stereo' model; a 'restore' model is required"),
    ("upscale good.png a.png --model va_lost", r"There is no model 'va_lost'"),
    ("upscale good.png a.png --model absent.pth", r"absent\.pth"),
    ("upscale good.png a.png --model broken.pth", r"broken\.pth"),
    ("upscale good.png a.png --model absent.onnx", r"There is no file absent\.onnx"),
    ("upscale good.png a.png --model broken.onnx", r"cannot load broken\.onnx"),
    ("upscale good.png a.png --scale 7", r"argument --scale: invalid choice: '?7'?"),
    ("upscale good.png a.png --memory inf", r"memory must be more than 0 .* got inf"),
    ("upscale good.png a.png --memory none", r"argument --memory"),
    ("upscale good.png a.png --overlap -1", r"overlap"),
    ("upscale good.png a.png --width 0", r"argument --width: must be a whole number of at least 1; got '0'"),
    ("upscale good.png a.png --height 1e9", r"argument --height: must be a whole number of at least 1"),
    ("upscale good.png a.png --width 9999999999", r"width must be from 1 to 1048576 pixels; got 9999999999"),
    ("upscale good.png a.jpg --quality 101", r"argument --quality: must be a whole number from 1 to 100"),
    ("upscale good.png a.jpg --format png", r"suffix of a\.jpg determines the format: leave out --format"),
    ("upscale photos out --format gif", r"argument --format: invalid choice: '?gif'?"),
    ("upscale good.png a.png --engine tpu", r"argument --engine: invalid choice: 'tpu'"),
    ("upscale good.png a.png --precision int8", r"argument --precision: invalid choice: 'int8'"),
    # stereo and flow
    ("stereo good.png", r"required: right"),
    ("stereo good.png good.png --calibration absent.txt", r"absent\.txt"),
    ("stereo good.png good.png --calibration notes.txt", r"notes\.txt must be Middlebury"),
    ("stereo good.png good.png --calibration notes.txt --focal 3", r"file already gives --focal: leave that out"),
    ("stereo good.png good.png a.pfm --fy 3", r"--fy requires --focal and --baseline"),
    ("stereo absent.png good.png a.pfm", r"absent\.png"),
    ("stereo good.png absent.png a.pfm", r"absent\.png"),
    ("stereo good.png empty out", r"empty"),
    (f"stereo good.png good.png a.pfm --model {SR}", r"'restore'"),
    ("stereo good.png good.png a.pfm --model broken.pth", r"broken\.pth"),
    ("stereo good.png good.png a.pfm --model broken.onnx", r"broken\.onnx"),
    ("stereo good.png good.png a.pfm --focal nan", r"argument --focal: must be a finite number"),
    ("stereo good.png good.png a.pfm --doffs inf", r"argument --doffs: must be a finite number"),
    ("stereo good.png good.png a.pfm --enlarge 0", r"argument --enlarge"),
    ("stereo good.png good.png a.pfm --principal-point 1", r"argument --principal-point: expected 2"),
    ("flow good.png a.flo", r"."),
    ("flow absent.png good.png a.flo", r"absent\.png"),
    ("flow good.png good.png a.flo --model va_lost", r"There is no model 'va_lost'"),
    (f"flow good.png good.png a.flo --model {SR}", r"'restore'"),
    # index and search
    ("index photos out", r"required: --model"),
    (f"index absent out --model {VIT}", r"absent"),
    (f"index empty out --model {VIT}", r"no images in empty"),
    (f"index notes.txt out --model {VIT}", r"no folder notes\.txt"),
    ("index photos out --model va_lost", r"There is no model 'va_lost'"),
    (f"index photos out --model {SR}", r"va_span|SPAN"),
    (f"index photos out --model {STEREO}", r"stereo|Stereo"),
    ("index photos out --model broken.pth", r"broken\.pth"),
    (f"index photos out --model {VIT} --image-size 0 0", r"argument --image-size"),
    (f"index photos out --model {VIT} --nearest flat", r"argument --nearest: invalid choice: '?flat'?"),
    ("search empty good.png --attribute colour", r"empty"),
    ("search absent good.png --attribute colour", r"absent"),
    ("search notes.txt good.png --attribute colour", r"notes\.txt"),
    ("search damaged good.png --attribute colour", r"damaged"),
    ("search photos good.png", r"photos holds no index"),
    ("search photos good.png --checkpoint absent.pth", r"photos holds no index"),
    (f"index photos out --model {VIT} --checkpoint absent.pth", r"absent\.pth"),
    ("duplicates photos", r"photos holds no index"),
    ("duplicates absent", r"absent"),
    ("duplicates damaged", r"damaged"),
    ("duplicates photos --threshold 0", r"argument --threshold: must be a finite number above 0"),
    ("duplicates photos --threshold nan", r"argument --threshold: must be a finite number above 0"),
    ("search photos good.png --attribute colour --top 0", r"argument --top: must be a whole number"),
    # evaluate
    ("evaluate", r"required|following arguments"),
    ("evaluate lost", r"invalid choice: 'lost'"),
    (f"evaluate sr {SR}", r"required: --data"),
    (f"evaluate sr {SR} --data absent", r"absent"),
    (f"evaluate sr {SR} --data empty", r"no images in empty"),
    (f"evaluate sr {SR} --data photos --low-resolution empty", r"no images in empty"),
    (f"evaluate sr {VIT} --data photos", rf"{VIT} cannot be used here: it is a 'classify' model"),
    ("evaluate sr va_lost --data photos", r"There is no model 'va_lost'"),
    ("evaluate sr broken.pth --data photos", r"broken\.pth"),
    (f"evaluate sr {SR} --data photos --scale 0", r"argument --scale"),
    (f"evaluate sr {SR} --data photos --jpeg 101", r"argument --jpeg"),
    (f"evaluate sr {SR} --data photos --output taken.csv", r"taken\.csv exists"),
    (f"evaluate sr {SR} --data photos --device gpu7", r"gpu7"),
    (f"evaluate stereo {STEREO} --data absent", r"absent"),
    (f"evaluate stereo {STEREO} --data empty", r"empty"),
    (f"evaluate stereo {SR} --data scene", r"'restore'"),
    ("evaluate stereo va_lost --data scene", r"There is no model 'va_lost'"),
    (f"evaluate stereo {STEREO} --data photos --layout kitti", r"photos|invalid choice"),
    (f"evaluate stereo {STEREO} --data photos --enlarge nan", r"argument --enlarge"),
    ("evaluate retrieval --data absent.csv", r"absent\.csv"),
    ("evaluate retrieval --data pipe.onnx", r"pipe\.onnx"),
    ("evaluate retrieval --data notes.txt", r"notes\.txt"),
    ("evaluate retrieval --data table.csv --images photos --split lost", r"lost"),
    ("evaluate retrieval --data table.csv --images photos --attributes smell", r"smell"),
    (f"evaluate retrieval {STEREO} --data table.csv --images photos", r"stereo|Stereo"),
    # probe
    ("probe", r"required: NAME\|CKPT, --data"),
    ("probe va_lost --data digits", r"There is no model 'va_lost'"),
    (f"probe {VIT} --data lost", r"lost"),
    (f"probe {VIT} --data absent", r"absent"),
    (f"probe {VIT} --data empty", r"empty"),
    (f"probe {VIT} --data digits --epochs 0", r"[Ee]pochs"),
    (f"probe {VIT} --data digits --lrs nan", r"--lrs: must be a finite number above 0; got 'nan'"),
    (f"probe {VIT} --data digits --heads lost", r"lost"),
    (f"probe {VIT} --data digits --layers 99", r"99"),
    (f"probe {VIT} --data digits --checkpoint broken.pth", r"broken\.pth"),
    (f"probe {VIT} --data digits --output notes.txt", r"notes\.txt"),
    (f"probe {VIT} va_lost --random --data digits", r"There is no model 'va_lost'"),
    (f"probe {VIT} {VIT}=broken.pth --data digits", r"No weights are published|broken\.pth"),
    (f"probe {VIT} {VIT} --random --data digits", r"is given twice"),
    ("probe --compare photos", r"photos is not the folder of a report"),
    (f"probe {VIT} --compare photos", r"--compare accepts only reports"),
    (f"probe {VIT} --random --data photos --embed notes.txt", r"notes\.txt"),
    (f"probe {VIT} --random --data lost --embed new.npz", r"There is no file or folder lost"),
    ("probe torchvision/lost --random --data digits", r"There is no model 'torchvision/lost'"),
    ("probe torchvision/resnet18 --data digits", r"needs --checkpoint FILE"),
    ("predict photos --head broken.pth", r"broken\.pth is not a head"),
    ("predict photos --head lost.safetensors", r"There is no file lost\.safetensors"),
    ("predict photos --head lost.safetensors --color --output notes.txt", r"There is no file lost\.safetensors"),
    ("predict --head lost.safetensors", r"required: IMAGE"),
    ("probe broken.pth --data digits", r"broken\.pth"),
    (f"probe {VIT} --data digits --task depth", r"invalid choice: 'depth'"),
    (f"probe {VIT} --data empty --task segmentation", r"empty must have one of the layouts"),
    (f"probe {VIT} --data empty --task segmentation --classes lost.txt", r"empty must have one of the layouts"),
    (f"probe {VIT} --data empty --task segmentation --few-shot 5", r"--few-shot is an option of the task classific"),
    (f"probe {VIT} --data digits --image-size 64x96", r"image_size must be one whole number"),
    (f"probe {VIT} --data empty --task multilabel", r"empty must hold labels\.csv or labels\.json; it has neither"),
    (f"probe {VIT} --data notes.txt --task regression", r"must be a \.csv or \.json file"),
    (
        f"probe {VIT} {VIT}2 --data empty --task regression",
        r"compared for classification only; got the task 'regression'",
    ),
    # inspect
    ("inspect", r"required: NAME\|CKPT, --images"),
    (f"inspect {VIT}", r"required: --images"),
    ("inspect va_minimal --images photos", r"There is no model 'va_minimal'"),
    ("inspect absent.ckpt --images photos", r"absent\.ckpt"),
    (f"inspect {VIT} --images absent", r"no file or folder absent"),
    (f"inspect {VIT} --images empty", r"no images in empty"),
    (f"inspect {VIT} --images photos --budget 0", r"argument --budget: must be a finite number above 0"),
    (f"inspect {VIT} --images photos --budget 1.5", r"argument --budget: .*at most 1; got '1\.5'"),
    (f"inspect {VIT} --images photos --policy best", r"policy must be 'all' or some of .*; got .*best"),
    (f"inspect {VIT} --images photos --count 1", r"argument --count: must be a whole number of at least 2"),
    (f"inspect {VIT} --images photos --output notes.txt", r"notes\.txt is not a folder"),
    (f"inspect {VIT} --images photos --device tpu", r"tpu"),
    ("inspect va_halonet_h0 --random --images photos", r"do not call .*scaled_dot_product_attention"),
    # arena
    ("arena windows", r"There is no mixer 'windows': did you mean 'window'\?"),
    (
        "arena hsa --tasks recal",
        r"argument --tasks: must be one of 'cost', .*; got 'recal'",
    ),
    ("arena hsa --tasks ''", r"requires at least one task"),
    ("arena hsa --grid 14,1", r"argument --grid: must be a whole number from 2 to 512; got '1'"),
    ("arena hsa --grid large", r"argument --grid: must be a whole number from 2 to 512; got 'large'"),
    ("arena hsa --seeds 0", r"argument --seeds: must be a whole number of at least 1; got '0'"),
    ("arena hsa --data absent", r"absent"),
    ("arena hsa --data photos", r"photos must contain the folders train and test"),
    ("arena hsa --device tpu", r"The device 'tpu' cannot be used"),
    ("arena hsa --output notes.txt", r"notes\.txt is not a folder"),
    # demo
    ("demo --port 70000", r"must be a whole number from 0 to 65535; got '70000'"),
    ("demo --port web", r"must be a whole number from 0 to 65535; got 'web'"),
    ("demo page", r"unrecognized arguments: page"),
    # quickstart
    ("quickstart moon", r"station must be one of .*; got 'moon'"),
    ("quickstart classify --output notes.txt", r"Cannot write to the folder notes\.txt/classify"),
    ("quickstart classify --output mine", r"mine/classify contains other files"),
    # training
    ("fit --config lost", r"lost"),
    ("fit --config absent.yaml", r"absent\.yaml"),
    ("fit --config notes.txt", r"notes\.txt must hold settings"),
    ("fit --config photos", r"photos"),
    ("fit --config minimal_vit_digits --trainer.max_epochs many", r"max_epochs"),
    ("fit --config minimal_vit_digits --model.name va_lost", r"va_lost"),
    ("fit --config minimal_vit_digits --model.lost 3", r"lost"),
    ("fit --config minimal_vit_folder --data.root absent", r"absent"),
    ("fit --config minimal_vit_folder --data.root empty", r"empty"),
    ("fit lost photos", r"There is no file or recipe 'lost'"),
    ("fit finetune_folder absent", r"absent"),
    ("fit finetune_folder empty --model.pretrained false", r"empty"),
    ("fit finetune_folder photos --model.checkpoint lost.pth", r"lost\.pth|photos"),
    ("fit minimal_vit_digits --model.name broken.pth", r"broken\.pth"),
    ("fit minimal_vit_digits --model.checkpoint broken.pth", r"broken\.pth"),
    ("fit minimal_vit_digits --model.freeze 99", r"model\.freeze must be 0 to"),
    ("fit minimal_vit_digits --model.head_epochs -1", r"model\.head_epochs at least 0"),
    ("test broken.pth photos --output notes.txt", r"broken\.pth"),
    ("fit --config minimal_vit_digits --ckpt_path broken.pth", r"broken\.pth"),
    ("validate --ckpt_path absent.ckpt", r"absent\.ckpt"),
    ("test --ckpt_path broken.pth", r"broken\.pth"),
    ("predict --ckpt_path other.pth", r"other\.pth"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with good, broken and misplaced files."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("photos", "empty", "photos.onnx", "mine/classify", "damaged", "scene"):
        (folder / name).mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    views = "scene/im2.png", "scene/im6.png", "scene/disp2.png"
    for name in ("good.png", *(f"photos/{name}.png" for name in "abcd"), "mine/classify/a.png", *views):
        image.save(folder / name)
    for name in ("notes.txt", "broken.pth", "broken.onnx", "taken.onnx", "taken.csv", "taken.pfm", "taken.png"):
        (folder / name).write_text("these are some notes\n")
    (folder / "table.csv").write_text("id,split,colour\n" + "".join(f"{name}.png,test,red\n" for name in "abcd"))
    (folder / "damaged" / "manifest.json").write_text("{}")
    torch.save({"lost.weight": torch.zeros(2, 3), "stem.conv.weight": torch.zeros(2, 3)}, folder / "other.pth")
    os.mkfifo(folder / "pipe.onnx")
    return folder


# What a batch cannot do: exit code 1, the failures on standard output.
FAILURES = [
    ("upscale notes.txt a.png", r"notes\.txt is not an image"),
    ("upscale good.png a.xyz", r"cannot write a\.xyz: its suffix is none of"),
    ("upscale good.png taken.png", r"taken\.png exists\. Use --overwrite"),
    ("stereo good.png good.png a.xyz", r"cannot write a\.xyz: its suffix is none of"),
    ("stereo good.png good.png taken.pfm", r"taken\.pfm exists\. Use --overwrite"),
    ("stereo good.png notes.txt a.pfm", r"notes\.txt is not an image"),
]


def _listing(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def _told(capsys, arguments):
    code = main(arguments)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.count("\n") == 1, told
    assert len(told) < 1200
    assert code == 2, (code, told)
    return told


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line[:60] for line, _ in MISTAKES])
def test_a_mistake_is_told_on_one_line(place, monkeypatch, capsys, line, message):
    monkeypatch.chdir(place)
    before = _listing(place)
    told = _told(capsys, shlex.split(line))
    assert re.search(message, told), told
    assert _listing(place) == before


@pytest.mark.parametrize(("line", "message"), FAILURES)
def test_a_failure_of_a_batch_is_listed(place, monkeypatch, capsys, line, message):
    monkeypatch.chdir(place)
    before = _listing(place)
    assert main(shlex.split(line)) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(message, out), out
    assert _listing(place) == before


@pytest.mark.parametrize("calls", [[(os, "listdir"), (os, "scandir")], [(builtins, "open")]], ids=["folder", "file"])
@pytest.mark.parametrize("line", [f"index photos out --model {VIT}", f"evaluate sr {SR} --data photos"])
def test_no_permission_is_told(place, monkeypatch, capsys, line, calls):
    """Simulated, since tests may run as root, whom nothing is forbidden."""
    monkeypatch.chdir(place)

    def refusing(real):
        def call(path, *args, **kwargs):
            if isinstance(path, (str, os.PathLike)) and "photos" in os.fspath(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        return call

    for module, name in calls:
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    assert main(shlex.split(line)) in (1, 2)
    out, err = capsys.readouterr()
    assert "Permission denied" in out + err
    assert "photos" in out + err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("line", "package", "extra"),
    [
        (f"export {SR} --output a.onnx", "onnx", "export"),
        (f"export {SR} --output a.onnx", "onnxscript", "export"),
        ("upscale good.png a.png --model broken.onnx", "onnxruntime", "export"),
        ("search damaged good.png --attribute colour", "faiss", "search"),
        ("duplicates damaged", "faiss", "search"),
        ("fit --config minimal_vit_digits", "lightning", "train"),
        ("quickstart classify", "lightning", "all"),
    ],
)
def test_a_missing_package_names_its_extra(place, monkeypatch, capsys, line, package, extra):
    monkeypatch.chdir(place)
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    before = _listing(place)
    told = _told(capsys, shlex.split(line))
    assert re.search(rf"pip install 'visionattn\[{extra}\]'", told), told
    assert _listing(place) == before
