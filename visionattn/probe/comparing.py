"""`visionattn.compare`: compare backbones whose reports were made on the same test images."""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from visionattn.devices import find_device
from visionattn.errors import DataError, InputError, VisionAttnError, shorten
from visionattn.files import check_folder, read_json
from visionattn.opening import is_file, open_backbone
from visionattn.probe.comparison import Comparison, Judged
from visionattn.probe.costs import time_backbones
from visionattn.probe.report.comparison_page import check_comparison, write_comparison
from visionattn.probe.report.predictions import PREDICTIONS, read_predictions
from visionattn.probe.report.report import Report
from visionattn.probe.settings import LARGEST
from visionattn.probe.tokens.backbone import Backbone

__all__ = ["compare", "compare_reports"]

_SCHEMA = {
    "command": str,
    "plan": str,
    "backbone": {
        "name": str,
        "weights": str,
        "sha256": str,
        "parameters": int,
        "macs": int,
        "bytes": int,
        "given": bool,
        "checkpoint": (str, type(None)),
    },
    "data": {
        "dataset": str,
        "root": (str, type(None)),
        "test_digest": str,
        "train_digest": str,
        "train_images": int,
        "test_images": int,
    },
    "layers": [{"index": int}],
    "classes": [str],
    "answers": [{"name": str, "held_out_accuracy": (float, int, type(None))}],
    "classes_of_best": [{"name": str, "f1": (float, int), "support": int}],
}


def compare(
    reports: Sequence[Report | str | Path],
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> Comparison:
    """Compare backbones that were evaluated on the same test images.

    Args:
        reports: Two or more reports that `visionattn.probe` returned, or folders that it wrote.
        output: Folder of the comparison; None: it is not written.
        overwrite: Replace a comparison of other reports in that folder.
        device: Device on which backbones are timed, if their reports can open them: "auto" (a GPU if available), or a
            device of PyTorch.

    Returns:
        The comparison.

    Raises:
        DataError: A report cannot be read.
        InputError: There are fewer than two reports, their test images differ, or a report is given twice.
        StorageError: A file could not be written.
    """
    if isinstance(reports, (str, Path, Report)):
        raise InputError("A comparison requires at least two reports; got one.")
    return compare_reports(reports, {}, output, overwrite, device)


def compare_reports(
    reports: Sequence[Report | str | Path],
    models: Mapping[int, nn.Module],
    output: str | Path | None,
    overwrite: bool,
    device: str,
    always_write: bool = False,
) -> Comparison:
    """Like `compare`; `models` has the backbones, by index, that only the caller can open.

    With `always_write`, and without `output`, the comparison is written to runs/probe/comparison-DATASET-HASH.
    """
    if output is not None:
        check_folder(output)
    found = [_judged(report) for report in reports]
    names = Counter(report["backbone"]["name"] for report, _ in found)
    judged = []
    for report, correct in found:
        backbone = report["backbone"]
        name = Path(backbone["name"]).name if is_file(backbone["name"]) else backbone["name"]
        if names[backbone["name"]] > 1:
            name = f"{name} ({backbone['sha256'][:6]}, {report['data']['image_size']} px)"
        judged.append(Judged(name, report, correct))
    comparison = Comparison(judged)
    if output is None and always_write:
        output = _default_folder(comparison)
    if output is not None:
        check_comparison(Path(output), comparison, overwrite)
    _time(comparison, models, find_device(device))
    if output is not None:
        write_comparison(comparison, output)
        comparison.folder = Path(output)
    return comparison


def _default_folder(comparison: Comparison) -> Path:
    dataset = re.sub(r"[^\w.-]+", "-", comparison.data["dataset"])[:100]
    return Path("runs/probe") / f"comparison-{dataset}-{comparison.plan[:8]}"


def _judged(report: Report | str | Path) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
    if isinstance(report, Report):
        content, answers = report.to_json(), report.answers()
        if not answers:
            raise InputError(f"{shorten(report)} cannot be compared: it has no k-NN, and all heads diverged.")
        return content, {one.name: one.correct.numpy() for one in answers}
    if not isinstance(report, (str, Path)):
        raise InputError(f"Only reports of classification, or their folders, can be compared; got {shorten(report)}.")
    folder = Path(report)
    folder = folder.parent if folder.is_file() else folder
    if not (folder / "results.json").is_file():
        raise InputError(
            f"{shorten(report)} is not the folder of a report: `visionattn probe` writes results.json there."
        )
    content = read_json(folder / "results.json", {"command": str})
    if content.get("task", "classification") != "classification":
        task = shorten(content["task"])
        raise InputError(f"Only reports of classification can be compared; {shorten(report)} is a report of {task}.")
    again = f"Run its command again: `{shorten(content['command'], 400)}`. It keeps finished work."
    try:
        content = read_json(folder / "results.json", _SCHEMA)
        correct = read_predictions(folder / PREDICTIONS).correct
    except DataError as error:
        raise DataError(f"{error} {again}") from error
    sizes = [content["backbone"][name] for name in ("parameters", "macs", "bytes")]
    if min(sizes) < 0 or max(sizes) > 2**63 or not 0 < content["data"]["image_size"] <= LARGEST:
        raise DataError(f"{shorten(folder / 'results.json')} has invalid costs. {again}")
    if {one["name"] for one in content["answers"]} != set(correct) or content.get("best") not in correct:
        raise DataError(f"{shorten(folder / PREDICTIONS)} does not belong to results.json. {again}")
    return content, correct


def _time(comparison: Comparison, models: Mapping[int, nn.Module], device: torch.device) -> None:
    """Time the backbones that can be opened, and add notes about the others."""
    opened: dict[str, Backbone] = {}
    for place, one in enumerate(comparison.judged):
        try:
            opened[one.name] = _open(one.report, models.get(place), device)
        except VisionAttnError as error:
            comparison.notes.append(f"{one.name} was not timed: {error}")
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    count = torch.get_num_threads()
    threads = "" if device.type == "cuda" else f", {count} thread{'s' * (count > 1)}"
    comparison.device = f"{processor}{threads}, torch {torch.__version__}"
    comparison.timings = dict(zip(opened, time_backbones(list(opened.values()))))


def _open(report: Mapping[str, Any], model: nn.Module | None, device: torch.device) -> Backbone:
    """The backbone of a report; a name gets random weights, which take the same time."""
    backbone, size = report["backbone"], report["data"]["image_size"]
    if model is None:
        if backbone["given"]:
            raise InputError("it was a Python object, which a report cannot open.")
        is_name = backbone["checkpoint"] is not None or not os.path.exists(backbone["name"])
        model = open_backbone(backbone["name"], random=is_name, image_size=size).model
    layers = [layer["index"] for layer in report["layers"]]
    autocast = torch.bfloat16 if device.type == "cuda" else None
    return Backbone(model.to(device), layers, image_size=size, autocast=autocast)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
