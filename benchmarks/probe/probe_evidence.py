"""Frozen backbones judged by `visionattn probe`: every pooling, k-NN and few-shot, with what each costs.

    python -m benchmarks.probe.probe_evidence --cifar10 FOLDER --mnist FOLDER --products FOLDER
        --weights FOLDER
    python -m benchmarks.probe.probe_evidence --cifar10 FOLDER --only micro

The data are folders that `tools/class_folders.py` laid out: CIFAR-10 from sheets, MNIST with its first 10,000 training
images, the articleType of fashion products. In the rows of EfficientNet-Lite0 on CIFAR-10 images were shown whole; from
a folder its centre crop of 0.875 is taken, so that these rows would change. `--weights` holds EfficientNet-Lite0
(ImageNet-1k) and the CIFAR ResNets as safetensors. Data and backbones that are
not given are left out.

Each case is one `visionattn probe` in `--runs`, which an interrupted run continues; then its rows are written again,
those of other cases stay. `accuracy` is of the test images at the epoch that a tenth of the training images chose, with
Wilson's 95 % interval; `ahead` is how much the best EP of the same case by held-out images is ahead, with the
bootstrap's interval and McNemar's p after Holm. `step_ms` is a training step of the pooling alone over that backbone's
tokens, with poolings taking turns, batch 64, one thread. Writes results/probe_evidence.csv.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.probe import cifar_resnet  # noqa: F401  # enters its names into timm's registry
from benchmarks.probe.probe_poolings import measure
from benchmarks.report import RESULTS, environment, read_rows, write_rows
from visionattn.cli import main as visionattn

OUTPUT = RESULTS / "probe_evidence.csv"
LIGHT = ("gap", "ep_8", "ep_16", "ep_32", "esimpool", "cbam")
MOST = (*LIGHT, "simpool", "aim", "cae", "coca", "dolg", "abmilp", "jepa")


@dataclass(frozen=True)
class Case:
    """A backbone and a data set.

    Attributes:
        name: Name of the backbone in the table.
        data: Which folder.
        model: Name in timm's registry.
        heads: Poolings.
        weights: File in the folder of weights; empty where the name has its own; `random` for none.
        epochs: Epochs of the heads.
        pixels: Side of the images; the model's own if None.
    """

    name: str
    data: str
    model: str
    heads: tuple[str, ...]
    weights: str = ""
    epochs: int = 20
    pixels: int | None = None

    def __str__(self) -> str:
        return f"{self.name} on {self.data}"

    def command(self, folders: dict[str, Path], weights: Path | None, runs: Path) -> list[str]:
        """The words of `visionattn probe`."""
        words = [self.model, "--data", str(folders[self.data])]
        words += ["--heads", ",".join(self.heads), "--epochs", str(self.epochs)]
        words += [
            "--lrs",
            "0.001,0.003,0.01,0.03",
            "--few-shot",
            "5",
            "--draws",
            "5",
            "--output",
            str(runs / str(self)),
        ]
        if self.weights == "random":
            words.append("--random")
        elif self.weights:
            words += ["--checkpoint", str(weights / self.weights)]
        return words + (["--image-size", str(self.pixels)] if self.pixels else [])


MICRO = "va_minimal_vit_micro_patch4_32"
LITE0 = ("tf_efficientnet_lite0", "efficientnet_lite0_fp16.safetensors")
CASES = [
    Case("micro ViT, masked autoencoder", "cifar10", MICRO, ("cls", *MOST)),
    Case("micro ViT, masked autoencoder, 100 epochs", "cifar10", MICRO, ("cls", "gap", "ep_8", "ep_32"), epochs=100),
    Case("micro ViT, masked autoencoder", "products", MICRO, ("cls", *MOST)),
    Case("micro ViT, masked autoencoder", "mnist", MICRO, ("cls", *LIGHT, "simpool", "aim")),
    Case("micro ViT, random", "cifar10", MICRO, ("cls", "gap", "ep_8", "ep_16", "ep_32"), "random"),
    Case("ResNet-56, CIFAR-10", "cifar10", "cifar_resnet56", MOST, "resnet56_cifar10.safetensors"),
    Case("ResNet-56, CIFAR-10", "products", "cifar_resnet56", MOST, "resnet56_cifar10.safetensors"),
    Case("ResNet-56, CIFAR-10", "mnist", "cifar_resnet56", (*LIGHT, "aim"), "resnet56_cifar10.safetensors"),
    Case("ResNet-20, CIFAR-10", "cifar10", "cifar_resnet20", LIGHT, "resnet20_cifar10.safetensors"),
    Case("EfficientNet-Lite0, ImageNet", "products", LITE0[0], LIGHT, LITE0[1], 10, 128),
    Case("EfficientNet-Lite0, ImageNet", "cifar10", LITE0[0], LIGHT, LITE0[1], 10, 128),
    Case("EfficientNet-Lite0, ImageNet", "mnist", LITE0[0], LIGHT, LITE0[1], 10, 128),
]


def rows_of(case: Case, folder: Path) -> list[dict[str, str]]:
    """The rows of a finished run."""
    found = json.loads((folder / "results.json").read_text())
    layer, data = found["layers"][0], found["data"]
    grid = tuple(layer["grid"])
    shared = {
        "backbone": case.name,
        "data": case.data,
        "train_images": data["train_images"],
        "test_images": data["test_images"],
        "tokens": f"{grid[0] * grid[1]}x{layer['dim']}",
    }
    ahead = {test["other"]: test for test in found["tests"]}
    poolings = [head for head in case.heads if head not in ("cls", "gap")]  # these compute next to nothing
    step = measure(poolings, layer["dim"], grid, 64, "cpu", 7, "ep_32")
    rows = []
    for row in found["heads"]:
        if not row["chosen"]:
            continue
        name = row["pooling"] if row["method"] == "head" else f"k-NN {row['pooling']}"
        if row["method"].startswith("pixels"):
            name = "pixels linear" if row["method"] == "pixels head" else "pixels k-NN"
        name += ", standardised" if row["standardized"] else ""
        test, cost = ahead.get(name), step.get(name, {})
        rows.append(
            {
                **shared,
                "head": name,
                "parameters": row.get("pooling_parameters") or "0",
                "mega_macs": cost.get("mega_macs", ""),
                "step_ms": cost.get("median_ms", ""),
                "accuracy": percent(row["test_best"]),
                "low": percent(row["test_best_low"]),
                "high": percent(row["test_best_high"]),
                "calibration_error": percent(row["calibration_error"]),
                "ahead": percent(test["difference"]) if test else "",
                "ahead_low": percent(test["interval"][0]) if test else "",
                "ahead_high": percent(test["interval"][1]) if test else "",
                "p_holm": f"{test['p_holm']:.2g}" if test else "",
                "lr": "" if row["lr"] is None else f"{row['lr']:g}",
                "epochs": row["epochs"] or "",
                **environment("cpu"),
                "seed": "0",
            }
        )
    for few in found["few_shot"]:
        rows.append(
            {
                **dict.fromkeys(rows[0], ""),
                **shared,
                "head": f"{few['pooling']}, {few['size']:g} a class",
                "accuracy": percent(few["mean"]),
                "low": percent(few["low"]),
                "high": percent(few["high"]),
                **environment("cpu"),
                "seed": "0",
            }
        )
    return rows


def percent(share: float | None) -> str:
    """A share in percent; empty if there is none."""
    return "" if share is None else f"{100 * share:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for data in ("cifar10", "mnist", "products"):
        parser.add_argument(f"--{data}", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/probe_evidence"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    folders = {data: getattr(args, data) for data in ("cifar10", "mnist", "products") if getattr(args, data)}
    for case in CASES:
        if args.only not in str(case) or case.data not in folders or (case.weights.endswith("s") and not args.weights):
            continue
        print(case, flush=True)
        if visionattn(["probe", *case.command(folders, args.weights, args.runs)]):
            raise SystemExit(f"{case} could not be probed.")
        rows = rows_of(case, args.runs / str(case))
        others = [row for row in read_rows(OUTPUT) if (row["backbone"], row["data"]) != (case.name, case.data)]
        write_rows(OUTPUT, others + rows)


if __name__ == "__main__":
    main()
