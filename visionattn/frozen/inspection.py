"""Result of an inspection of a frozen backbone."""

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
    """Result of `visionattn.inspect`.

    Attributes:
        name: Name of the backbone.
        source: Where its weights come from.
        size: Side of the images in pixels.
        names: Names of the images that were read.
        classes: Names of their classes; empty if the folder has no classes.
        look: Measurements of the layers, maps and sinks.
        agreement: Agreement of the last layer's map, and of the mean over layers, with occlusion, on the first images.
        logits: Whether occlusion was scored by class probabilities; otherwise by the cosine of features.
        policies: Rows of `measure_policies`; empty if not measured.
        curves: Rows of `prune_curves`; empty if not measured.
        pictures: The first images, as the backbone saw them.
        skipped: Name of each image that could not be read, and the reason.
        folder: Folder of the report; None if none was written.
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
        """One row per layer, with `pearson`, the correlation of its map with occlusion, and its interval."""
        rows = []
        for layer, (correlation, interval) in zip(self.look.layers, self.correlations(), strict=True):
            known = {"pearson": correlation, "pearson_low": interval.low, "pearson_high": interval.high}
            rows.append({**layer.to_json(), **known})
        return rows

    def correlations(self) -> list[tuple[float, Interval]]:
        """Correlation of each layer's map with occlusion: the mean over the compared images, and its interval."""
        return [self._correlation(maps) for maps in self.look.maps]

    @property
    def mean_map_correlation(self) -> tuple[float, Interval]:
        """Correlation of the mean of the maps over layers with occlusion, and its interval."""
        return self._correlation(torch.stack(self.look.maps).mean(0))

    def _correlation(self, maps: Tensor) -> tuple[float, Interval]:
        found = self.agreement.correlation(maps[: len(self.agreement.pearson)])
        return float(found.mean()), bootstrap_interval(found)

    @property
    def plan(self) -> Plan | None:
        """The plan with the lowest error within the budget; None if no policies were measured."""
        return best_plan(self.policies) if self.policies else None
