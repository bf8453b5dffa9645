"""The run of one backbone: opened once, in this process or in one for each device."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from visionattn.devices import find_device
from visionattn.errors import InputError, VisionAttnError, require
from visionattn.files import check_folder
from visionattn.opening import open_backbone
from visionattn.probe.output import check_report, default_output
from visionattn.probe.processes import one_writer, rank_and_size
from visionattn.probe.report.report import Report
from visionattn.probe.report.tasks import TaskReport
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.tasks import make_run
from visionattn.probe.tokens.backbone import Backbone, backbone_name

__all__ = ["BackboneSource", "run_probe"]

BackboneSource = str | Path | nn.Module | Backbone


def run_probe(
    backbone: BackboneSource,
    data: Any,
    settings: ProbeSettings,
    *,
    progress: bool = True,
    always_write: bool = False,
) -> Report | TaskReport:
    """Like `probe`; with `always_write`, writes to runs/probe/BACKBONE-DATASET-HASH if the settings name no folder."""
    _check(settings)
    settings = replace(settings, device=str(find_device(settings.device)))
    if settings.output is not None or always_write:
        return _launch(backbone, data, settings, None, progress)
    if settings.export:
        raise InputError("export requires a folder: set output.")
    with tempfile.TemporaryDirectory(prefix="visionattn-") as folder:
        return _launch(backbone, data, settings, Path(folder), progress)


def _check(settings: ProbeSettings) -> None:
    """Check the settings before a model is opened."""
    for folder in (settings.output, settings.cache):
        if folder is not None:
            check_folder(folder)
    available = torch.cuda.device_count() if settings.device.startswith("cuda") else max(8, os.cpu_count() or 1)
    if settings.device == "auto":
        available = torch.cuda.device_count() or available
    if settings.devices > max(1, available):
        raise InputError(f"--devices must be at most {max(1, available)} on this machine; got {settings.devices}.")


def _launch(
    backbone: Any, data: Any, settings: ProbeSettings, temporary: Path | None, progress: bool
) -> Report | TaskReport:
    """Probe in this process, or in one process per device."""
    if settings.devices == 1:
        return _probe(backbone, data, settings, temporary, progress)
    fabric = require("lightning.fabric", "train").Fabric(
        accelerator="cuda" if settings.device.startswith("cuda") else "cpu",
        devices=settings.devices,
        strategy="ddp_spawn",
    )
    # Pickled here, since Lightning unpacks the arguments that it sends, and fails on frozen dataclasses.
    job = pickle.dumps((backbone, data, settings, temporary, progress))
    with tempfile.TemporaryDirectory(prefix="visionattn-") as folder:
        # Passed by file: Lightning's pipe is read after the processes have ended, and holds only 64 kB.
        answer = Path(folder) / "report"
        fabric.launch(_probe_in_process, job, str(answer))
        found = pickle.loads(answer.read_bytes())
    if isinstance(found, VisionAttnError):
        raise found
    return found


def _probe_in_process(fabric: Any, job: bytes, answer: str) -> None:
    """Work of one of several processes; the first one writes its report, or its error, to a file."""
    backbone, data, settings, temporary, progress = pickle.loads(job)
    try:
        found: Any = _probe(backbone, data, replace(settings, device=str(fabric.device)), temporary, progress)
    except VisionAttnError as error:  # if raised there, it would be reported as a stack trace
        found = error
    if rank_and_size()[0] == 0:
        Path(answer).write_bytes(pickle.dumps(found))


def _probe(
    backbone: Any, data: Any, settings: ProbeSettings, temporary: Path | None, progress: bool
) -> Report | TaskReport:
    """Probe, as the only process or as one of several, of which the first one writes."""
    quiet = not progress or rank_and_size()[0] > 0
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, quiet=quiet)
    if isinstance(backbone, Backbone):
        backbone = backbone.model
    if isinstance(backbone, nn.Module):
        backbone = copy.deepcopy(backbone)
    name = backbone_name(backbone)
    opened = open_backbone(backbone, settings.checkpoint, settings.random, image_size=settings.image_size)
    run = make_run(settings, name, opened, data, console)
    images = run.images
    if temporary is None:
        output = Path(settings.output or default_output(settings, name, run.weights, images))
        run.settings = replace(settings, output=output, cache=settings.cache or output / "features")
        check_report(output, run.plan, run.weights, images, settings.overwrite)
    else:
        run.settings = replace(settings, output=temporary, cache=settings.cache or temporary / "features", maps=0)
    for words in (*images.told, *images.left_out):
        console.print(words)
    with one_writer(run.folder):
        report: Any = run.report(
            f"visionattn.probe({name}, ...)" if temporary or not isinstance(data, (str, Path)) else None
        )
        if temporary is None and rank_and_size()[0] == 0:
            run.write(report)
    return report
