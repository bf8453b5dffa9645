"""Files of retrieval data sets, read as catalogues or triplets.

| layout | data sets | files below the root |
|---|---|---|
| table | your own | the root is a CSV file: id, split, role, and a column an attribute |
| asen | FashionAI, DARN, DeepFashion by ASEN (AAAI 2020) | meta.json, filenames_*, label_train, query_*, candidate_* |
| market1501 | Market-1501, and what names its files like it | bounding_box_train, query, bounding_box_test |
| cub | CUB-200-2011 | images.txt, image_class_labels.txt, classes.txt, images/ |
| zappos | UT-Zappos50K triplets of conditional similarity networks (CVPR 2017) | filenames.json, tripletlists/ |

No validation part is published of Market-1501 and CUB: every tenth training identity is held out for it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.data.catalogue import ROLES, Catalogue, ImageStore, Item
from visionattn.errors import ConfigError, DataError

__all__ = ["LAYOUTS", "Triplets", "read_catalogue", "read_triplets"]

PARTS = ("train", "val", "test")
COLUMNS = ("id", "image", "split", "role", "camera")  # of a table; all others are attributes
MARKET = {"bounding_box_train": ("train", ""), "query": ("test", "query"), "bounding_box_test": ("test", "gallery")}
# Identity and camera: 0002_c1s1_000451_03.jpg; identity -1 is of boxes that are not to be ranked, 0 of distractors.
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
        root: Folder of the data set, or the CSV file of a table.
        images: Folder or zip file of the images; None for `images` or `images.zip` beside a table, and for what the
            layout says otherwise.
        attributes: Which attributes, in which order; None takes all.
        min_count: Values with fewer training items count as unknown.

    Raises:
        ConfigError: There is no such layout or attribute.
        DataError: A file is missing or damaged, images are missing, or ids occur twice.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"There is no layout {layout!r}. Choose from {', '.join(LAYOUTS)}.")
    root = Path(root)
    if not root.exists():
        raise DataError(f"There is no file or folder {root}.")
    store, names, items = LAYOUTS[layout](root, None if images is None else Path(images))
    catalogue = Catalogue(store, names, items, min_count if attributes is None else 0)
    if attributes is None:
        return catalogue
    chosen = catalogue.select(attributes)
    return Catalogue(chosen.images, chosen.attributes, chosen.items, min_count)


def _lines(path: Path) -> list[list[str]]:
    """The words of each line that has any."""
    try:
        return [line.split() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Could not read {path}: {error}.") from error


def _table(root: Path, images: Path | None) -> tuple[ImageStore, tuple[str, ...], list[Item]]:
    try:
        with root.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Could not read the table {root}: {error}.") from error
    if missing := [column for column in ("id", "split") if column not in columns]:
        raise DataError(f"The table {root} has no column {', '.join(missing)}; it has {', '.join(columns)}.")
    attributes = tuple(column for column in columns if column not in COLUMNS)
    if not attributes or not rows:
        raise DataError(f"The table {root} has no {'rows' if attributes else 'columns of attributes'}.")
    seen: set[str] = set()
    if double := [row["id"] for row in rows if row["id"] in seen or seen.add(row["id"])]:  # type: ignore[func-returns-value]
        raise DataError(f"The table {root} has ids twice: {', '.join(dict.fromkeys(double[:3]))}.")
    beside = [root.parent / "images", root.parent / "images.zip"]
    store = ImageStore(images or next((path for path in beside if path.exists()), beside[0]))
    by_stem = {PurePosixPath(name).stem: name for name in store.names}
    items = []
    for number, row in enumerate(rows, 2):
        role = row.get("role") or "both"
        if row["split"] not in PARTS:
            raise DataError(f"{root}, line {number}: the split is {row['split']!r}; it is one of {', '.join(PARTS)}.")
        if row["split"] == "train":
            role = ""
        elif role not in ROLES:
            raise DataError(f"{root}, line {number}: the role is {role!r}; it is one of {', '.join(ROLES)}.")
        image = row.get("image") or by_stem.get(row["id"], row["id"])
        values = tuple(row[attribute] or None for attribute in attributes)
        items.append(Item(image, row["split"], role, values, row.get("camera") or None))
    return store, attributes, items


def _asen(root: Path, images: Path | None) -> tuple[ImageStore, tuple[str, ...], list[Item]]:
    try:
        meta: dict[str, Any] = json.loads((root / "meta.json").read_text())
        names = tuple(meta["ATTRIBUTES"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"Could not read {root / 'meta.json'} with its list ATTRIBUTES: {error!r}.") from error
    words = meta.get("ATTRIBUTES_VALUES", {})
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
            try:
                image, attribute, value = (int(word) for word in line)
                file, column = files[part][image], names[attribute]
            except (ValueError, IndexError) as error:
                raise DataError(
                    f"{root / name} has a line {' '.join(line)!r} that is not three known numbers."
                ) from error
            # An image has a line for each attribute that is known of it.
            values = found.setdefault((file, part, role), [None] * len(names))
            values[attribute] = words[column][value] if column in words else str(value)
    items = [Item(file, part, role, tuple(values)) for (file, part, role), values in found.items()]
    return ImageStore(images or root), names, items


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
        raise DataError(f"{root} has no {', '.join(MARKET)} with images named like 0002_c1s1_000451_03.jpg.")
    return store, ("identity",), _hold_out(items)


def _cub(root: Path, images: Path | None) -> tuple[ImageStore, tuple[str, ...], list[Item]]:
    files = dict(_pairs(root / "images.txt"))
    classes = dict(_pairs(root / "classes.txt"))
    labels = dict(_pairs(root / "image_class_labels.txt"))
    # Retrieval is measured on classes that were not trained on: the first half trains.
    trained = {number for number in classes if 2 * int(number) <= len(classes)}
    items = []
    for number, file in files.items():
        label = labels.get(number, "")
        if label not in classes:
            raise DataError(f"{root}: the image {file} is of no class that classes.txt knows.")
        part, role = ("train", "") if label in trained else ("test", "both")
        items.append(Item(file, part, role, (classes[label],)))
    return ImageStore(images or root / "images"), ("class",), _hold_out(items)


def _pairs(path: Path) -> Iterable[tuple[str, str]]:
    for line in _lines(path):
        if len(line) != 2:
            raise DataError(f"{path} has a line {' '.join(line)!r}; a number and a name are expected.")
        yield line[0], line[1]


def _hold_out(items: list[Item]) -> list[Item]:
    """Every tenth identity that is trained on becomes the validation part."""
    identities = sorted({item.values[0] or "" for item in items if item.part == "train"})
    held_out = set(identities[9::10])
    return [
        item._replace(part="val", role="both") if item.part == "train" and item.values[0] in held_out else item
        for item in items
    ]


class Triplets(NamedTuple):
    """Judgements that of two images one is nearer to a third, under a condition.

    Attributes:
        images: Where the images are.
        names: Name of each image that occurs.
        conditions: Name of each condition.
        anchors, far, near: int64 (T,), numbers in `names`.
        condition: int64 (T,), numbers in `conditions`.
    """

    images: ImageStore
    names: list[str]
    conditions: tuple[str, ...]
    anchors: Tensor
    far: Tensor
    near: Tensor
    condition: Tensor

    def take(self, places: Tensor) -> Triplets:
        """The images at some places (M,) of `names`, in that order, and the triplets whose three are among them."""
        numbers = torch.full((len(self.names),), -1)
        numbers[places] = torch.arange(len(places))
        rows = numbers[torch.stack([self.anchors, self.far, self.near])]
        kept = (rows >= 0).all(dim=0)
        anchors, far, near = rows[:, kept]
        names = [self.names[place] for place in places.tolist()]
        return Triplets(self.images, names, self.conditions, anchors, far, near, self.condition[kept])


def read_triplets(root: str | Path, part: str, images: str | Path | None = None) -> Triplets:
    """Read the Zappos triplets of a part.

    Args:
        root: Folder with filenames.json (a JSON list, or a name a line) and, in tripletlists/, the files
            CONDITION_tripletlist_PART.txt, whose lines are the numbers of anchor, far and near image.
        part: train, val or test.
        images: Folder or zip file of the images; None for ut-zap50k-images in the root, or else the root.

    Raises:
        ConfigError: There is no such part.
        DataError: A file is missing or damaged, or images are missing.
    """
    if part not in PARTS:
        raise ConfigError(f"There is no part {part!r}. Choose from {', '.join(PARTS)}.")
    root = Path(root)
    published = root / "ut-zap50k-images"
    store = ImageStore(images or (published if published.is_dir() else root))
    try:
        text = (root / "filenames.json").read_text()
        every = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:  # a ValueError is of text or JSON that cannot be decoded
        raise DataError(f"Could not read {root / 'filenames.json'}, a JSON list or a name a line: {error}.") from error
    rows = []
    for condition, name in enumerate(ZAPPOS):
        path = root / "tripletlists" / f"{name}_tripletlist_{part}.txt"
        for line in _lines(path):
            if len(line) != 3 or not all(word.isdecimal() and int(word) < len(every) for word in line):
                raise DataError(
                    f"{path} has a line {' '.join(line)!r} that is not three numbers of images: anchor, far and near, "
                    f"each below {len(every)}, the number of names in filenames.json."
                )
            rows.append((*map(int, line), condition))
    if not rows:
        raise DataError(f"There are no triplets of the part {part!r} in {root / 'tripletlists'}.")
    table = torch.tensor(rows)
    used, places = table[:, :3].unique(return_inverse=True)
    names = [every[number] for number in used.tolist()]
    if missing := sorted(set(names) - set(store.names)):
        raise DataError(f"{store.path} lacks {len(missing)} images, {missing[0]} among them.")
    anchors, far, near = places.unbind(1)
    return Triplets(store, names, ZAPPOS, anchors, far, near, table[:, 3])


LAYOUTS: dict[str, Callable[[Path, Path | None], tuple[ImageStore, tuple[str, ...], list[Item]]]] = {
    "table": _table,
    "asen": _asen,
    "market1501": _market,
    "cub": _cub,
}
