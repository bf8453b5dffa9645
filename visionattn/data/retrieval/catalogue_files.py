"""Dataset files of retrieval, read as catalogues or triplets.

| layout | datasets | files below the root |
|---|---|---|
| table | your own | the root is a CSV file: id, split, role, and one column per attribute |
| asen | FashionAI, DARN, DeepFashion by ASEN (AAAI 2020) | meta.json, filenames_*, label_train, query_*, candidate_* |
| market1501 | Market-1501, and datasets with its file names | bounding_box_train, query, bounding_box_test |
| cub | CUB-200-2011 | images.txt, image_class_labels.txt, classes.txt, images/ |
| zappos | UT-Zappos50K triplets of conditional similarity networks (CVPR 2017) | filenames.json, tripletlists/ |

Market-1501 and CUB have no official validation split: every tenth training identity is held out for it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.data.retrieval.catalogue import ROLES, Catalogue, ImageStore, Item, first_names
from visionattn.errors import ConfigError, DataError, shorten
from visionattn.files import read_json, read_text

__all__ = ["LAYOUTS", "Triplets", "read_catalogue", "read_triplets"]

PARTS = ("train", "val", "test")
COLUMNS = ("id", "image", "split", "role", "camera")  # reserved columns of a table; all others are attributes
LONGEST_LINE = 2**20  # characters
MARKET = {"bounding_box_train": ("train", ""), "query": ("test", "query"), "bounding_box_test": ("test", "gallery")}
# Identity and camera: 0002_c1s1_000451_03.jpg; identity -1 marks boxes that are not ranked, 0 distractors.
MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)")
ZAPPOS = ("class", "closure", "gender", "heel")


def read_catalogue(
    layout: str,
    root: str | Path,
    images: str | Path | None = None,
    attributes: Sequence[str] | None = None,
    min_count: int = 0,
) -> Catalogue:
    """Read a data set.

    Args:
        layout: One of `LAYOUTS`.
        root: Folder of the dataset, or the CSV file of a table.
        images: Folder or zip file of the images; None uses `images` or `images.zip` next to a table, and the default
            of the layout otherwise.
        attributes: Attributes to use, in this order; None uses all.
        min_count: Values with fewer training items count as unknown.

    Raises:
        ConfigError: The layout or an attribute is unknown.
        DataError: A file is missing or damaged, images are missing, or ids are not unique.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}; got {shorten(layout)!r}.")
    if min_count < 0:
        raise ConfigError(f"min_count must be at least 0; got {min_count}.")
    if not os.path.exists(root):
        raise DataError(f"There is no file or folder {shorten(root)}.")
    root = Path(root)
    store, names, items = LAYOUTS[layout](root, None if images is None else Path(images))
    catalogue = Catalogue(store, names, items, min_count if attributes is None else 0)
    if attributes is None:
        return catalogue
    chosen = catalogue.select(attributes)
    return Catalogue(chosen.images, chosen.attributes, chosen.items, min_count)


def _lines(path: Path) -> list[list[str]]:
    """The words of each non-empty line."""
    return [line.split() for line in read_text(path).splitlines() if line.strip()]


def _rows(root: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of each row of a CSV file, after checks of its shape."""
    text = read_text(root)
    # Parsing a line of separators alone would take fifty times its size in memory.
    if max(map(len, io.StringIO(text, newline="")), default=0) > LONGEST_LINE:
        raise DataError(
            f"Could not read the table {shorten(root)}: it has a line of more than {LONGEST_LINE:,} characters."
        )
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [column.strip() for column in next(reader, [])]
        _check_columns(root, columns)
        for row in reader:
            if row and len(row) != len(columns):
                raise DataError(
                    f"The table {shorten(root)}, line {reader.line_num} has {len(row)} cells, but the header has "
                    f"{len(columns)}. Put cells that contain a comma in double quotes."
                )
            if row:
                yield reader.line_num, dict(zip(columns, map(str.strip, row)))
    except csv.Error as error:
        raise DataError(f"Could not read the table {shorten(root)}, line {reader.line_num}: {error}.") from error


def _check_columns(root: Path, columns: list[str]) -> None:
    if missing := [column for column in ("id", "split") if column not in columns]:
        other = next((mark for mark in (";", "\t", "|") if len(columns) == 1 and mark in columns[0]), None)
        hint = f" Its cells are separated by {other!r}; a comma is expected." if other else ""
        raise DataError(
            f"The table {shorten(root)} has no column {', '.join(missing)}; it has {shorten(', '.join(columns))}.{hint}"
        )
    if "" in columns:
        raise DataError(
            f"The table {shorten(root)} must name all columns; the name is missing for column {columns.index('') + 1}."
        )
    if double := [column for column in columns if columns.count(column) > 1]:
        raise DataError(f"The table {shorten(root)} has the column {shorten(double[0])!r} twice.")


def _table(root: Path, images: Path | None) -> tuple[ImageStore, tuple[str, ...], list[Item]]:
    rows = list(_rows(root))
    attributes = tuple(column for column in rows[0][1] if column not in COLUMNS) if rows else ()
    if not attributes:
        raise DataError(f"The table {shorten(root)} has no {'columns of attributes' if rows else 'rows'}.")
    beside = [root.parent / "images", root.parent / "images.zip"]
    store = ImageStore(images or next((path for path in beside if path.exists()), beside[0]))
    by_stem: dict[str, list[str]] = {}
    for name in store.names:
        by_stem.setdefault(PurePosixPath(name).stem, []).append(name)
    items, seen = [], set()
    for number, row in rows:
        where = f"{shorten(root)}, line {number}"
        role = row.get("role") or "both"
        if not row["id"]:
            raise DataError(f"{where}: the id is empty.")
        if row["id"] in seen:
            raise DataError(f"The table {shorten(root)} has the id {shorten(row['id'])} more than once.")
        seen.add(row["id"])
        if row["split"] not in PARTS:
            raise DataError(
                f"{where}: the split must be one of {', '.join(map(repr, PARTS))}; got {shorten(row['split'])!r}."
            )
        if row["split"] == "train":
            role = ""
        elif role not in ROLES:
            raise DataError(f"{where}: the role must be one of {', '.join(map(repr, ROLES))}; got {shorten(role)!r}.")
        image = row.get("image")
        if not image:
            named = by_stem.get(row["id"], [row["id"]])
            if len(named) > 1:
                raise DataError(
                    f"{where}: {first_names(named)} all match {shorten(row['id'])}. Add a column 'image' with the file."
                )
            image = named[0]
        values = tuple(row[attribute] or None for attribute in attributes)
        items.append(Item(image, row["split"], role, values, row.get("camera") or None))
    return store, attributes, items


def _asen(root: Path, images: Path | None) -> tuple[ImageStore, tuple[str, ...], list[Item]]:
    meta = read_json(root / "meta.json", {"ATTRIBUTES": [str]})
    names = tuple(meta["ATTRIBUTES"])
    words = meta.get("ATTRIBUTES_VALUES", {})
    if not isinstance(words, dict) or not all(isinstance(values, list) for values in words.values()):
        raise DataError(
            f"{shorten(root / 'meta.json')} is damaged: ATTRIBUTES_VALUES must give a list for each attribute."
        )
    lists = {
        ("train", ""): "label_train.txt",
        ("val", "query"): "query_valid.txt",
        ("val", "gallery"): "candidate_valid.txt",
        ("test", "query"): "query_test.txt",
        ("test", "gallery"): "candidate_test.txt",
    }
    files = {
        part: [" ".join(line) for line in _lines(root / f"filenames_{'valid' if part == 'val' else part}.txt")]
        for part in PARTS
    }
    found: dict[tuple[str, str, str], list[str | None]] = {}
    for (part, role), name in lists.items():
        for line in _lines(root / name):
            image, attribute, value = (_number(word) for word in line) if len(line) == 3 else (-1, -1, -1)
            known = 0 <= image < len(files[part]) and 0 <= attribute < len(names) and value >= 0
            named = words.get(names[attribute]) if known else None
            if not known or (named is not None and value >= len(named)):
                raise DataError(
                    f"{shorten(root / name)} has the invalid line {shorten(' '.join(line))!r}: it must hold three "
                    "known numbers: image, attribute and value."
                )
            # An image has one line for each of its known attributes.
            values = found.setdefault((files[part][image], part, role), [None] * len(names))
            values[attribute] = str(value if named is None else named[value])
    items = [Item(file, part, role, tuple(values)) for (file, part, role), values in found.items()]
    return ImageStore(images or root), names, items


def _number(word: str) -> int:
    """A decimal number of up to 18 digits, or -1 if it is not one."""
    return int(word) if word.isdecimal() and len(word) <= 18 else -1


def _market(root: Path, images: Path | None) -> tuple[ImageStore, tuple[str, ...], list[Item]]:
    store = ImageStore(images or root)
    items = []
    for name in store.names:
        folder, file = PurePosixPath(name).parent.name, PurePosixPath(name).name
        match = MARKET_NAME.match(file)
        if folder not in MARKET or match is None or match[1] == "-1":
            continue
        items.append(Item(name, *MARKET[folder], (match[1],), match[2]))
    if not items:
        raise DataError(f"{shorten(root)} has no {', '.join(MARKET)} with images named like 0002_c1s1_000451_03.jpg.")
    return store, ("identity",), _hold_out(items)


def _cub(root: Path, images: Path | None) -> tuple[ImageStore, tuple[str, ...], list[Item]]:
    files, classes, labels = (_pairs(root / f"{name}.txt") for name in ("images", "classes", "image_class_labels"))
    # Retrieval is evaluated on unseen classes: the first half is for training.
    trained = {number for number in classes if 2 * int(number) <= len(classes)}
    items = []
    for number, file in files.items():
        label = labels.get(number, "")
        if label not in classes:
            raise DataError(f"{shorten(root)}: the image {shorten(file)} has no class in classes.txt.")
        part, role = ("train", "") if label in trained else ("test", "both")
        items.append(Item(file, part, role, (classes[label],)))
    return ImageStore(images or root / "images"), ("class",), _hold_out(items)


def _pairs(path: Path) -> dict[str, str]:
    """Number -> name of each line."""
    found: dict[str, str] = {}
    for line in _lines(path):
        if len(line) != 2 or _number(line[0]) < 0 or line[0] in found:
            raise DataError(
                f"{shorten(path)} has the invalid line {shorten(' '.join(line))!r}: it must hold a "
                "unique number and a name."
            )
        found[line[0]] = line[1]
    return found


def _hold_out(items: list[Item]) -> list[Item]:
    """Move every tenth training identity to the validation split."""
    identities = sorted({item.values[0] or "" for item in items if item.part == "train"})
    held_out = set(identities[9::10])
    return [
        item._replace(part="val", role="both") if item.part == "train" and item.values[0] in held_out else item
        for item in items
    ]


class Triplets(NamedTuple):
    """Judgements which of two images is closer to a third, under a condition.

    Attributes:
        images: Location of the images.
        names: Name of each image that occurs.
        conditions: Name of each condition.
        anchors, far, near: int64 (T,), indices into `names`.
        condition: int64 (T,), indices into `conditions`.
    """

    images: ImageStore
    names: list[str]
    conditions: tuple[str, ...]
    anchors: Tensor
    far: Tensor
    near: Tensor
    condition: Tensor

    def take(self, places: Tensor) -> Triplets:
        """The images at some positions (M,) of `names`, in that order, and the triplets of these images only."""
        numbers = torch.full((len(self.names),), -1)
        numbers[places] = torch.arange(len(places))
        rows = numbers[torch.stack([self.anchors, self.far, self.near])]
        kept = (rows >= 0).all(dim=0)
        anchors, far, near = rows[:, kept]
        names = [self.names[place] for place in places.tolist()]
        return Triplets(self.images, names, self.conditions, anchors, far, near, self.condition[kept])


def read_triplets(root: str | Path, part: str, images: str | Path | None = None) -> Triplets:
    """Read the Zappos triplets of a split.

    Args:
        root: Folder with filenames.json (a JSON list, or one name per line) and, in tripletlists/, the files
            CONDITION_tripletlist_PART.txt, whose lines hold the indices of anchor, far and near image.
        part: train, val or test.
        images: Folder or zip file of the images; None for ut-zap50k-images in the root, or else the root.

    Raises:
        ConfigError: The split is unknown.
        DataError: A file is missing or damaged, or images are missing.
    """
    if part not in PARTS:
        raise ConfigError(f"part must be one of {', '.join(map(repr, PARTS))}; got {shorten(part)!r}.")
    root = Path(root)
    published = root / "ut-zap50k-images"
    store = ImageStore(images or (published if os.path.isdir(published) else root))
    every = _names(root / "filenames.json")
    rows = []
    for condition, name in enumerate(ZAPPOS):
        path = root / "tripletlists" / f"{name}_tripletlist_{part}.txt"
        for line in _lines(path):
            if len(line) != 3 or not all(0 <= _number(word) < len(every) for word in line):
                raise DataError(
                    f"{shorten(path)} has the invalid line {shorten(' '.join(line))!r}: it must hold the indices of "
                    f"anchor, far and near image, each below {len(every)}, the number of names in filenames.json."
                )
            rows.append((*map(int, line), condition))
    if not rows:
        raise DataError(f"No triplets of the split {part!r} were found in {shorten(root / 'tripletlists')}.")
    table = torch.tensor(rows)
    used, places = table[:, :3].unique(return_inverse=True)
    names = [every[number] for number in used.tolist()]
    if missing := sorted(set(names) - set(store.names)):
        raise DataError(f"{shorten(store.path)} has no images for {len(missing)} names, such as {shorten(missing[0])}.")
    anchors, far, near = places.unbind(1)
    return Triplets(store, names, ZAPPOS, anchors, far, near, table[:, 3])


def _names(path: Path) -> list[str]:
    """The image names that a file lists."""
    try:
        text = read_text(path)
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (DataError, ValueError, RecursionError) as error:
        raise DataError(
            f"Could not read {shorten(path)} as a JSON list or one name per line: {shorten(error)}"
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{shorten(path)} must be a JSON list of names or one name per line; some are not names.")
    return names


LAYOUTS: dict[str, Callable[[Path, Path | None], tuple[ImageStore, tuple[str, ...], list[Item]]]] = {
    "table": _table,
    "asen": _asen,
    "market1501": _market,
    "cub": _cub,
}
