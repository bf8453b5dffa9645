"""What an inspection of a frozen backbone found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visionattn.frozen.agreement import Agreement
from visionattn.frozen.looking import Look
from visionattn.frozen.plan import Plan
from visionattn.frozen.selection import best_plan
from visionattn.probe.statistics import Interval, bootstrap_interval

__all__ = ["MEAN_MAP", "Inspection"]

MEAN_MAP = "mean over layers"


@dataclass(frozen=True, repr=False)
class Inspection:
    """What was found.

    Attributes:
        name: Of the backbone.
        source: Where its weights come from.
        size: Side of the images in pixels.
        names: The images that were read.
        classes: Names of their classes; empty where their folders state none.
        look: Layers, maps and sinks.
        agreement: Of the last layer's map and of the mean over layers with occlusion, on the first images.
        logits: Whether occlusion was judged by the classes' probabilities; otherwise by the features' cosine.
        policies: Rows of `measure_policies`; empty if none were asked for.
        curves: Rows of `prune_curves`, likewise.
        pictures: The first images, as the backbone saw them.
        skipped: Name of each image that could not be read, and what is wrong with it.
        folder: Of the report; None where none was written.
    """

    name: str
    source: str
    size: int
    names: list[str]
    classes: tuple[str, ...]
    look: Look
    agreement: Agreement
    logits: bool
    policies: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    pictures: list[Image.Image]
    skipped: list[tuple[str, str]]
    folder: Path | None = None

    def __repr__(self) -> str:
        height, width = self.look.grid
        return (
            f"Inspection({self.name}, {len(self.look.layers)} layers of {height} x {width} patches, "
            f"{len(self.names)} images)"
        )

    def rows(self) -> list[dict[str, Any]]:
        """A row per layer; `pearson` is the correlation of its map with occlusion, and its interval over images."""
        rows = []
        for layer, (correlation, interval) in zip(self.look.layers, self.correlations(), strict=True):
            known = {"pearson": correlation, "pearson_low": interval.low, "pearson_high": interval.high}
            rows.append({**layer.to_json(), **known})
        return rows

    def correlations(self) -> list[tuple[float, Interval]]:
        """Correlation of each layer's map with occlusion: its mean over the judged images and the interval."""
        return [self._correlation(maps) for maps in self.look.maps]

    @property
    def mean_map_correlation(self) -> tuple[float, Interval]:
        """Likewise, of the mean of the maps over layers."""
        return self._correlation(torch.stack(self.look.maps).mean(0))

    def _correlation(self, maps: Tensor) -> tuple[float, Interval]:
        found = self.agreement.correlation(maps[: len(self.agreement.pearson)])
        return float(found.mean()), bootstrap_interval(found)

    @property
    def plan(self) -> Plan | None:
        """The plan of the least error within the budget; None where no policies were measured."""
        return best_plan(self.policies) if self.policies else None
