"""Networks of a few weights, one a task, and their exported files."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from torch import nn

from tests.export.toys import Toy
from visionattn.export.spec import ExportSpec

NAMES = ("Labelled", "Features", "Enlarger", "Stereo", "Flow")


class Labelled(Toy):
    """Classifies by three names; images are resized to 40, and cropped to 32."""

    pretrained_cfg = {
        **Toy.pretrained_cfg,
        "crop_pct": 0.8,
        "interpolation": "bicubic",
        "label_names": ["cat", "dög", "hen"],
    }


class Features(Toy):
    """The same without names, of grey images of one fixed size."""

    num_classes = 0
    pretrained_cfg = {"input_size": (1, 8, 12), "mean": (0.5,), "std": (0.25,), "fixed_input_size": True}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1)


class Enlarger(Toy):
    """Twice as high and wide, by convolutions that reach two pixels far."""

    task = "restore"
    num_classes = 0
    output_names = ("upscaled",)
    pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    scale, in_chans, radius = 2, 3, 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3, 2 H, 2 W)."""
        return F.pixel_shuffle(self.last(self.conv(image).relu()), 2) + F.interpolate(image, scale_factor=2.0)


class Stereo(Toy):
    """Two views in steps of 8 from 16; some disparities are below 0."""

    task = "stereo"
    num_classes = 0
    input_names = ("left", "right")
    output_names = ("disparity",)
    pretrained_cfg = {"input_size": (3, 24, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    size_multiple = 8
    size_minimum = 16

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Two of (B, 3, H, W) -> (B, 2, H, W)."""
        left, right = (F.pixel_shuffle(F.pixel_unshuffle(image, 8), 8) for image in (left, right))
        return 10 * torch.cat([self.conv(left - right).sum(1, True), self.conv(right - left).sum(1, True)], 1)


class Flow(Stereo):
    """Two images, both ways."""

    task = "flow"
    input_names = ("first", "second")
    output_names = ("flow",)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two of (B, 3, H, W) -> (B, 4, H, W)."""
        return torch.cat([super().forward(first, second), super().forward(second, first)], 1)


class Tower(Toy):
    """Tokens of an image: half of a model for attribute retrieval."""

    task = "retrieve"
    num_classes = 0
    output_names = ("tokens",)
    attributes = ("colour", "kind", "season")
    pair = "0123"

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, N, 3)."""
        return F.avg_pool2d(self.conv(image), 8).flatten(2).transpose(1, 2)


class Head(Tower):
    """The other half: embeddings of tokens for attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 3))

    def forward(self, tokens: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """(B, N, 3) and (A,) -> (B, A, 3)."""
        return F.normalize(tokens.mean(1, keepdim=True) * self.table[conditions], dim=2)


def write(model: nn.Module, path: Path, static: bool = False, batch: int | None = None) -> Path:
    """Write a toy as ONNX with its metadata, by the exporter that needs no second."""
    spec = ExportSpec.of(model, None, False if static else None, 18, "drawn", None, batch)
    axes = {0: "batch"} if batch is None else {}
    axes |= {2: "height", 3: "width"} if spec.dynamic_size else {}
    images = tuple(torch.rand(batch or 2, *spec.input_size) for _ in spec.input_names)
    names = spec.input_names
    dynamic: dict[str, dict[int, str]] = dict.fromkeys([*names, *spec.output_names], axes)
    if isinstance(model, Head):
        spec = replace(spec, input_names=["tokens", "conditions"], output_names=["embeddings"])
        images, names = (torch.rand(2, 16, 3), torch.arange(3)), spec.input_names
        dynamic = {"tokens": {0: "batch", 1: "tokens"}, "conditions": {0: "conditions"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            images,
            str(path),
            dynamo=False,
            opset_version=18,
            input_names=names,
            output_names=spec.output_names,
            dynamic_axes=dynamic,
        )
    file = onnx.load(path)
    onnx.helper.set_model_props(file, spec.to_metadata())
    onnx.save(file, path)
    return path
