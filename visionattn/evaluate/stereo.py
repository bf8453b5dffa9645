"""Stereo as reported by Middlebury, ETH3D and KITTI: end-point error and bad pixels of the left view's disparity.

Errors (`visionattn.metrics.matching`) are measured over all pixels with ground truth and over the non-occluded ones.
The score of a data set is the mean over its scenes.

Semi-global matching leaves out uncertain pixels, and each of them counts as bad. It is therefore reported twice: raw,
and with its gaps filled (`visionattn.evaluate.sgbm.fill`), as pipelines do that need a value for each pixel.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from visionattn import __version__
from visionattn.data.matching.stereo import StereoPair, find_scenes, summarize
from visionattn.devices import find_device
from visionattn.errors import ConfigError, InputError, VisionAttnError, explaining_memory, require, shorten
from visionattn.evaluate.opening import open_models, place
from visionattn.evaluate.sgbm import fill, sgbm
from visionattn.files import atomic_path
from visionattn.metrics.matching import Errors, disparity_errors
from visionattn.models.enlarged import EnlargedViews
from visionattn.predict.filling import fill_left

__all__ = ["BASELINES", "Errors", "MeasuredStereo", "StereoMeasurements", "disparity_errors", "evaluate_stereo"]

BASELINES = {"sgbm": sgbm}
REGIONS = ("all", "nonocc")


@dataclass(frozen=True)
class MeasuredStereo:
    """One model on one scene, over "all" pixels or the non-occluded ones ("nonocc")."""

    model: str
    scene: str
    region: str
    errors: Errors


@dataclass
class StereoMeasurements:
    """Result of `evaluate_stereo`.

    Attributes:
        device: Device of the models.
        dtype: Precision of the models.
        enlarge: Factor by which the views were enlarged for the models.
        fill: Whether the models' disparities were filled.
        rows: One row per model, scene and region.
        failures: One error line per scene that could not be measured.
        notes: Assumptions about the ground truth, such as factors of PNGs, with the scenes they concern.
    """

    device: str
    dtype: str
    enlarge: float = 1.0
    fill: bool = False
    rows: list[MeasuredStereo] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def means(self) -> list[MeasuredStereo]:
        """Each model's mean over the scenes, by region."""
        found = []
        for model in dict.fromkeys(row.model for row in self.rows):
            for region in REGIONS:
                own = [row.errors for row in self.rows if (row.model, row.region) == (model, region)]
                if own:
                    values = {key.name: float(np.mean([getattr(e, key.name) for e in own])) for key in fields(Errors)}
                    found.append(MeasuredStereo(model, f"mean of {len(own)}", region, Errors(**values)))
        return found

    def table(self) -> Table:
        """One row per scene, region and model."""
        first = ("scene", "pixels", "model")
        table = Table(*first, "EPE", "bad-0.5", "bad-1", "bad-2", "bad-4", "D1", "density")
        for column in table.columns[len(first) :]:
            column.justify = "right"
        scenes = dict.fromkeys((row.scene, row.region) for row in self.rows)
        by_scene = [row for scene in scenes for row in self.rows if (row.scene, row.region) == scene]
        for rows in (by_scene, self.means()):
            for row in rows:
                epe, *shares = asdict(row.errors).values()
                names = [shorten(row.scene, 60), row.region, shorten(Path(row.model).name, 60)]
                table.add_row(*names, f"{epe:.3f}", *(f"{x:.1f}" for x in shares))
            table.add_section()
        return table

    def write(self, path: str | Path) -> None:
        """Write all rows and means as CSV.

        Raises:
            StorageError: The file could not be written.
        """
        origin = {"device": self.device, "dtype": self.dtype, "torch": torch.__version__, "visionattn": __version__}
        baselines = {name for baseline in BASELINES for name in (baseline, f"{baseline}_filled")}
        # Linux allows file names that are not valid text: they are written with escapes.
        with (
            atomic_path(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            names = ["model", "scene", "region", *(key.name for key in fields(Errors)), "enlarge", "fill", *origin]
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in [*self.rows, *self.means()]:
                errors = {key: f"{value:.4f}" for key, value in asdict(row.errors).items()}
                where = {"model": row.model, "scene": row.scene, "region": row.region}
                enlarge, fill = (1.0, False) if row.model in baselines else (self.enlarge, self.fill)
                writer.writerow({**where, **errors, "enlarge": enlarge, "fill": fill, **origin})


def evaluate_stereo(
    models: str | Path | nn.Module | Sequence[str | Path | nn.Module],
    folders: str | Path | Sequence[str | Path],
    *,
    layout: str | None = None,
    factor: float | Mapping[str, float] | None = None,
    baseline: str | None = None,
    enlarge: float = 1.0,
    fill: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    console: Console | None = None,
) -> StereoMeasurements:
    """Evaluate models on stereo pairs with ground truth.

    Args:
        models: One or several, or none with a baseline; each a name with pretrained weights, a weight file, or a
            module with the task "stereo".
        folders: Data sets or scenes, in a layout of `visionattn.data.matching.stereo`.
        layout: Their layout. Default: detected.
        factor: Factor by which PNG values exceed disparities, for all scenes, or per scene by name. Default: as assumed
            by `visionattn.data.matching.stereo.find_scenes` and reported in `notes`.
        baseline: "sgbm" adds OpenCV's semi-global matching, raw and with gaps filled ("sgbm_filled"); its search range
            is the largest disparity of the ground truth.
        enlarge: Factor by which the views are enlarged before matching (`visionattn.models.enlarged`).
        fill: Replace the models' disparities that fail the left-right consistency check, and smooth all
            (`visionattn.predict.filling.fill_inconsistent`).
        device: Device of the models: "auto" (a GPU if available), "cpu" or "cuda:1".
        dtype: Precision of weights and activations: float32, float16, bfloat16 or float64.
        console: Console for a progress bar. Default: no progress bar.

    Returns:
        All rows; scenes that could not be measured, or whose result is not finite, are listed in `failures`.

    Raises:
        ConfigError: There is no model and no baseline; a model has another task; the layout, baseline, device or dtype
            does not exist; or a factor is not above 0 or names no scene.
        CheckpointError: A weight file is unreadable or fits no model, or no weights are available for a name.
        InputError: The factor `enlarge` is out of range.
        DataError: A folder contains no stereo pair with ground truth.
        MissingPackageError: The baseline or filling needs OpenCV, which is not installed.
    """
    if baseline is not None and baseline not in BASELINES:
        raise ConfigError(f"The baseline must be one of {', '.join(map(repr, BASELINES))}; got {shorten(baseline)!r}.")
    if baseline is not None or fill:
        require("cv2", "images")
    scenes = find_scenes(folders, layout, factor)
    networks = open_models(models, "stereo")
    if not networks and baseline is None:
        raise ConfigError("There is nothing to evaluate: give a model, or --baseline sgbm (baseline=).")
    if enlarge != 1:
        networks = {label: EnlargedViews(network, enlarge) for label, network in networks.items()}
    device = str(find_device(device))
    networks = place(networks, device, dtype)
    found = StereoMeasurements(device, dtype, enlarge, fill)
    notes: list[tuple[str, str]] = []
    with Progress(console=console, disable=console is None, transient=True) as progress:
        task = progress.add_task("scenes", total=len(scenes))
        for scene in scenes:
            try:
                pair = scene.read()
                rows = _measure(scene.name, pair, baseline, networks, fill)
                # A scene counts for all models or for none: otherwise means would not be comparable.
                found.rows += rows
                notes += [(scene.name, note) for note in pair.notes]
            except VisionAttnError as error:
                found.failures.append(str(error) if str(scene.left.parent) in str(error) else f"{scene.left}: {error}")
            progress.advance(task)
    found.notes += summarize(notes)
    return found


def _measure(
    name: str, pair: StereoPair, baseline: str | None, networks: dict[str, Any], filled: bool
) -> list[MeasuredStereo]:
    disparities: dict[str, np.ndarray] = {}
    if baseline is not None:
        raw = BASELINES[baseline](pair.left, pair.right, float(np.nanmax(pair.truth, initial=0)))
        disparities |= {baseline: raw, f"{baseline}_filled": fill(raw)}
    for label, network in networks.items():
        both = _run(network, pair)
        if not np.isfinite(both).all():
            raise InputError(
                f"The output of {shorten(label)} is not finite: its weights are damaged, or the dtype is not precise "
                "enough."
            )
        disparities[label] = fill_left(both, pair.left) if filled else both[0]
    regions = {"all": None} if pair.nonocc is None else {"all": None, "nonocc": pair.nonocc}
    return [
        MeasuredStereo(label, name, region, disparity_errors(disparity, pair.truth, mask))
        for region, mask in regions.items()
        for label, disparity in disparities.items()
    ]


@torch.inference_mode()
def _run(network: Any, pair: StereoPair) -> np.ndarray:
    """The disparities of both views (2, H, W)."""
    parameter = next(network.parameters())
    views = [torch.from_numpy(view).permute(2, 0, 1)[None].to(parameter.device) for view in (pair.left, pair.right)]
    height, width = views[0].shape[2:]
    remedy = "leave out --enlarge (enlarge=), or use smaller images"
    with explaining_memory(f"{height} x {width} pixels", remedy):
        result = network(*((view / 255).to(parameter.dtype) for view in views))
        return result[0].float().cpu().numpy()
