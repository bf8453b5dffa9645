"""Files of a report's selected heads, each with its card."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from visionattn.files import atomic_path
from visionattn.probe.heads.files import save_head
from visionattn.probe.heads.results import HeadResult
from visionattn.probe.report.report import Report, percent

__all__ = ["head_file", "write_head"]


def head_file(folder: Path, report: Report, result: HeadResult) -> Path:
    """Path of a selected head."""
    return folder / f"{result.spec.pooling}-layer{report.indices[result.spec.layer]}.safetensors"


def write_head(report: Report, result: HeadResult, folder: Path) -> None:
    """Write a selected head and its card, each completely or not at all.

    Raises:
        StorageError: A file could not be written.
    """
    spec, layer, best = result.spec, report.layers[result.spec.layer], result.best
    path = head_file(folder, report, result)
    facts = {
        "pooling": spec.pooling,
        "layer": {"index": report.indices[spec.layer], **asdict(layer)},
        "classes": list(report.classes),
        "backbone": report.backbone,
        "data": report.data,
        "command": report.command,
    }
    save_head(result.head, facts, path)
    data, backbone = report.data, report.backbone
    low, high = best.interval if best else (math.nan, math.nan)
    accuracy = percent(best.accuracy, (low, high)) if best else "–"
    card = [
        f"# {path.stem}",
        "",
        f"Pooling `{spec.pooling}`, batch norm and linear classifier for {len(report.classes)} classes, on the frozen "
        f"layer `{layer.name}` (index {report.indices[spec.layer]}) of `{backbone['name']}`.",
        "",
        f"- Backbone's weights: {backbone['weights']}, SHA-256 `{backbone['sha256']}`",
        f"- Trained on: {data['dataset']}, {data['root'] or 'embedded'}, {data['train_images']:,} images, "
        f"{report.held_out:,} of which were held out to select learning rate, weight decay and epoch",
        f"- Images: {data['transform']}",
        f"- Test accuracy: {accuracy} % (Wilson's 95 % interval), {data['test_images']:,} images",
        f"- Training: {spec.optimizer}, lr {spec.lr:g}, weight decay {spec.weight_decay:g}, seed {spec.seed}, epoch "
        f"{result.best_epoch} of {report.sweep.epochs}",
        f"- Command: `{report.command}`",
        f"- To classify images: `visionattn predict IMAGES --head {path.name}`",
        f'- To open it in Python: `visionattn.probe.load_head("{path.name}")`',
        "",
    ]
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(card), encoding="utf-8")
