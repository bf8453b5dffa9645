"""The run of each task: reading its data, and training its heads."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from timm.data import resolve_model_data_config

from visionattn.opening import Opened
from visionattn.probe.inputs import make_backbone, read_images
from visionattn.probe.segmentation.images import read_pairs
from visionattn.probe.segmentation.run import SegmentationRun
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.targets.images import read_targets
from visionattn.probe.targets.run import TargetRun
from visionattn.probe.task_run import TaskRun
from visionattn.probe.work import ProbingRun

__all__ = ["make_run"]


def make_run(settings: ProbeSettings, name: str, opened: Opened, data: Any, console: Console) -> ProbingRun | TaskRun:
    """Read the data of a task, and set up its run.

    Args:
        settings: Settings of the run.
        name: Name of the backbone.
        opened: The opened backbone.
        data: See `visionattn.probe`.
        console: Console for the progress.

    Raises:
        VisionAttnError: The data or the backbone do not match the task.
    """
    config = resolve_model_data_config(opened.model)
    if settings.task == "segmentation":
        pairs = read_pairs(data, settings, config)
        backbone = make_backbone(settings, opened.model, (pairs.height, pairs.size))
        return SegmentationRun(settings, name, opened, backbone, pairs, console)
    if settings.task != "classification":
        targets = read_targets(data, settings, config)
        backbone = make_backbone(settings, opened.model, targets.size)
        return TargetRun(settings, name, opened, backbone, targets, console)
    images = read_images(data, settings, config)
    return ProbingRun(settings, name, opened, make_backbone(settings, opened.model, images.size), images, console)
