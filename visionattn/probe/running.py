"""The run of one backbone: opened once, in this process or in one for each device."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from visionattn.devices import find_device
from visionattn.errors import InputError
from visionattn.files import check_folder
from visionattn.probe.output import check_report, default_output
from visionattn.probe.processes import in_processes, one_writer, rank_and_size
from visionattn.probe.report.report import Report
from visionattn.probe.report.tasks import TaskReport
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.sources import BackboneSource, backbone_name, open_source
from visionattn.probe.tasks import make_run

__all__ = ["BackboneSource", "run_probe"]


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
    temporary = None
    with ExitStack() as stack:
        if settings.output is None and not always_write:
            if settings.export:
                raise InputError("export requires a folder: set output.")
            temporary = Path(stack.enter_context(TemporaryDirectory(prefix="visionattn-")))
        if settings.devices == 1:
            return _probe(settings, backbone, data, temporary, progress)
        return in_processes(_probe, settings, backbone, data, temporary, progress)


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


def _probe(
    settings: ProbeSettings, backbone: BackboneSource, data: Any, temporary: Path | None, progress: bool
) -> Report | TaskReport:
    """Probe, as the only process or as one of several, of which the first one writes."""
    quiet = not progress or rank_and_size()[0] > 0
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, quiet=quiet)
    name = backbone_name(backbone)
    opened = open_source(backbone, settings.checkpoint, settings.random, settings.image_size)
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
