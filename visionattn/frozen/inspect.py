"""`visionattn.inspect`: layer-by-layer report on the attention of a frozen backbone, on your images."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from visionattn.devices import find_device
from visionattn.errors import InputError, shorten
from visionattn.files import check_folder
from visionattn.frozen.agreement import agreement
from visionattn.frozen.curves import prune_curves
from visionattn.frozen.heads import head_scores
from visionattn.frozen.inspection import MEAN_MAP, Inspection
from visionattn.frozen.looking import look
from visionattn.frozen.report import check_report, write_report
from visionattn.frozen.selection import check_policies, measure_policies
from visionattn.frozen.sheet import to_image
from visionattn.frozen.tokens import prune_tokens
from visionattn.opening import open_backbone
from visionattn.probe.embedding import class_of
from visionattn.probe.files import open_pictures
from visionattn.probe.given import eval_transform
from visionattn.probe.progress import show_progress
from visionattn.probe.sources import backbone_name
from visionattn.probe.tokens.loading import check_share, read_batches

__all__ = ["inspect"]

BATCH = 64
JUDGED = 8  # images whose maps are compared with occlusion


def inspect(
    backbone: str | Path | nn.Module,
    images: Any,
    *,
    checkpoint: str | Path | None = None,
    random: bool = False,
    image_size: int | None = None,
    count: int = 64,
    masks: int = 200,
    policy: str | Sequence[str] | None = None,
    budget: float | Sequence[float] = 0.125,
    tokens: bool = False,
    heads: bool = False,
    maps: int = 8,
    device: str = "auto",
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Inspection:
    """Inspect the attention of a frozen backbone, and measure what sparse attention or pruning costs in accuracy.

        found = visionattn.inspect("vit_small_patch16_224.dino", "photos", output="report")
        print(found.look.layers[-1].effective_keys)

    For each layer the report has: effective keys, sinks found by three detectors, the attention on the class token, the
    largest share of a token's energy in one channel, the share of the tiles that hold 90 % of the attention, and the
    overlap with the selection of earlier layers. It also has the agreement of the last layer's map with occlusion, and
    a contact sheet of maps with sinks marked.

    Args:
        backbone: See `visionattn.probe`. Its attention must call `scaled_dot_product_attention` over a single grid of
            patches, as in timm's ViT, DeiT, DINOv2 and EVA.
        images: A folder with its sub-folders, an image file, or a list of images. In a folder, the first sub-folder of
            an image is its class, which k-NN accuracy needs.
        checkpoint: Weight file, if `backbone` is a name.
        random: Random weights, if `backbone` is a name.
        image_size: Side of the images in pixels; None: the model's.
        count: Number of images to read, evenly spread over the folder.
        masks: Random masks per image, for the comparison with occlusion.
        policy: Names of sparse attention policies, or "all"; the controls are always included. None: not measured.
        budget: Share of all keys that a query reads under a policy; one or several.
        tokens: Measure the model with fewer tokens, compared with fewer blocks.
        heads: Measure the model with fewer heads, compared with fewer blocks.
        maps: Number of images on the contact sheet.
        device: "auto" (a GPU if available), or a device of PyTorch.
        output: Folder of the report; None: no report is written.
        overwrite: Replace the report of an earlier run.
        progress: Show progress bars.

    Raises:
        CheckpointError: The weights could not be read, or do not match the model.
        DataError: There are no images, or too many cannot be read.
        InputError: The backbone's attention is not reached, an argument is not accepted, or the report exists.
        StorageError: The report could not be written.
        UnknownNameError: No model has this name.
    """
    for name, value, least in (("count", count, 2), ("masks", masks, 2), ("maps", maps, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}; got {shorten(value)}.")
    budgets = [budget] if isinstance(budget, (int, float)) else list(budget)
    check_policies(policy or "all", budgets)
    if output is not None:
        check_report(check_folder(output), overwrite)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, quiet=not progress)
    source = copy.deepcopy(backbone) if isinstance(backbone, nn.Module) else backbone
    opened = open_backbone(source, checkpoint, random, image_size=image_size)
    where = torch.device(find_device(device))
    model = opened.model.eval().requires_grad_(False).to(where)
    if tokens:  # a model that cannot be pruned is refused before the work begins
        prune_tokens(copy.deepcopy(model), 0.5)
    if heads:
        head_scores(model, (), "random")
    config = resolve_model_data_config(model)
    size = image_size or config["input_size"][1]
    read = _read(images, config, size, count, console)
    if len(read.names) < 2:
        raise InputError(f"inspect requires at least two readable images; {shorten(images)} has {len(read.names)}.")
    shown = read.images.to(where, next(model.parameters()).dtype)
    with show_progress(console) as bars:
        bar = bars.add_task("layers", total=len(shown))
        found = look(model, shown, lambda done: bars.update(bar, completed=done))
    logits = _gives_logits(model)
    judged = shown[:JUDGED]
    console.print(f"Occlusion of {len(judged)} images, {masks} masks each.")
    of_layers = torch.stack(found.maps)[:, : len(judged)].to(where)
    judgement = agreement(
        _predictor(model), judged, of_layers[-1], found.grid, logits=logits, masks=masks,
        others={MEAN_MAP: of_layers.mean(0)},
    )  # fmt: skip
    rows, curves = [], []
    if policy is not None:
        side = _tile_side(found.grid)
        rows = measure_policies(
            model, list(shown.split(BATCH)), read.labels, policy, budgets,
            query_tile=2 * side, key_tile=side, progress=console.print,
        )  # fmt: skip
    if tokens or heads:
        curves = prune_curves(
            model, shown, read.labels, tokens=tokens, heads=heads,
            source="class" if found.has_class else "mean", progress=console.print,
        )  # fmt: skip
    inspection = Inspection(
        backbone_name(backbone), opened.source, size, read.names, read.classes, found, judgement, logits, rows, curves,
        [to_image(image, config["mean"], config["std"]) for image in read.images[:maps]], read.skipped,
        None if output is None else Path(output),
    )  # fmt: skip
    if output is not None:
        write_report(inspection, Path(output))
    return inspection


class _Read(NamedTuple):
    names: list[str]
    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    skipped: list[tuple[str, str]]


def _read(images: Any, config: dict[str, Any], size: int, count: int, console: Console) -> _Read:
    """Read images, evenly spread over the folder; with classes if each image has one and there are at least two."""
    transform = eval_transform(config["input_size"][0], size, config["mean"], config["std"])
    names, dataset = open_pictures(images, transform)
    rows = sorted({math.floor(number * len(names) / count) for number in range(count)})
    kept, found, skipped = [], [], []
    with show_progress(console) as progress:
        bar = progress.add_task("images", total=len(rows))
        cuts = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
        for batch in read_batches(dataset, (size, size), cuts, 0):
            kept += batch.rows
            skipped += [(names[row], reason) for row, reason in batch.skipped]
            if batch.images is not None:
                found.append(batch.images)
            progress.advance(bar, len(batch.rows) + len(batch.skipped))
    check_share([(row, reason) for row, (_, reason) in enumerate(skipped)], len(rows))
    of_each = [class_of(names[row]) for row in kept]
    classes = tuple(sorted({name for name in of_each if name is not None}))
    labels = None
    if len(classes) > 1 and None not in of_each:
        labels = torch.tensor([classes.index(str(name)) for name in of_each])
    return _Read([names[row] for row in kept], torch.cat(found), labels, classes if labels is not None else (), skipped)


def _gives_logits(model: nn.Module) -> bool:
    classes: Any = getattr(model, "num_classes", 0)
    return isinstance(classes, int) and classes > 1


def _predictor(model: nn.Module) -> Any:
    """Images -> logits or features (n, K)."""

    def predict(images: Tensor) -> Tensor:
        found = model(images)
        return found.float() if found.ndim == 2 else found.float().flatten(2).mean(2)

    return predict


def _tile_side(grid: tuple[int, int]) -> int:
    """Side of the key tiles, half that of the query tiles: 4, or less on a small grid."""
    return 4 if min(grid) >= 16 else 2 if min(grid) >= 6 else 1
