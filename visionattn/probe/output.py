"""Output folder of a run: one per pair of weights and data; an existing report is replaced only on request."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from visionattn.errors import DataError, InputError, shorten
from visionattn.files import check_folder, read_json
from visionattn.probe.inputs import Images
from visionattn.probe.settings import ProbeSettings

__all__ = ["check_report", "default_output"]

_ROOT = Path("runs/probe")
_FILES = (
    "report.html",
    "report.md",
    "results.csv",
    "layers.svg",
    "few_shot.svg",
    "heads",
    "maps",
    "classes.csv",
    "examples",
)
_LONGEST = 150  # characters of a folder's name before its hash


def default_output(settings: ProbeSettings, name: str, weights: str, images: Images) -> Path:
    """Return `runs/probe/BACKBONE-DATASET-HASH`, with a hash of the weights and of the location of the data.

    A folder of that name without the hash, from earlier versions, is used if it has these weights and images.

    Args:
        settings: Settings of the run.
        name: Name of the backbone, or its file.
        weights: Hash of the backbone's weights.
        images: The data set.
    """
    backbone = Path(name).stem if os.path.exists(name) else name
    name = re.sub(r"[^\w.-]+", "-", f"{backbone}-{images.dataset}")[:_LONGEST]
    if _belongs(_ROOT / name, weights, images):
        return _ROOT / name
    root = images.root and os.path.realpath(images.root)
    splits = [settings.train_split, settings.val_split, settings.test_split]
    distinguished = [weights, images.dataset, root, *splits]
    return _ROOT / f"{name}-{hashlib.sha256(json.dumps(distinguished).encode()).hexdigest()[:8]}"


def _belongs(folder: Path, weights: str, images: Images) -> bool:
    """Whether a run with these weights and images was started in a folder."""
    try:
        found = _read_report(folder)
        return _describes(found, weights, images)
    except DataError:
        pass
    for file in folder.glob("features/*/meta.json"):
        try:
            identity = read_json(file, {"identity": {"weights": str, "dataset": str}})["identity"]
        except DataError:
            continue
        digests = (images.train.digest, images.test.digest)
        if identity["weights"] == weights and identity["dataset"].endswith(digests):
            return True
    return False


def _read_report(folder: Path) -> dict[str, Any]:
    schema = {"command": str, "backbone": {"sha256": str}, "data": {"train_digest": str, "test_digest": str}}
    return read_json(folder / "results.json", schema)


def _describes(report: dict[str, Any], weights: str, images: Images) -> bool:
    known = report["backbone"]["sha256"], report["data"]["train_digest"], report["data"]["test_digest"]
    return known == (weights, images.train.digest, images.test.digest)


def check_report(folder: Path, plan: str, weights: str, images: Images, overwrite: bool) -> None:
    """Check that no report of another plan would be replaced.

    Args:
        folder: Folder of the run.
        plan: Hash of all that the numbers of the report depend on.
        weights: Hash of the backbone's weights.
        images: The data set.
        overwrite: Whether a report may be replaced.

    Raises:
        InputError: The folder contains another report and `overwrite` is false, or the path is not a folder.
    """
    check_folder(folder)
    if overwrite:
        return
    way = "Use --overwrite to replace it, or --output to choose another folder."
    if not (folder / "results.json").exists():
        others = [name for name in _FILES if (folder / name).exists()]
        if others and not (folder / "state").exists():  # an interrupted run has its state there
            raise InputError(f"{shorten(folder)} contains a file {others[0]} that does not belong to a report. {way}")
        return
    try:
        found = _read_report(folder)
    except DataError as error:
        raise InputError(f"{shorten(folder)} contains a report that cannot be read: {error} {way}") from error
    if found.get("plan") != plan or not _describes(found, weights, images):
        raise InputError(f"{shorten(folder)} contains the report of another run, `{shorten(found['command'])}`. {way}")
