"""Training a small network on CIFAR-10 by `visionattn fit` and by timm's train.py, with the same settings.

    python -m benchmarks.train.timm_train --data FOLDER --timm REPOSITORY [--seeds 0 1 2] [--epochs 3]

FOLDER holds images by class below train/ and val/, and no test/, which `visionattn fit` alone would measure
(`tools/class_folders.py` writes CIFAR-10 so); REPOSITORY is a
checkout of huggingface/pytorch-image-models, of the installed version, whose train.py runs. Both train the same network
of timm from random weights with AdamW (weight decay 0.05), one learning rate, a cosine without warm-up to 0 by update,
batches of 128, no augmentation, no mixing, float32 and the same number of loading processes, and measure the validation
images each epoch. They take turns, seed by seed. Seconds are those of the whole command, and CPU seconds, user and
system, those of all its processes, which other work on the machine disturbs less. `visionattn fit` also measures its
best checkpoint at the end.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import RESULTS, environment, write_rows

MODEL, SIZE, BATCH, LR, WORKERS = "test_resnet", 32, 128, 1e-3, 2


def timed(command: list[str], **options: object) -> tuple[float, float]:
    """Seconds and CPU seconds of a process, which must succeed."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(data: Path, epochs: int, seed: int, folder: Path) -> tuple[float, float, float]:
    """Accuracy after the last epoch, seconds and CPU seconds."""
    command = [
        *(sys.executable, "-m", "visionattn_command", "fit"),
        *(f"--model.name={MODEL}", f"--model.lr={LR}", "--model.weight_decay=0.05", "--model.min_lr=0"),
        *("--model.model_args={pretrained_cfg_overlay: {crop_pct: 1.0}}", "--data.dataset=folder"),
        *(f"--data.root={data}", f"--data.image_size={SIZE}", f"--data.batch_size={BATCH}"),
        *(f"--data.num_workers={WORKERS}", f"--data.seed={seed}", f"--seed_everything={seed}"),
        *(f"--trainer.max_epochs={epochs}", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}"),
    ]
    times = timed(command, env={**os.environ, "PYTHONPATH": os.getcwd()})
    (file,) = folder.rglob("metrics.csv")
    with file.open(newline="") as lines:
        accuracies = [float(row["val/accuracy"]) for row in csv.DictReader(lines) if row["val/accuracy"]]
    return 100 * accuracies[epochs - 1], *times


def theirs(data: Path, timm: Path, epochs: int, seed: int, folder: Path) -> tuple[float, float, float]:
    """Accuracy after the last epoch, seconds and CPU seconds."""
    classes = sum(path.is_dir() for path in (data / "train").iterdir())
    options = {
        "--data-dir": data, "--train-split": "train", "--val-split": "val", "--model": MODEL, "--num-classes": classes,
        "--img-size": SIZE, "--crop-pct": 1.0, "--batch-size": BATCH, "--validation-batch-size": BATCH,
        "--opt": "adamw", "--lr": LR, "--weight-decay": 0.05, "--sched": "cosine", "--min-lr": 0, "--warmup-epochs": 0,
        "--cooldown-epochs": 0, "--epochs": epochs, "--smoothing": 0, "--workers": WORKERS, "--seed": seed,
        "--device": "cpu", "--output": folder, "--experiment": "run",
    }  # fmt: skip
    command = [sys.executable, str(timm / "train.py"), "--no-aug", "--no-prefetcher", "--sched-on-updates"]
    times = timed([*command, *(str(part) for pair in options.items() for part in pair)], cwd=folder)
    with (folder / "run/summary.csv").open(newline="") as lines:
        return float(list(csv.DictReader(lines))[-1]["eval_top1"]), *times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/, images by class")
    parser.add_argument("--timm", type=Path, required=True, help="checkout of timm's repository")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "timm_train.csv")
    args = parser.parse_args()
    if (args.data / "test").exists():
        parser.error(f"{args.data} holds test/, which visionattn fit would measure and timm would not: move it away")
    origin = environment("cpu")  # before rows change the checkout
    data, timm = args.data.resolve(), args.timm.resolve()
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            found = {
                "visionattn fit": ours(data, args.epochs, seed, Path(first)),
                "timm train.py": theirs(data, timm, args.epochs, seed, Path(second)),
            }
        rows = [
            {
                "trainer": trainer,
                "model": MODEL,
                "epochs": args.epochs,
                "seed": seed,
                "accuracy": f"{accuracy:.2f}",
                "seconds": f"{seconds:.1f}",
                "cpu_seconds": f"{cpu_seconds:.1f}",
                "threads": torch.get_num_threads(),
                **origin,
            }
            for trainer, (accuracy, seconds, cpu_seconds) in found.items()
        ]
        print(*rows, sep="\n", flush=True)
        write_rows(args.output, rows, key=("trainer", "epochs", "seed"))


if __name__ == "__main__":
    main()
