"""`predictions.csv`: predictions of the best heads for each test image, for paired comparisons of reports."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from visionattn.errors import DataError, shorten
from visionattn.files import atomic_path
from visionattn.probe.report.report import Report

__all__ = ["PREDICTIONS", "Predictions", "read_predictions", "write_predictions"]

PREDICTIONS = "predictions.csv"
_FIRST = ["image", "label"]


class Predictions(NamedTuple):
    """Which predictions for the test images are correct.

    Attributes:
        images: Names of the test images.
        correct: For each head or k-NN, whether its prediction is correct, bool (n,).
    """

    images: list[str]
    correct: dict[str, np.ndarray]


def write_predictions(report: Report, file: Path) -> None:
    """Write one row per test image: its name, its class, and the class predicted by each of `Report.answers`.

    Raises:
        StorageError: The file could not be written.
    """
    assert report.test_labels is not None
    answers = report.answers()
    columns = [report.test_labels, *(one.predictions for one in answers)]
    with atomic_path(file) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as table:
        writer = csv.writer(table)
        writer.writerow([*_FIRST, *(one.name for one in answers)])
        for name, *classes in zip(report.test_names, *(column.tolist() for column in columns), strict=True):
            writer.writerow([name, *(report.classes[number] for number in classes)])


def read_predictions(file: Path) -> Predictions:
    """Read a file of `write_predictions`.

    Raises:
        DataError: The file is missing or damaged, or is another file.
    """
    try:
        if not file.is_file():
            raise ValueError("the file does not exist")
        with file.open(newline="", encoding="utf-8") as table:
            header, *rows = csv.reader(table, strict=True)
        if header[:2] != _FIRST or len(set(header)) != len(header) or not rows:
            raise ValueError("it is not a table of predictions")
        if any(len(row) != len(header) for row in rows):
            raise ValueError("a row has another number of columns than the header")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"Could not read {shorten(file)}: {shorten(error)}.") from error
    columns = [np.array(column) for column in zip(*rows)]
    return Predictions(
        [row[0] for row in rows], {name: column == columns[1] for name, column in zip(header[2:], columns[2:])}
    )
