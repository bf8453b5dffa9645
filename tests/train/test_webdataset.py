"""Training on WebDataset shards, read by timm."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

pytest.importorskip("lightning")
pytest.importorskip("webdataset")

from PIL import Image

from visionattn.train.cli import main


def write_shards(folder):
    """A shard of each split, of three greys, and the file that tells timm what is in them."""
    splits = {}
    for split, count in (("train", 24), ("validation", 12)):
        shard = f"toy-{split}-0000.tar"
        with tarfile.open(folder / shard, "w") as archive:
            for number in range(count):
                picture = io.BytesIO()
                Image.new("RGB", (32, 32), (80 * (number % 3),) * 3).save(picture, "PNG")
                for ending, content in (("png", picture.getvalue()), ("cls", str(number % 3).encode())):
                    entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        splits[split] = {"name": split, "num_samples": count, "filenames": [shard], "shard_lengths": [count]}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))


def test_shards_train_and_are_no_folder_to_measure_a_frozen_backbone_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path)
    data = ["--data.dataset=wds/toy", f"--data.root={tmp_path}", "--data.num_classes=3", "--data.num_workers=1"]
    small = ["--model.name=test_resnet", "--data.image_size=32", "--data.batch_size=8", "--trainer.accelerator=cpu"]
    run = [*data, *small, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"]
    assert main(["fit", *run]) == 0
    output = capsys.readouterr().out
    assert "training: a stream" in output
    assert "accuracy" in output
    assert main(["fit", *run, "--model.report=true"]) == 2
    error = capsys.readouterr().err
    assert (
        "is a stream; a frozen backbone cannot be measured on it: set model.report and model.linear_start to" in error
    )
