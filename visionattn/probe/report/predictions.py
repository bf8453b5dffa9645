"""`predictions.csv`: what the best heads say of each test image, so that reports can be compared pair by pair."""

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
    """What is said of the test images.

    Attributes:
        images: Their names.
        correct: Of each head or k-NN whether it is right, bool (n,).
    """

    images: list[str]
    correct: dict[str, np.ndarray]


def write_predictions(report: Report, file: Path) -> None:
    """Write a row a test image: its name, its class, and the class that each of `Report.answers` gives it.

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
    """Read what `write_predictions` wrote.

    Raises:
        DataError: The file is missing, damaged or something else.
    """
    try:
        if not file.is_file():
            raise ValueError("there is no such file")
        with file.open(newline="", encoding="utf-8") as table:
            header, *rows = csv.reader(table, strict=True)
        if header[:2] != _FIRST or len(set(header)) != len(header) or not rows:
            raise ValueError("it is not a table of predictions")
        if any(len(row) != len(header) for row in rows):
            raise ValueError("a row is not as long as the first")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"Could not read {shorten(file)}: {shorten(error)}.") from error
    columns = [np.array(column) for column in zip(*rows)]
    return Predictions(
        [row[0] for row in rows], {name: column == columns[1] for name, column in zip(header[2:], columns[2:])}
    )
