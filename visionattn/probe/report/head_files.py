"""Files of a report's selected heads, each with its card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from visionattn.files import atomic_path
from visionattn.probe.heads.banks import Head
from visionattn.probe.heads.files import save_head
from visionattn.probe.heads.results import HeadResult
from visionattn.probe.report.report import Report, percent
from visionattn.probe.report.tasks import TaskHead, TaskReport
from visionattn.probe.segmentation.heads import LinearSegmenter

__all__ = ["head_file", "write_head", "write_task_head"]


def head_file(folder: Path, report: Report | TaskReport, result: HeadResult | TaskHead) -> Path:
    """Path of a selected head."""
    return folder / f"{result.spec.pooling}-layer{report.indices[result.spec.layer]}.safetensors"


def write_head(report: Report, result: HeadResult, folder: Path) -> None:
    """Write a selected head and its card, each completely or not at all.

    Raises:
        StorageError: A file could not be written.
    """
    best = result.best
    low, high = best.interval if best else (math.nan, math.nan)
    accuracy = percent(best.accuracy, (low, high)) if best else "–"
    images = report.data["test_images"]
    measured = [f"Test accuracy: {accuracy} % (Wilson's 95 % interval), {images:,} images"]
    epochs = f"epoch {result.best_epoch} of {report.sweep.epochs}"
    _write(report, result, result.head, folder, "classification", measured, epochs)


def write_task_head(
    report: TaskReport, head: TaskHead, module: Head | LinearSegmenter, epoch: int, folder: Path
) -> None:
    """Like `write_head`, for a head of another task than classification.

    Args:
        report: The report.
        head: The head in the report.
        module: The head itself.
        epoch: Epoch of its weights.
        folder: Folder of the file.

    Raises:
        StorageError: A file could not be written.
    """
    values = ((metric, metric.write(*head.scores[metric.key])) for metric in report.metrics)
    measured = [f"Test {metric.title}: {value} (95 % interval)" for metric, value in values]
    _write(report, head, module, folder, report.task, measured, f"epoch {epoch} of {report.protocol['epochs']}")


def _write(
    report: Report | TaskReport,
    result: HeadResult | TaskHead,
    module: Head | LinearSegmenter,
    folder: Path,
    task: str,
    measured: Sequence[str],
    epochs: str,
) -> None:
    spec, layer = result.spec, report.layers[result.spec.layer]
    path = head_file(folder, report, result)
    facts = {
        "task": task,
        "pooling": spec.pooling,
        "layer": {"index": report.indices[spec.layer], **asdict(layer)},
        "classes": list(report.classes),
        "backbone": report.backbone,
        "data": report.data,
        "command": report.command,
    }
    save_head(module, facts, path)
    data, backbone = report.data, report.backbone
    pooled = f"Pooling `{spec.pooling}`, batch norm and linear classifier"
    what = f"Segmentation head `{spec.pooling}`" if task == "segmentation" else pooled
    card = [
        f"# {path.stem}",
        "",
        f"{what} for {len(report.classes)} {'targets' if task == 'regression' else 'classes'}, on the frozen layer "
        f"`{layer.name}` (index {report.indices[spec.layer]}) of `{backbone['name']}`.",
        "",
        f"- Backbone's weights: {backbone['weights']}, SHA-256 `{backbone['sha256']}`",
        f"- Trained on: {data['dataset']}, {data['root'] or 'embedded'}, {data['train_images']:,} images, "
        f"{report.held_out:,} of which were held out for selection",
        f"- Images: {data['transform']}",
        *(f"- {line}" for line in measured),
        f"- Training: {spec.optimizer}, lr {spec.lr:g}, weight decay {spec.weight_decay:g}, seed {spec.seed}, {epochs}",
        f"- Command: `{report.command}`",
        f"- To apply it to images: `visionattn predict IMAGES --head {path.name}`",
        f"- To export it with its backbone: `visionattn export --head {path.name} --output FILE.onnx`",
        f'- To open it in Python: `visionattn.probe.load_head("{path.name}")`',
        "",
    ]
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(card), encoding="utf-8")
