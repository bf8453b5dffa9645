"""`visionattn.probe`: evaluate a frozen backbone from one pass over the images."""

from __future__ import annotations

import copy
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from rich.console import Console
from torch import nn

from visionattn.devices import find_device
from visionattn.errors import InputError, VisionAttnError, require, shorten
from visionattn.files import check_folder
from visionattn.opening import is_file, open_backbone
from visionattn.probe.comparing import compare_reports
from visionattn.probe.comparison import Comparison
from visionattn.probe.inputs import backbone_name
from visionattn.probe.output import check_report, default_output
from visionattn.probe.processes import one_writer, rank_and_size
from visionattn.probe.report.report import Report
from visionattn.probe.report.tasks import TaskReport
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.tasks import make_run
from visionattn.probe.tokens.backbone import Backbone

__all__ = ["probe", "run_probe", "run_probes"]


BackboneSource = str | Path | nn.Module | Backbone


@overload
def probe(
    backbone: BackboneSource, data: Any, *, settings: ProbeSettings | None = ..., progress: bool = ..., **options: Any
) -> Report | TaskReport: ...
@overload
def probe(
    backbone: Sequence[BackboneSource],
    data: Any,
    *,
    settings: ProbeSettings | None = ...,
    progress: bool = ...,
    **options: Any,
) -> Comparison: ...
def probe(
    backbone: BackboneSource | Sequence[BackboneSource],
    data: Any,
    *,
    settings: ProbeSettings | None = None,
    progress: bool = True,
    **options: Any,
) -> Report | TaskReport | Comparison:
    """Evaluate a frozen backbone by k-NN and by heads trained on its tokens, or compare several backbones.

    Args:
        backbone: Name in timm's registry, weight file or folder, `torchvision/NAME`, a folder of transformers, a
            module, which is copied, or a `Backbone`, such as `Backbone.from_callable` makes; or a list of these.
        data: Folder of images by class, or of the data of another task; a dataset: "digits", or "mnist", "torch/...",
            "hfds/..." with `root`; or the training and the test images, (train, test). Each of these is an array
            (N, H, W) or (N, H, W, C) of uint8 with its labels, (images, labels), or a dataset of (image, label), where
            an image is a PIL image, a uint8 array (H, W) or (H, W, C), a uint8 tensor (C, H, W), or a float tensor
            (C, H, W) as the backbone takes it, and labels are whole numbers from 0.
        settings: Settings; None: the defaults.
        progress: Show what is read and the progress, in a terminal, a notebook or a log.
        **options: Fields of `ProbeSettings`, which override those of `settings`: `epochs=10`, `device="cpu"` ...

    Returns:
        The report; for tasks other than classification, a `TaskReport`. If `output` names a folder, it is also written,
        with heads, maps and the ONNX file, and the same call resumes an interrupted run. For several backbones, their
        comparison; `output` then contains it, with a sub-folder for each report.

    Raises:
        CheckpointError: The weights could not be read, or do not match the model.
        DataError: The images cannot be read, or have fewer than two classes.
        InputError: A setting is not accepted, or the backbone cannot be probed.
        MissingPackageError: `pip install 'visionattn[train]'` is needed.
        StorageError: There is not enough space for the tokens, or a file could not be written.
        UnknownNameError: No model has this name.
    """
    settings = replace(settings or ProbeSettings(), **options)
    if isinstance(backbone, (list, tuple)):
        return run_probes(backbone, data, settings, progress=progress)
    return run_probe(backbone, data, settings, progress=progress)  # type: ignore[arg-type]


def run_probes(
    backbones: Sequence[BackboneSource],
    data: Any,
    settings: ProbeSettings,
    *,
    progress: bool = True,
    always_write: bool = False,
) -> Comparison:
    """Probe several backbones one after the other, and compare them.

    With `always_write`, and if the settings name no folder, each report is written as by `run_probe`, and the
    comparison to runs/probe/comparison-DATASET-HASH.
    """
    candidates = _candidates(backbones, settings)
    names = [one.name for one in candidates]
    folders = [None if settings.output is None else Path(settings.output) / name for name in _distinct(names)]
    for one in candidates:  # report mistakes before hours of work
        if isinstance(one.source, (str, Path)):
            open_backbone(one.source, one.checkpoint, one.random, image_size=settings.image_size)
    console = Console(highlight=False, markup=False, quiet=not progress)
    reports: list[Report] = []
    for place, (one, folder) in enumerate(zip(candidates, folders), 1):
        console.print(f"Backbone {place} of {len(candidates)}: {one.name}")
        alone = replace(settings, output=folder, checkpoint=one.checkpoint, random=one.random)
        report = run_probe(one.source, data, alone, progress=progress, always_write=always_write)
        assert isinstance(report, Report)
        reports.append(report)
    given = [one.source.model if isinstance(one.source, Backbone) else one.source for one in candidates]
    models = {place: copy.deepcopy(one) for place, one in enumerate(given) if isinstance(one, nn.Module)}
    return compare_reports(reports, models, settings.output, settings.overwrite, settings.device, always_write)


class _Candidate(NamedTuple):
    """One of several backbones, with its own weights."""

    source: BackboneSource
    name: str
    checkpoint: str | Path | None
    random: bool


def _candidates(backbones: Sequence[BackboneSource], settings: ProbeSettings) -> list[_Candidate]:
    """Backbones to compare; `NAME=FILE` is a name with its weight file.

    Raises:
        InputError: There are fewer than two, one is given twice, or a setting applies to a single backbone only.
    """
    if len(backbones) < 2:
        raise InputError(f"A comparison requires at least two backbones; got {len(backbones)}.")
    twice = [str(one) for place, one in enumerate(backbones) if one in backbones[:place]]
    if twice:
        raise InputError(f"{shorten(twice[0])} is given twice.")
    if settings.task != "classification":
        raise InputError(f"Several backbones can be compared for classification only; got the task {settings.task!r}.")
    if settings.checkpoint is not None or settings.export:
        raise InputError("--checkpoint and --export require a single backbone; use NAME=FILE to give each its weights.")
    found = []
    for source in backbones:
        name, equals, file = str(source).partition("=")
        if isinstance(source, str) and equals and not is_file(name) and not os.path.exists(source):
            found.append(_Candidate(name, name, file, False))
        else:
            random = settings.random and isinstance(source, (str, Path)) and not is_file(source)
            found.append(_Candidate(source, backbone_name(source), None, random))
    return found


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of folders, with numbers added to equal names."""
    plain = [re.sub(r"[^\w.-]+", "-", Path(name).stem if os.path.exists(name) else name)[:100] for name in names]
    return [f"{name}-{place}" if plain.count(name) > 1 else name for place, name in enumerate(plain, 1)]


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
    opened = open_backbone(backbone, settings.checkpoint, settings.random, image_size=settings.image_size)
    run = make_run(settings, backbone_name(backbone), opened, data, console)
    name, images = run.name, run.images
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
