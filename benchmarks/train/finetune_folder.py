"""Fine-tuning on a small folder of product photographs against k-NN on the frozen backbone.

    python -m benchmarks.train.finetune_folder --data FOLDER --weights FILE [--seeds 0 1 2]

FOLDER holds attributes.csv and images.zip of fashion products. Of each of five kinds of shoes, 111 photographs are
drawn by the seed: 61 to train, 15 to validate, 35 to test, 555 in all. `visionattn fit finetune_folder` trains with its
defaults, and chooses by the validation images. k-NN of the frozen backbone, on the mean of its last tokens and on what
its classifier reads, has the training and the validation images; the better by held-out training images counts. Both
are tested on the same images; p is McNemar's exact test. Seconds are those of the whole command in a process of its
own, the measuring of the frozen backbone and the report included.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset

from benchmarks.report import RESULTS, environment, write_rows
from visionattn.checkpoints import create, load_weights
from visionattn.data.classify.datamodule import ClassifyData
from visionattn.opening import open_model
from visionattn.probe.knn import nearest_neighbours
from visionattn.probe.statistics import mcnemar_test
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.features import LiveFeatures
from visionattn.train.frozen import read_vectors

CLASSES = ("Casual Shoes", "Sports Shoes", "Formal Shoes", "Sandals", "Flip Flops")
COUNTS = {"train": 61, "val": 15, "test": 35}
BACKBONE = "tf_efficientnet_lite0"


def make_folder(source: Path, folder: Path, seed: int) -> None:
    """Draw the photographs, and lay them in folders of their split and class."""
    with (source / "attributes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with zipfile.ZipFile(source / "images.zip") as images:
        for name in CLASSES:
            ids = sorted(row["id"] for row in rows if row["articleType"] == name)
            drawn = iter(random.Random(seed).sample(ids, sum(COUNTS.values())))
            for split, count in COUNTS.items():
                (folder / split / name).mkdir(parents=True)
                for _ in range(count):
                    file_name = f"{next(drawn)}.webp"
                    (folder / split / name / file_name).write_bytes(images.read(file_name))


def frozen(folder: Path, weights: Path, pixels: int) -> tuple[str, torch.Tensor]:
    """Which k-NN held-out images prefer, and whether it is right on each test image."""
    net = open_model(BACKBONE, weights, drop_classifier=True).model
    mean_std = {"mean": [0.5] * 3, "std": [0.5] * 3}
    data = ClassifyData(root=str(folder), image_size=pixels, in_chans=3, batch_size=64, **mean_std)
    data.setup("fit")
    loaders = {split: data.still_loader(split, 10**6) for split in COUNTS}
    parts = {"fit": ConcatDataset([loaders["train"].dataset, loaders["val"].dataset]), "test": loaders["test"].dataset}
    found = {}
    model = create(BACKBONE, num_classes=len(CLASSES))
    load_weights(model, weights, drop_classifier=True)
    vectors = {split: read_vectors(model, loader, data.class_names) for split, loader in loaders.items()}
    vectors["train"].vectors = torch.cat([vectors["train"].vectors, vectors["val"].vectors])
    vectors["train"].labels = torch.cat([vectors["train"].labels, vectors["val"].labels])
    backbone = Backbone(net, None, image_size=pixels)
    labels = {"fit": vectors["train"].labels, "test": vectors["test"].labels}
    tokens = {part: LiveFeatures(backbone, parts[part], labels[part], data.class_names) for part in parts}
    for flag in (False, True):
        how = " (standardised)" if flag else ""
        for name, train, test in (
            ("last tokens", tokens["fit"], tokens["test"]),
            ("classifier input", vectors["train"], vectors["test"]),
        ):
            found[name + how] = nearest_neighbours(train, test, source="mean", standardize=flag).chosen
    best = max(found, key=lambda name: found[name].held_out_accuracy)
    return best, found[best].correct


def tuned(folder: Path, weights: Path, seed: int, pixels: int, runs: Path) -> tuple[torch.Tensor, dict, float]:
    """Whether fine-tuning is right on each test image, the report's content, and seconds."""
    command = [
        *(sys.executable, "-c", "import sys; from visionattn.cli import main; sys.exit(main())"),
        *("fit", "finetune_folder", str(folder), f"--model.checkpoint={weights}", f"--data.seed={seed}"),
        *(f"--seed_everything={seed}", f"--trainer.default_root_dir={runs}", "--trainer.accelerator=cpu"),
        f"--data.image_size={pixels}",
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    seconds = time.perf_counter() - start
    (report,) = runs.glob("finetune_folder/version_*/report")
    with (report / "predictions.csv").open(newline="", encoding="utf-8") as file:
        correct = torch.tensor([row["class"] == row["predicted"] for row in csv.DictReader(file)])
    return correct, json.loads((report / "results.json").read_text()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of attributes.csv and images.zip")
    parser.add_argument("--weights", type=Path, required=True, help=f"weights of {BACKBONE}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pixels", type=int, default=224, help="side of the images (default: 224)")
    parser.add_argument("--output", type=Path, default=RESULTS / "finetune_folder.csv")
    args = parser.parse_args()
    origin = environment("cpu")  # before rows change the checkout
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "photographs"
            make_folder(args.data, folder, seed)
            correct, report, seconds = tuned(folder, args.weights, seed, args.pixels, Path(work) / "runs")
            name, neighbours = frozen(folder, args.weights, args.pixels)
        row = {
            "seed": seed,
            "backbone": BACKBONE,
            "pixels": args.pixels,
            "images": sum(COUNTS.values()) * len(CLASSES),
            "test_images": len(correct),
            "knn": name,
            "knn_accuracy": f"{100 * neighbours.double().mean():.2f}",
            "tuned_accuracy": f"{100 * correct.double().mean():.2f}",
            "balanced_accuracy": f"{100 * report['balanced_accuracy']:.2f}",
            "p": f"{mcnemar_test(correct.numpy(), neighbours.numpy()):.2g}",
            "seconds": f"{seconds:.0f}",
            "threads": torch.get_num_threads(),
            **origin,
        }
        print(row, flush=True)
        write_rows(args.output, [row], key=("seed", "pixels"))


if __name__ == "__main__":
    main()
