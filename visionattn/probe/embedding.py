"""`visionattn.embed`: one vector per image from a frozen backbone, as a file of NumPy arrays; labels are not needed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.utils.data import ConcatDataset

from visionattn.devices import find_device
from visionattn.errors import DataError, InputError
from visionattn.files import atomic_path, check_output
from visionattn.probe.files import open_pictures
from visionattn.probe.given import eval_transform
from visionattn.probe.inputs import NAMED, READERS, image_config, read_images
from visionattn.probe.progress import show_progress
from visionattn.probe.report.facts import backbone_facts
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.sources import BackboneSource, backbone_name, open_source
from visionattn.probe.tokens.backbone import Backbone, make_backbone
from visionattn.probe.tokens.loading import check_share, read_batches
from visionattn.weights.hashing import hash_state

__all__ = ["Embeddings", "class_of", "embed"]

BATCH = 64
SPLITS = ("train", "training", "val", "valid", "validation", "test")


@dataclass(frozen=True, repr=False)
class Embeddings:
    """Vectors of images.

    Attributes:
        features: The class token, or the mean of the patches if there is none, float32 (n, D).
        patch_means: The mean of the patches, float32 (n, D).
        labels: Class of each image, int64 (n,); -1 if it is not known.
        names: Names of the images.
        classes: Names of the classes.
        facts: How they were computed: `backbone`, `layer`, `preprocessing`; plain values.
        skipped: Name of each image that could not be read, and the reason.
    """

    features: np.ndarray
    patch_means: np.ndarray
    labels: np.ndarray
    names: list[str]
    classes: tuple[str, ...]
    facts: dict[str, Any]
    skipped: list[tuple[str, str]]

    def __repr__(self) -> str:
        count, width = self.features.shape
        known = f", {len(self.classes)} classes" if self.classes else ", no labels"
        return f"Embeddings({count:,} images, {width} values each{known})"

    def save(self, file: str | Path) -> None:
        """Write the vectors as .npz, which `numpy.load(file)` opens; `facts` is JSON.

        Raises:
            StorageError: The file could not be written.
        """
        arrays = {
            "features": self.features,
            "patch_means": self.patch_means,
            "labels": self.labels,
            "names": np.array(self.names, dtype=str),
            "classes": np.array(self.classes, dtype=str),
            "facts": np.array(json.dumps(self.facts, ensure_ascii=False)),
        }
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]


def embed(
    backbone: BackboneSource,
    data: Any,
    output: str | Path | None = None,
    *,
    settings: ProbeSettings | None = None,
    progress: bool = True,
    **options: Any,
) -> Embeddings:
    """Compute one vector per image.

    Args:
        backbone: See `visionattn.probe`.
        data: A folder of images with its sub-folders, an image file, or a list of images; or a named dataset or
            (train, test), as in `visionattn.probe`. In a folder, the first sub-folder of an image is its class, below
            `train`, `val` and `test` if these exist; images outside of sub-folders have no label.
        output: File of the vectors, .npz; None: they are not written.
        settings: Settings, of which only those of backbone, data and device are used.
        progress: Show the progress.
        **options: Fields of `ProbeSettings`, which override those of `settings`.

    Returns:
        The vectors.

    Raises:
        CheckpointError: The weights could not be read, or do not match the model.
        DataError: There are no images, or more than 10 % and more than a few cannot be read.
        InputError: A setting is not accepted, the file exists, or several layers are requested.
        StorageError: The file could not be written.
        UnknownNameError: No model has this name.
    """
    settings = replace(settings or ProbeSettings(), **options)
    settings = replace(settings, device=str(find_device(settings.device)))
    if output is not None:
        check_output(output, settings.overwrite, (".npz",))
    opened = open_source(backbone, settings.checkpoint, settings.random, settings.image_size)
    config = resolve_model_data_config(opened.model)
    size, mean, std = image_config(settings, config)
    reading = make_backbone(opened.model, settings.layers, size, settings.device)
    if len(reading.layers) > 1:
        raise InputError(f"embed reads a single layer; --layers selects {len(reading.layers)}.")
    names, dataset, labels, classes = _read(data, settings, config)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, quiet=not progress)
    found = _vectors(reading, dataset, len(names), settings.workers, console)
    facts = {
        "backbone": backbone_facts(backbone_name(backbone), opened, reading, hash_state(reading.model.state_dict())),
        "layer": {"index": reading.indices[0], "name": reading.layers[0].name},
        "preprocessing": {
            "image_size": size,
            "mean": list(mean),
            "std": list(std),
            "resize": "shorter side, bicubic, then the middle",
        },
        "features": "class token" if reading.layers[0].has_class else "mean of the patches",
    }
    embeddings = Embeddings(
        found.features.numpy(),
        found.patch_means.numpy(),
        np.array(found.labels if labels is None else [labels[row] for row in found.rows], dtype=np.int64),
        [names[row] for row in found.rows],
        classes,
        facts,
        [(names[row], reason) for row, reason in found.skipped],
    )
    if output is not None:
        embeddings.save(output)
    return embeddings


def _read(
    data: Any, settings: ProbeSettings, config: dict[str, Any]
) -> tuple[list[str], Any, list[int] | None, tuple[str, ...]]:
    """Names, data set, labels (None if they are read together with the images) and names of the classes."""
    named = isinstance(data, str) and (data in NAMED or data.startswith(READERS))
    if named or isinstance(data, tuple):
        images = read_images(data, settings, config)
        names = [f"{part}/{name}" for part in ("train", "test") for name in getattr(images, part).names]
        return names, ConcatDataset([images.train.dataset, images.test.dataset]), None, images.classes
    size, mean, std = image_config(settings, config)
    names, dataset = open_pictures(data, eval_transform(config["input_size"][0], size, mean, std))
    known = [class_of(name) for name in names] if isinstance(data, (str, Path)) and Path(data).is_dir() else []
    classes = tuple(sorted({name for name in known if name is not None}))
    places = {name: place for place, name in enumerate(classes)}
    labels = [-1 if name is None else places[name] for name in known] or [-1] * len(names)
    return names, dataset, labels, classes


def class_of(name: str) -> str | None:
    """The class of an image in a folder: its first sub-folder, below that of a split."""
    folders = PurePath(name).parts[:-1]
    folders = folders[1:] if folders and folders[0] in SPLITS else folders
    return folders[0] if folders else None


class _Vectors(NamedTuple):
    """Rows that could be read, with labels and vectors, and rows that could not."""

    rows: list[int]
    labels: list[int]
    features: Tensor
    patch_means: Tensor
    skipped: list[tuple[int, str]]


def _vectors(backbone: Backbone, dataset: Any, count: int, workers: int, console: Console) -> _Vectors:
    cuts = [list(range(first, min(first + BATCH, count))) for first in range(0, count, BATCH)]
    rows: list[int] = []
    labels: list[int] = []
    skipped: list[tuple[int, str]] = []
    features: list[Tensor] = []
    means: list[Tensor] = []
    with show_progress(console) as progress:
        bar = progress.add_task("images", total=count)
        for batch in read_batches(dataset, backbone.image_size, cuts, workers):
            rows += batch.rows
            labels += batch.labels
            skipped += batch.skipped
            if batch.images is not None:
                tokens = backbone(batch.images)[0]
                mean = tokens.patches.float().mean(1)
                means.append(mean.cpu())
                features.append(means[-1] if tokens.class_token is None else tokens.class_token.float().cpu())
            progress.advance(bar, len(batch.rows) + len(batch.skipped))
    check_share(skipped, count)
    found = _Vectors(rows, labels, torch.cat(features), torch.cat(means), skipped)
    if not (found.features.isfinite().all() and found.patch_means.isfinite().all()):
        raise DataError("Some vectors contain NaN or infinity. Check the weights of the backbone.")
    return found
