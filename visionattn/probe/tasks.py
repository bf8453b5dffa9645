"""The run of each task: reading its data, and training its heads."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from timm.data import resolve_model_data_config

from visionattn.opening import Opened
from visionattn.probe.inputs import read_images
from visionattn.probe.segmentation.images import read_pairs
from visionattn.probe.segmentation.run import SegmentationRun
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.targets.images import read_targets
from visionattn.probe.targets.run import TargetRun
from visionattn.probe.task_run import TaskRun
from visionattn.probe.tokens.backbone import make_backbone
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
    images: Any
    run: Any
    if settings.task == "segmentation":
        images, run = read_pairs(data, settings, config), SegmentationRun
    elif settings.task != "classification":
        images, run = read_targets(data, settings, config), TargetRun
    else:
        images, run = read_images(data, settings, config), ProbingRun
    backbone = make_backbone(opened.model, settings.layers, images.image_size, settings.device)
    return run(settings, name, opened, backbone, images, console)
