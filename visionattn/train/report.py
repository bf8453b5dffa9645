"""The report of a classifier: metrics, per-class results, confusion matrix and learning curves.

`report.html` is a single file without scripts. The same folder holds `results.json`, `per_class.csv`,
`confusion_matrix.csv` and .png, `predictions.csv` and `mistakes.jpg`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from visionattn.errors import shorten
from visionattn.files import atomic_path, check_folder
from visionattn.page import CurvePoint, Curves, Section, write_pages, write_table, write_text
from visionattn.train.frozen import FrozenBackbone
from visionattn.train.results import Results

__all__ = ["draw_confusion", "draw_mistakes", "learning_curves", "write_report"]

MISTAKES = 24
NUMBERED = 30  # largest number of classes whose cells show counts and names
_CELL, _LABEL, _THUMB = 46, 150, 144


def write_report(
    folder: str | Path,
    results: Results,
    data: Any,
    split: str,
    title: str,
    settings: Mapping[str, Any],
    frozen: FrozenBackbone | None = None,
    metrics: Path | None = None,
) -> Path:
    """Write the report of a classifier.

    Args:
        folder: Output folder; files of an earlier report are replaced.
        results: Predictions on the split.
        data: Data module, which provides the images.
        split: Split of the data: val or test.
        title: Title of the page.
        settings: Settings of the run to show, as plain values.
        frozen: Results of the frozen backbone before training, if measured.
        metrics: Metrics table of the training, metrics.csv, if there is one.

    Returns:
        The path of the page.

    Raises:
        StorageError: A file could not be written.
    """
    folder = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    confusion, classes = results.confusion, results.classes
    draw_confusion(folder / "confusion_matrix.png", confusion, classes)
    rows = [{"class": name, **dict(zip(classes, counts))} for name, counts in zip(classes, confusion.tolist())]
    write_table(rows, folder / "confusion_matrix.csv")
    write_table(results.per_class(), folder / "per_class.csv")
    names = [data.image_name(split, place) for place in results.places.tolist()]
    write_table(_predictions(results, names), folder / "predictions.csv")
    worst = results.worst(MISTAKES)
    (folder / "mistakes.jpg").unlink(missing_ok=True)
    if worst:
        draw_mistakes(folder / "mistakes.jpg", results, worst, data, split)
    curves = learning_curves(metrics) if metrics is not None and metrics.is_file() else []
    content = {"title": title, "split": split, **results.summary(), **settings}
    if frozen is not None:
        content["frozen"] = {"k-NN": frozen.neighbours.accuracy, "linear": _finite(frozen.linear)}
    write_text(folder / "results.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sections = [_overview(results, split, title, settings, frozen), _classes(results)]
    sections.append(
        Section(
            "Confusion matrix",
            ["Rows are the true classes, columns the predicted ones; darker cells hold a larger fraction of the row."],
            pictures=[("confusion_matrix.png", "Confusion matrix")],
        )
    )
    if worst:
        words = [f"The {len(worst)} mistakes with the highest confidence: true class, predicted class, confidence."]
        sections.append(Section("Worst mistakes", words, pictures=[("mistakes.jpg", "Worst mistakes")]))
    sections += curves
    write_pages(sections, folder)
    return folder / "report.html"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _predictions(results: Results, names: list[str]) -> list[dict[str, Any]]:
    """One row per image."""
    columns = (results.labels, results.predictions, results.confidences, results.own)
    return [
        {
            "image": name,
            "class": results.classes[label],
            "predicted": results.classes[predicted],
            "confidence": f"{confidence:.6f}",
            "probability_of_class": f"{own:.6f}",
        }
        for name, label, predicted, confidence, own in zip(names, *(column.tolist() for column in columns))
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _overview(
    results: Results, split: str, title: str, settings: Mapping[str, Any], frozen: FrozenBackbone | None
) -> Section:
    """Metrics of the whole split, and of the frozen backbone."""
    found = results.summary()
    low, high = results.interval
    table = [["measure", f"{split}, %"], ["accuracy", f"{_share(found['accuracy'])} [{_share(low)}, {_share(high)}]"]]
    table.append(["balanced accuracy (mean recall of classes)", _share(found["balanced_accuracy"])])
    table += [[f"top-{k} accuracy", _share(found[f"top_{k}_accuracy"])] for k in (3, 5) if f"top_{k}_accuracy" in found]
    words = [f"{key}: {value}" for key, value in settings.items()]
    words.insert(0, f"{found['images']:,} images of {len(results.classes):,} classes; 95 % intervals in brackets.")
    if frozen is not None:
        words.append(f"Before training, {frozen}.")
    return Section(title, words, table)


def _classes(results: Results) -> Section:
    """Precision, recall and F1 of each class."""
    table = [["class", "images", "precision, %", "recall, %", "F1, %"]]
    for row in results.per_class():
        table.append([row["class"], f"{row['images']:,}", *(_share(row[key]) for key in ("precision", "recall", "f1"))])
    return Section("Classes", [], table)


def learning_curves(metrics: Path) -> list[Section]:
    """Accuracy and loss per epoch, from the CSV logger's table; empty if it has no epochs.

    The final evaluation of the best checkpoint appears in the table as one more epoch.
    """
    values: dict[str, dict[int, list[float]]] = {"train/loss": {}, "val/loss": {}, "val/accuracy": {}}
    trained = 0
    with metrics.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("train/images_per_second"):
                trained = 1 + int(float(row["epoch"]))
            for key, epochs in values.items():
                if row.get(key) and row.get("epoch"):
                    epochs.setdefault(int(float(row["epoch"])), []).append(float(row[key]))
    if not trained:
        return []
    points = {
        key: [CurvePoint(epoch, sum(found) / len(found)) for epoch, found in sorted(epochs.items()) if epoch < trained]
        for key, epochs in values.items()
    }
    labels = [str(epoch + 1) for epoch in range(trained)]
    accuracy = Curves("accuracy.svg", labels, {"validation": points["val/accuracy"]}, "accuracy, %")
    both = {"training": points["train/loss"], "validation": points["val/loss"]}
    loss = Curves("loss.svg", labels, both, "loss", percent=False)
    words = ["Per epoch. The training loss is on augmented images, with label smoothing and mixing if set."]
    return [Section("Learning curves", words, curves=accuracy), Section("Loss", curves=loss)]


def draw_confusion(path: Path, confusion: Tensor, classes: tuple[str, ...]) -> None:
    """Write a confusion matrix (K, K) as an image, cells shaded by their fraction of the row; few classes get labels.

    Raises:
        StorageError: The file could not be written.
    """
    count = len(classes)
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    if count > NUMBERED:
        side = max(2, 900 // count)
        grey = (255 * (1 - shares)).round().byte().numpy()
        picture = Image.fromarray(grey).resize((side * count, side * count), Image.Resampling.NEAREST)
    else:
        picture = Image.new("RGB", (_LABEL + _CELL * count, _LABEL + _CELL * count), "white")
        _fill_cells(picture, confusion, shares, classes)
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG")


def _fill_cells(picture: Image.Image, confusion: Tensor, shares: Tensor, classes: tuple[str, ...]) -> None:
    draw: Any = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for row, name in enumerate(classes):
        shown = shorten(name, 20)
        draw.text((_LABEL - 8, _LABEL + _CELL * (row + 0.5)), shown, fill="black", font=font, anchor="rm")
        heading = Image.new("RGB", (_LABEL, _CELL), "white")
        ImageDraw.Draw(heading).text((8, _CELL / 2), shown, fill="black", font=font, anchor="lm")
        picture.paste(heading.rotate(90, expand=True), (_LABEL + _CELL * row, 0))
        for column in range(len(classes)):
            left, top, dark = _LABEL + _CELL * column, _LABEL + _CELL * row, shares[row, column].item()
            colour = tuple(round(255 + dark * (end - 255)) for end in (20, 60, 120))
            draw.rectangle((left, top, left + _CELL - 2, top + _CELL - 2), fill=colour)
            middle = (left + _CELL / 2, top + _CELL / 2)
            text = f"{int(confusion[row, column])}"
            draw.text(middle, text, fill="white" if dark > 0.5 else "black", font=font, anchor="mm")


def draw_mistakes(path: Path, results: Results, rows: list[int], data: Any, split: str) -> None:
    """Write a contact sheet of images, each with its true class, predicted class and confidence.

    Raises:
        StorageError: The file could not be written.
    """
    columns, caption = min(6, len(rows)), 36
    width, height = _THUMB + 8, _THUMB + caption + 8
    sheet = Image.new("RGB", (columns * width, math.ceil(len(rows) / columns) * height), "white")
    draw: Any = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for number, row in enumerate(rows):
        left, top = number % columns * width + 4, number // columns * height + 4
        thumb = ImageOps.contain(data.picture(split, int(results.places[row])).convert("RGB"), (_THUMB, _THUMB))
        sheet.paste(thumb, (left + (_THUMB - thumb.width) // 2, top))
        label, taken = (results.classes[int(part[row])] for part in (results.labels, results.predictions))
        draw.text((left, top + _THUMB + 2), shorten(label, 24), fill="darkgreen", font=font)
        text = f"{shorten(taken, 18)} {100 * float(results.confidences[row]):.0f} %"
        draw.text((left, top + _THUMB + 18), text, fill="darkred", font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, "JPEG", quality=88)
