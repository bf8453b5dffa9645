"""Several backbones, probed one after the other and compared."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import nn

from visionattn.errors import InputError, shorten
from visionattn.opening import is_file, open_backbone
from visionattn.probe.comparing import compare_reports
from visionattn.probe.comparison import Comparison
from visionattn.probe.report.report import Report
from visionattn.probe.running import BackboneSource, run_probe
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.tokens.backbone import Backbone, backbone_name

__all__ = ["run_probes"]


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
