"""What is measured of each shipped weight file, by task, next to simple baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import visionattn
from benchmarks.models.cifar_sheets import load_cifar10_sheets
from benchmarks.probe import cifar_resnet  # noqa: F401  registers the published networks
from benchmarks.stereo.match_stereo_scenes import USES
from visionattn.cost import count_parameters
from visionattn.evaluate import evaluate_retrieval, evaluate_sr, evaluate_stereo

PSNR, EPE, BAD_2, ACCURACY, MAP = "PSNR dB (Y)", "EPE px", "bad-2 %", "accuracy %", "mAP %"
OTHER_SPACE = "va_minimal_vit_micro_patch4_32"
"""A shipped network with one embedding for all attributes."""
HELD_OUT = "CIFAR-10, held-out training images"
LOWER = (EPE, BAD_2)
"""Metrics of which less is better."""
QUALITIES = (None, 75, 30)
"""Of JPEG, that low-resolution images go through; None for none."""
FLOW_PAIRS = 32
"""Generated pairs."""
TRAIN_IMAGES, BATCH = 10_000, 500
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Measured:
    """One number of shipped weights, or of what stands next to them.

    Attributes:
        weights: The shipped name.
        data: What it was measured on.
        method: The shipped name, with what belongs to its use; or the baseline.
        metric: Name and unit.
        value: The number.
    """

    weights: str
    data: str
    method: str
    metric: str
    value: float


def upscaling(name: str, folder: Path, published: Path | None) -> list[Measured]:
    """PSNR on Y of each set, also after JPEG, next to bicubic and the published files of this scale and size."""
    own: Any = timm.create_model(name, pretrained=True).eval()
    models: dict[str, Any] = {name: own}
    for file in sorted(published.glob("*.pth")) if published else []:
        rival: Any = visionattn.load(file)
        if (rival.scale, count_parameters(rival)) == (own.scale, count_parameters(own)):
            models[file.stem] = rival
    rows = []
    for images in sorted(folder.glob("*/HR")):
        for quality in QUALITIES:
            found = evaluate_sr(list(models.values()), images, jpeg=quality)
            if found.failures:
                raise SystemExit(f"Not measured: {found.failures}")
            data = images.parent.name + (f", JPEG {quality}" if quality else "")
            for method, mean in zip(["bicubic", *models], found.means(), strict=True):
                rows.append(Measured(name, data, method, PSNR, mean.psnr_y))
    return rows


def stereo(name: str, folder: Path, factor: float | Mapping[str, float] | None) -> list[Measured]:
    """EPE and bad-2 of each scene, also of enlarged views and filled, next to filled semi-global matching."""
    rows = []
    for options, settings in USES.items():
        baseline = None if options else "sgbm"
        found = evaluate_stereo(name, folder, factor=factor, baseline=baseline, **settings)
        if found.failures:
            raise SystemExit("\n".join(found.failures))
        for row in found.rows:
            if row.region == "all" and row.model != "sgbm":
                method = f"{row.model} {options}".strip() if row.model == name else row.model
                rows += [
                    Measured(name, row.scene, method, EPE, row.errors.epe),
                    Measured(name, row.scene, method, BAD_2, row.errors.bad_2),
                ]
    return sorted(rows, key=lambda row: row.data)


def flow(name: str) -> list[Measured]:
    """EPE and bad-2 of generated pairs and a stereo pair, next to OpenCV's methods."""
    from benchmarks.stereo.flow_pairs import RIVALS, by_network, kinds, measure  # needs OpenCV

    methods = {**RIVALS, name: by_network(timm.create_model(name, pretrained=True).eval())}
    return [
        Measured(name, data, method, metric, errors[key])
        for data, pairs in kinds(FLOW_PAIRS, [])
        for method, errors in measure(pairs, methods).items()
        for metric, key in ((EPE, "epe"), (BAD_2, "bad_2"))
    ]


def retrieval(name: str, table: Path) -> list[Measured]:
    """mAP of each attribute on the test split of generated objects, next to one space for all and to chance."""
    others = {"random": "chance", OTHER_SPACE: f"pooled {OTHER_SPACE}"}
    found = evaluate_retrieval([name, OTHER_SPACE], table)
    if found.failures:
        raise SystemExit("\n".join(found.failures))
    return [
        Measured(name, f"generated objects, {row.attribute}", others.get(model, model), MAP, 100 * row.map)
        for model in (name, *others)
        for row in found.own(model)
    ]


def cifar10(name: str, folder: Path, resnets: Path | None) -> list[Measured]:
    """Accuracy on CIFAR-10 of a classifier, or of ridge regression on the features of a network without one."""
    has_classes = timm.get_pretrained_cfg(name).num_classes > 0
    return classifier(name, folder, resnets) if has_classes else backbone(name, folder)


def classifier(
    name: str, folder: Path, resnets: Path | None = None, splits: Iterable[str] = ("val", "test")
) -> list[Measured]:
    """Accuracy on training images that were held out, and on test images next to published ResNets'."""
    networks = {name: timm.create_model(name, pretrained=True)}
    for layers in (20, 56) if resnets else ():
        file = f"{resnets}/resnet{layers}_cifar10.safetensors"
        networks[f"ResNet-{layers}"] = timm.create_model(f"cifar_resnet{layers}", checkpoint_path=file)
    rows = []
    for split in splits:
        data = HELD_OUT if split == "val" else "CIFAR-10, test images after JPEG"
        images, labels = load_cifar10_sheets(folder, split)
        # The published networks were trained on the images held out here.
        for method in networks if split == "test" else (name,):
            right = _features(networks[method], images).argmax(1) == labels
            rows.append(Measured(name, data, method, ACCURACY, 100 * float(right.mean())))
    return rows


def backbone(name: str, folder: Path) -> list[Measured]:
    """Accuracy on CIFAR-10 of ridge regression on frozen features, next to an untrained network's and pixels'."""
    torch.manual_seed(0)
    networks = {
        name: timm.create_model(name, pretrained=True),
        "untrained network": timm.create_model(name, num_classes=0),
    }
    images, labels = load_cifar10_sheets(folder, "train")
    train = images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES]
    val, test = (load_cifar10_sheets(folder, split) for split in ("val", "test"))
    rows = []
    for method in (*networks, "pixels"):
        network = networks.get(method)
        parts = [(_features(network, part[0]), part[1]) for part in (train, val, test)]
        rows.append(Measured(name, "CIFAR-10, frozen, ridge regression", method, ACCURACY, ridge_accuracy(*parts)))
    return rows


@torch.inference_mode()
def _features(network: nn.Module | None, images: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, 3) -> float64 (B, C): a network's output, or without one the pixels themselves."""
    if network is None:
        return images.reshape(len(images), -1) / 255
    config: Any = network.eval().pretrained_cfg
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return torch.cat([network((part / 255 - mean) / std) for part in pixels.split(BATCH)]).double().numpy()


Labelled = tuple[np.ndarray, np.ndarray]


def ridge_accuracy(train: Labelled, val: Labelled, test: Labelled) -> float:
    """Test accuracy in percent of ridge regression to one-hot labels, its penalty chosen by the validation images.

    With standardised features X (N, C) and a column of ones, and one-hot labels Y, W = (X^T X / N + p I)^-1 X^T Y / N.

    Args:
        train: Features (N, C) and labels (N,).
        val: Validation features and labels.
        test: Test features and labels.
    """
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-9
    inputs = [np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=1) for x, _ in (train, val, test)]
    targets = np.eye(train[1].max() + 1)[train[1]]
    gram, cross = inputs[0].T @ inputs[0] / len(targets), inputs[0].T @ targets / len(targets)
    scores = []
    for penalty in PENALTIES:
        weight = np.linalg.solve(gram + penalty * np.eye(len(gram)), cross)
        right = [((x @ weight).argmax(1) == part[1]).mean() for x, part in zip(inputs[1:], (val, test))]
        scores.append(right)
    return 100 * float(max(scores, key=lambda right: right[0])[1])
