"""Files of a head's predictions: one table, or a mask per image."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionattn.data.images import eight_bits, open_image
from visionattn.data.segment.masks import PALETTE, write_mask
from visionattn.errors import InputError, shorten
from visionattn.files import atomic_path
from visionattn.predict import batch
from visionattn.predict.batch import Bar, Job, Outcome
from visionattn.probe.applying import Applied, HeadClassifier
from visionattn.probe.segmentation.overlays import overlay_mask

__all__ = ["write_applied", "write_masks"]

CLASSES = "classes.json"
_COLUMNS = ("label", "class", "probability")


def write_applied(applied: Applied, file: str | Path, top: int = 1, probabilities: bool = False) -> None:
    """Write one row per image, in the format of `visionattn predict` for a trained model.

    Args:
        applied: Predictions of the head.
        file: Output file; JSON if it ends in .json, otherwise CSV.
        top: Number of the most probable classes, each with its index, name and probability.
        probabilities: Write the probability of every class instead, as is always done for heads of multi-label
            classification; heads of regression have a number per target.

    Raises:
        StorageError: The file could not be written.
    """
    probabilities = probabilities or applied.task != "classification"
    rows = _every_class(applied) if probabilities else _likeliest(applied, top)
    with (
        atomic_path(file) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        if Path(file).suffix.lower() == ".json":
            outputs = "values" if applied.task == "regression" else "probabilities"
            json.dump([_nested(row, top, outputs if probabilities else None) for row in rows], stream, indent=1)
            stream.write("\n")
            return
        writer = csv.writer(stream)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)


def _every_class(applied: Applied) -> list[dict[str, Any]]:
    table = zip(applied.images, applied.probabilities.tolist())
    digits = "{:.6g}".format if applied.task == "regression" else _digits
    return [{"image": image, **dict(zip(applied.classes, map(digits, row)))} for image, row in table]


def _likeliest(applied: Applied, top: int) -> list[dict[str, Any]]:
    labels = {name: label for label, name in enumerate(applied.classes)}
    rows = []
    for image, entries in zip(applied.images, applied.top(top)):
        row: dict[str, Any] = {"image": image}
        for place, (name, probability) in enumerate(entries, 1):
            values = (labels[name], name, _digits(probability))
            row |= {f"{column}_{place}" if place > 1 else column: value for column, value in zip(_COLUMNS, values)}
        rows.append(row)
    return rows


def _nested(row: dict[str, Any], top: int, outputs: str | None) -> dict[str, Any]:
    """A row for JSON: outputs are numbers, and several classes a list, or a mapping with the name `outputs`."""
    image, *values = row.values()
    if outputs:
        return {"image": image, outputs: dict(zip(list(row)[1:], map(float, values)))}
    classes = [
        {"label": label, "class": name, "probability": float(share)}
        for label, name, share in zip(values[::3], values[1::3], values[2::3])
    ]
    return {"image": image, **classes[0]} if top == 1 else {"image": image, "classes": classes}


def _digits(probability: float) -> str:
    return f"{probability:.6f}"


def write_masks(
    classifier: HeadClassifier,
    inputs: Sequence[str | Path],
    folder: str | Path,
    *,
    color: bool = False,
    overwrite: bool = False,
    skip_existing: bool = False,
) -> Outcome:
    """Write the class of each pixel of images, with a line of output per file.

    A mask is a palette image, NAME.png, of the size of its image; `classes.json` in the folder has the name and the
    colour of each class.

    Args:
        classifier: Opened head of segmentation.
        inputs: Files, folders with their sub-folders, or patterns.
        folder: Folder of the masks.
        color: Also write NAME_color.png: the image in grey, painted in the colours of the classes.
        overwrite: Replace existing outputs.
        skip_existing: Keep existing outputs, to resume an interrupted run.

    Returns:
        The written, skipped and failed outputs; a failed image does not end the run.

    Raises:
        InputError: The output is not a folder, or has masks of other classes.
        VisionAttnError: There are no images, or the folder is not writable.
    """
    named: list[tuple[Path, Path]] = []  # each image, and its name in the folder
    for given in inputs:
        files, _ = batch.files_of(given, recursive=True, without=Path(folder))
        inside = Path(given).is_dir()
        named += [(file, file.relative_to(given) if inside else Path(file.name)) for file in files]
    place, is_folder = batch.target_folder(folder, several=False)
    if not is_folder:
        raise InputError(f"Masks are written to a folder, not to a file: {shorten(folder)} has a suffix.")
    _write_classes(classifier.classes, place / CLASSES, overwrite)
    jobs = []
    for source, name in named:
        target = place / name.with_suffix(".png")
        jobs.append(Job((source,), target, (_overlay(target),) if color else ()))

    def work(job: Job, bar: Bar, remaining: int) -> list[str]:
        image = eight_bits(open_image(job.source), job.source)
        mask = classifier.segment(classifier.transform(image), (image.height, image.width))
        if color:
            with atomic_path(_overlay(job.target)) as temporary:
                overlay_mask(image, mask).save(temporary)
        write_mask(job.target, mask)  # last: it marks the job as done
        return []

    return batch.run(jobs, work, (".png",), overwrite=overwrite, skip_existing=skip_existing)


def _overlay(target: Path) -> Path:
    return target.with_name(f"{target.stem}_color.png")


def _write_classes(classes: Sequence[str], file: Path, overwrite: bool) -> None:
    """Write names and colours of classes; a file of other classes is kept unless `overwrite` is given."""
    rows = [{"label": label, "class": name, "color": PALETTE[label].tolist()} for label, name in enumerate(classes)]
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    if file.exists() and not overwrite and file.read_text(encoding="utf-8", errors="replace") != text:
        raise InputError(
            f"{shorten(file)} has other classes than the head. Give --overwrite to replace it, or name another folder."
        )
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
