"""Label files for the images of a folder: several classes per image, or numbers.

    labels.csv      file,split,cat,dog            a column for each class, 0 or 1, or for each number
                    a.jpg,train,1,0
    labels.csv      file,labels                   names of classes, separated by semicolons
                    a.jpg,cat;dog
    labels.json     {"a.jpg": ["cat", "dog"]}     or {"a.jpg": {"cat": 1, "dog": 0}}
                    {"a.jpg": 3.5}                or {"a.jpg": {"age": 3.5, "weight": 20}}

File names are relative to the label file. A column `split` holds train, val or test; without it the first folder of a
path with such a name decides, and without these a fifth of the images is the test split. With a test split, val is used
for training.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visionattn.errors import DataError, shorten
from visionattn.files import read_text

__all__ = ["LabelledFiles", "read_labels"]

TEST_SHARE = 0.2
_FILE = ("file", "image", "filename", "path")
_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NAMES = ("labels.csv", "labels.json")
_SINGLE = "target"  # name of a single unnamed number


class LabelledFiles(NamedTuple):
    """Images with numbers.

    Attributes:
        root: Folder of the files.
        names: Names of the classes or numbers.
        files: Training and test files, relative to the root.
        values: Training and test values, float64 (n, K).
        told: How the images were divided.
    """

    root: Path
    names: tuple[str, ...]
    files: tuple[list[str], list[str]]
    values: tuple[np.ndarray, np.ndarray]
    told: str


class _Row(NamedTuple):
    file: str
    split: str
    values: Mapping[str, Any]  # by name


def read_labels(source: str | Path, multilabel: bool) -> LabelledFiles:
    """Read the labels of images.

    Args:
        source: A file (see the module), or a folder with `labels.csv` or `labels.json`.
        multilabel: Values are 0 or 1, and class names are accepted; otherwise any finite numbers.

    Raises:
        DataError: The file cannot be read, a value has another type, an image is missing or listed twice, or a split
            has no images.
    """
    path = _find(Path(source))
    text = read_text(path)
    rows = _read_json(text, path, multilabel) if path.suffix.lower() == ".json" else _read_csv(text, path, multilabel)
    if not rows:
        raise DataError(f"{shorten(path)} lists no images.")
    names = tuple(dict.fromkeys(name for row in rows for name in row.values))
    if any(isinstance(row.values, _Present) for row in rows):
        names = tuple(sorted(names))
    if not names or (multilabel and len(names) < 2):
        raise DataError(f"{shorten(path)} must have at least {'two classes' if multilabel else 'one number'}.")
    _check_files(rows, path)
    values = np.array([[_number(row, name, path, multilabel) for name in names] for row in rows])
    train, test, told = _divide(rows, path)
    return LabelledFiles(
        path.parent,
        names,
        ([rows[place].file for place in train], [rows[place].file for place in test]),
        (values[train], values[test]),
        told,
    )


class _Present(dict):
    """Classes of an image; all others are 0."""


def _find(source: Path) -> Path:
    if source.is_dir():
        found = [source / name for name in _NAMES if (source / name).is_file()]
        if len(found) != 1:
            wrong = "has both" if found else "has neither"
            raise DataError(f"{shorten(source)} must hold labels.csv or labels.json; it {wrong}.")
        return found[0]
    if source.suffix.lower() not in (".csv", ".json"):
        raise DataError(f"Labels must be a .csv or .json file, or a folder with one; got {shorten(source)}.")
    return source


def _read_csv(text: str, path: Path, multilabel: bool) -> list[_Row]:
    try:
        header, *lines = [line for line in csv.reader(io.StringIO(text), strict=True) if line]
    except ValueError as error:
        raise DataError(f"{shorten(path)} is empty.") from error
    except csv.Error as error:
        raise DataError(f"{shorten(path)} is not a valid CSV file: {error}.") from error
    header = [name.strip() for name in header]
    if header[0].lower() not in _FILE or len(set(header)) < len(header) or "" in header:
        raise DataError(
            f"The first line of {shorten(path)} must be 'file' and then unique column names; got "
            f"{shorten(','.join(header))}."
        )
    rows = []
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise DataError(f"{shorten(path)}: line {number} must have {len(header)} values; it has {len(line)}.")
        cells: dict[str, Any] = dict(zip(header, (cell.strip() for cell in line)))
        file, split = cells.pop(header[0]), cells.pop("split", "")
        if multilabel and list(cells) == ["labels"]:
            cells = _Present({name.strip(): 1 for name in cells["labels"].split(";") if name.strip()})
        rows.append(_Row(file, split, cells))
    return rows


def _read_json(text: str, path: Path, multilabel: bool) -> list[_Row]:
    wanted = "lists of names, or objects of 0 and 1" if multilabel else "numbers, or objects of numbers"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shorten(path)} is not a valid JSON file: {shorten(error)}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{shorten(path)} must be an object of files and {wanted}; it is a {type(content).__name__}.")
    rows = []
    for file, value in content.items():
        if isinstance(value, dict):
            values: Mapping[str, Any] = value
        elif multilabel and isinstance(value, list) and all(isinstance(name, str) for name in value):
            values = _Present(dict.fromkeys(value, 1))
        elif not multilabel and isinstance(value, (int, float)):
            values = {_SINGLE: value}
        else:
            raise DataError(f"{shorten(path)} must hold {wanted}; {shorten(file, 60)} has {shorten(value, 60)}.")
        rows.append(_Row(file, "", values))
    return rows


def _number(row: _Row, name: str, path: Path, multilabel: bool) -> float:
    value = row.values.get(name, 0 if isinstance(row.values, _Present) else None)
    try:
        number = math.nan if value is None or isinstance(value, (list, dict)) else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (multilabel and number not in (0, 1)):
        wanted = "0 or 1" if multilabel else "a finite number"
        raise DataError(
            f"{shorten(path)}: {shorten(name, 60)} of {shorten(row.file, 60)} must be {wanted}; got "
            f"{'nothing' if value in (None, '') else shorten(value, 60)}."
        )
    return number


def _check_files(rows: list[_Row], path: Path) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.file in seen:
            raise DataError(f"{shorten(path)} lists {shorten(row.file, 60)} more than once.")
        seen.add(row.file)
    try:
        missing = [row.file for row in rows if not (path.parent / row.file).is_file()]
    except (OSError, ValueError) as error:
        raise DataError(f"{shorten(path)} lists an invalid file name: {shorten(error)}.") from error
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        names = ", ".join(shorten(name, 60) for name in missing[:3])
        raise DataError(f"{shorten(path)} lists images that do not exist: {names}{more}.")


def _divide(rows: list[_Row], path: Path) -> tuple[list[int], list[int], str]:
    """Training and test rows, and how they were divided."""
    given = [row.split or _folder(row.file) for row in rows]
    if any(given):
        parts = [_PARTS.get(part.lower()) for part in given]
        if None in parts:
            row = rows[parts.index(None)]
            said = f"'{shorten(row.split, 40)}'" if row.split else "none"
            raise DataError(
                f"{shorten(path)}: the split of {shorten(row.file, 60)} must be train, val or test; got {said}."
            )
        tests = "test" if "test" in parts else "val"
        test = [place for place, part in enumerate(parts) if part == tests]
        train = [place for place, part in enumerate(parts) if part != tests]
        told = f"test images: {tests}"
    else:
        order = np.random.default_rng(0).permutation(len(rows))
        count = max(1, round(TEST_SHARE * len(rows)))
        test, train = sorted(order[:count].tolist()), sorted(order[count:].tolist())
        told = f"test images: {count} of {len(rows)}, drawn with a fixed seed"
    for name, part in (("training", train), ("test", test)):
        if not part:
            raise DataError(f"{shorten(path)} has no {name} images.")
    return train, test, told


def _folder(file: str) -> str:
    """The split in the first folder of a path, or an empty string."""
    first = Path(file).parts[0] if len(Path(file).parts) > 1 else ""
    return first if first.lower() in _PARTS else ""
