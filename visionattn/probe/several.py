"""Several backbones, probed one after the other and compared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from visionattn.probe.comparing import compare_reports
from visionattn.probe.comparison import Comparison
from visionattn.probe.report.report import Report
from visionattn.probe.running import run_probe
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.sources import BackboneSource, backbone_name, find_sources, folder_names, open_source
from visionattn.probe.tokens.backbone import Backbone

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
    sources = find_sources(backbones, settings)
    names = [backbone_name(one.backbone) for one in sources]
    folders = [None if settings.output is None else Path(settings.output) / name for name in folder_names(names)]
    for one in sources:  # report mistakes before hours of work
        if isinstance(one.backbone, (str, Path)):
            open_source(one.backbone, one.checkpoint, one.random, settings.image_size)
    console = Console(highlight=False, markup=False, quiet=not progress)
    reports: list[Report] = []
    for place, (one, folder) in enumerate(zip(sources, folders), 1):
        console.print(f"Backbone {place} of {len(sources)}: {names[place - 1]}")
        alone = replace(settings, output=folder, checkpoint=one.checkpoint, random=one.random)
        report = run_probe(one.backbone, data, alone, progress=progress, always_write=always_write)
        assert isinstance(report, Report)
        reports.append(report)
    given = [one.backbone.model if isinstance(one.backbone, Backbone) else one.backbone for one in sources]
    models = {place: copy.deepcopy(one) for place, one in enumerate(given) if isinstance(one, nn.Module)}
    return compare_reports(reports, models, settings.output, settings.overwrite, settings.device, always_write)
