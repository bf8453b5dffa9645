"""Base of the runs of segmentation, multi-label classification and regression."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from visionattn.errors import DataError
from visionattn.opening import Opened
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.inputs import Images
from visionattn.probe.report.facts import backbone_facts, data_facts, opening_facts, versions
from visionattn.probe.report.head_files import head_file, write_task_head
from visionattn.probe.report.tasks import Metric, TaskHead, TaskReport
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.interface import Features
from visionattn.weights.hashing import hash_state

__all__ = ["HOLDOUT", "WARMUP", "TaskRun", "divide"]

HOLDOUT = 0.1
WARMUP = 0.1  # of the epochs


def divide(images: int, share: float) -> tuple[Tensor, Tensor]:
    """Rows for training and rows that are held out, both sorted; they depend only on the number of images.

    Raises:
        DataError: There are fewer than three images.
    """
    order = np.random.default_rng(0).permutation(images)
    held = max(1, round(share * images)) if share else 0
    if images - held < 2:
        raise DataError(f"Probing requires at least three training images; got {images}.")
    rows, held_rows = (torch.from_numpy(np.sort(part)) for part in (order[held:], order[:held]))
    return rows, held_rows


class TaskRun(ABC):
    """A run, part by part.

    Args:
        settings: Settings of the run.
        name: Name of the backbone.
        opened: The opened model, with its source and licence.
        backbone: Backbone that computes the tokens.
        images: Training and test images.
        console: Console for the progress.

    Attributes:
        saved: The selected heads in the report, the heads themselves, and the epoch of their weights, set by `report`.
    """

    saved: list[tuple[TaskHead, Any, int]]
    specs: list[HeadSpec]
    metrics: tuple[Metric, ...]
    class_metrics: tuple[Metric, ...]
    words: str

    def __init__(
        self, settings: ProbeSettings, name: str, opened: Opened, backbone: Backbone, images: Any, console: Console
    ) -> None:
        self.settings, self.name, self.opened = settings, name, opened
        self.backbone, self.images, self.console = backbone, images, console
        self.weights = hash_state(backbone.model.state_dict())

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.settings.output or "")

    @property
    def plan(self) -> str:
        """Hash of all that the numbers of the report depend on."""
        settings, images = self.settings, self.images
        content = {
            "task": settings.task,
            "weights": self.weights,
            "images": [images.train.digest, images.test.digest, images.truth_digest, images.transform],
            "classes": list(images.classes),
            "layers": self.backbone.indices,
            "computed in": str(self.backbone.autocast),
            "tokens": "live" if settings.live else settings.precision,
            "heads": [asdict(spec) for spec in self.specs],
            "training": [settings.epochs, settings.images_a_step, settings.no_pixels],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @abstractmethod
    def report(self, command: str | None = None) -> TaskReport:
        """Do all parts of the work.

        Args:
            command: The call to be reported; None: the command line.
        """

    def write(self, report: TaskReport) -> None:
        """Write the report and the selected heads to the folder of the run."""
        report.write(self.folder)
        folder = self.folder / "heads"
        for head, module, epoch in self.saved:
            write_task_head(report, head, module, epoch, folder)
        kept = {head_file(folder, report, head).stem for head, _, _ in self.saved}
        for path in folder.glob("*-layer*"):
            if path.suffix in (".safetensors", ".md") and path.stem not in kept:
                path.unlink()

    def _describe(
        self,
        command: str | None,
        parts: Sequence[Features],
        held: int,
        heads: list[TaskHead],
        optimizer: str,
        **more: Any,
    ) -> TaskReport:
        """Make the report of heads."""
        settings = self.settings
        images: Images = self.images
        train, test = parts
        report = TaskReport(
            task=settings.task,
            command=command or settings.command(self.name, images.data),
            backbone={
                **backbone_facts(self.name, self.opened, self.backbone, self.weights),
                **opening_facts(settings),
            },
            data=data_facts(images, len(train), len(test)),
            protocol={
                "optimizer": optimizer,
                "epochs": settings.epochs,
                "warm-up epochs": WARMUP * settings.epochs,
                "batch": min(settings.images_a_step, len(train) - held),
                "held-out share": HOLDOUT,
                "tokens in": "float32, not stored" if settings.live else settings.precision,
            },
            versions=versions(),
            layers=self.backbone.layers,
            indices=self.backbone.indices,
            classes=images.classes,
            held_out=held,
            metrics=self.metrics,
            class_metrics=self.class_metrics,
            heads=heads,
            words=self.words,
            **more,
        )
        report.note_ends()
        return report
