"""Tokens of the training and test images, stored or computed in each pass, according to the settings."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Subset

from visionattn.errors import StorageError
from visionattn.probe.inputs import Images, Part
from visionattn.probe.progress import show_progress
from visionattn.probe.report.report import Skipped
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.features import LiveFeatures, extract, space_line
from visionattn.probe.tokens.interface import Features
from visionattn.probe.tokens.loading import find_readable

__all__ = ["TokenReader"]

EXTRACTION_BATCH = 64


class TokenReader:
    """Computes the tokens of a run's images.

    Args:
        settings: Settings of the run.
        name: Name of the backbone.
        backbone: Backbone that computes the tokens.
        images: Training and test images.
        console: Console for the progress.

    Attributes:
        skipped: Images that could not be read.
        readable: Rows of the training and of the test images that could be read.
    """

    def __init__(
        self, settings: ProbeSettings, name: str, backbone: Backbone, images: Images, console: Console
    ) -> None:
        self.settings, self.name, self.backbone, self.images = settings, name, backbone, images
        self.console = console
        self.skipped: list[Skipped] = []
        self.readable: list[Tensor] = []

    def read(self) -> list[Features]:
        """Tokens of the training and the test images."""
        settings, parts = self.settings, {"train": self.images.train, "test": self.images.test}
        count = sum(len(part.names) for part in parts.values())
        if settings.live:
            self.console.print(f"Tokens of {count:,} images are computed in each pass (--live) and not stored.")
        else:
            self.console.print(space_line(self.backbone, count, settings.precision, Path(settings.cache or "")))
        found: list[Features] = []
        for name, part in parts.items():
            features = self._live(part) if settings.live else self._stored(name, part)
            skipped = dict(features[1])
            self.skipped += [Skipped(name, part.names[row], reason) for row, reason in skipped.items()]
            self.readable.append(torch.tensor([row for row in range(len(part.names)) if row not in skipped]))
            found.append(features[0])
        return found

    def _live(self, part: Part) -> tuple[Features, list[tuple[int, str]]]:
        with show_progress(self.console) as progress:
            readable = find_readable(part.dataset, self.settings.workers, progress)
        dataset = Subset(part.dataset, readable.rows.tolist())
        names = [part.names[row] for row in readable.rows.tolist()]
        features = LiveFeatures(
            self.backbone, dataset, readable.labels, self.images.classes, self.settings.workers, names
        )
        return features, readable.skipped

    def _stored(self, name: str, part: Part) -> tuple[Features, list[tuple[int, str]]]:
        settings = self.settings
        identity = {
            "model": self.name,
            "transform": self.images.transform,
            "dataset": f"{self.images.dataset}, {self.images.root}, {name}, {part.digest}",
        }
        try:
            with warnings.catch_warnings(record=True) as told, show_progress(self.console) as progress:
                warnings.simplefilter("always")
                features = extract(
                    self.backbone,
                    part.dataset,
                    Path(settings.cache or ""),
                    identity=identity,
                    classes=self.images.classes,
                    precision=settings.precision,
                    batch_size=EXTRACTION_BATCH,
                    num_workers=settings.workers,
                    names=part.names,
                    progress=progress,
                )
        except StorageError as error:
            raise StorageError(f"{error} Use --live or --dtype int8.") from error
        ours = [str(warning.message) for warning in told if warning.category is UserWarning]
        for words in dict.fromkeys(ours):  # other warnings come from readers, such as about open files
            self.console.print(f"note: {words}")
        return features, features.skipped
