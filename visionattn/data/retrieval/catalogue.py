"""Images with attribute values, such as colour and kind, for training and evaluating retrieval.

A catalogue holds items. Each has an image, a split ("train", "val", "test"), a value or none for each attribute, and,
except in training, a role: query, gallery, or both. Re-identification has one attribute, the identity,
and a source for each item, its camera: items of the query's identity and source are not ranked. An item that is both
query and gallery has its own source, since it is never ranked against itself.

Dataset files are read by `visionattn.data.retrieval.catalogue_files`.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from visionattn.data.images import SUFFIXES, eight_bits, is_hidden, list_images, open_image
from visionattn.errors import ConfigError, DataError, shorten

__all__ = ["MISSING", "Catalogue", "ImageStore", "Item", "Part"]

# Label of an item with an unknown value of an attribute.
MISSING = -1
ROLES = ("query", "gallery", "both")
MEMBER = 2**28  # largest image in an archive, in bytes


class ImageStore:
    """The images of a folder, with its sub-folders, or of a zip file, without hidden ones.

    Args:
        path: Folder or zip file.

    Raises:
        DataError: The folder or zip file does not exist or holds no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._archives: dict[int, zipfile.ZipFile] = {}
        self._is_folder = os.path.isdir(path)
        if self._is_folder:
            found = list_images(self.path, recursive=True).files
            self.names = sorted(file.relative_to(self.path).as_posix() for file in found)
        else:
            self.names = sorted(filter(_is_image, self._archive().namelist()))
        if not self.names:
            raise DataError(f"There are no images in {shorten(path)}: none ends in {', '.join(SUFFIXES)}.")

    def _archive(self) -> zipfile.ZipFile:
        # Processes that share a handle would move each other's file position.
        if os.getpid() not in self._archives:
            try:
                if not stat.S_ISREG(os.stat(self.path).st_mode):  # opening a pipe would block
                    raise zipfile.BadZipFile("it is not a regular file")
                self._archives[os.getpid()] = zipfile.ZipFile(self.path)
            except Exception as error:
                # zipfile raises almost any exception for damaged archives: BadZipFile, ValueError, NotImplementedError.
                reason = shorten(getattr(error, "strerror", None) or error)
                raise DataError(
                    f"{shorten(self.path)} is neither a folder nor a zip file of images: {reason}."
                ) from error
        return self._archives[os.getpid()]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archives": {}}

    def open(self, name: str) -> Image.Image:
        """Read an image as 8-bit RGB.

        Raises:
            DataError: It does not exist, is damaged or too large.
        """
        if self._is_folder:
            path: str | Path = self.path / name
            image = open_image(path)
        else:
            path = f"{name} of {self.path}"
            image = open_image(path, stream=io.BytesIO(self._member(name)))
        return eight_bits(image, path).convert("RGB")

    def _member(self, name: str) -> bytes:
        try:
            # A member of a few bytes can unpack to any size and declare another one.
            with self._archive().open(name) as file:
                content = file.read(MEMBER + 1)
        except DataError:
            raise
        except Exception as error:
            # As above, and zlib.error, RuntimeError for passwords, KeyError for a missing name.
            raise DataError(
                f"Could not read the image {shorten(name)} of {shorten(self.path)}: {shorten(error)}."
            ) from error
        if len(content) > MEMBER:
            raise DataError(
                f"Could not read the image {shorten(name)} of {shorten(self.path)}: it exceeds the limit of {MEMBER:,} "
                "bytes."
            )
        return content


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        not name.endswith("/")
        and path.suffix.lower() in SUFFIXES
        and not any(is_hidden(Path(part)) for part in path.parts)
    )


class Item(NamedTuple):
    """An image, its split and role ("" in training), its value of each attribute, and its source (a camera)."""

    image: str
    part: str
    role: str
    values: tuple[str | None, ...]
    source: str | None = None


class Part(NamedTuple):
    """The items of one split as tensors.

    Attributes:
        images: Name of each image.
        labels: int64 (N, C), index of each value, `MISSING` where there is none.
        is_query: bool (N,).
        is_gallery: bool (N,).
        sources: int64 (N,), items of the same label and source are not ranked against each other; None for no sources.
    """

    images: list[str]
    labels: Tensor
    is_query: Tensor
    is_gallery: Tensor
    sources: Tensor | None

    def take(self, places: Tensor) -> Part:
        """The items at some positions (M,), in that order."""
        sources = None if self.sources is None else self.sources[places]
        images = [self.images[place] for place in places.tolist()]
        return Part(images, self.labels[places], self.is_query[places], self.is_gallery[places], sources)


@dataclass(frozen=True)
class Catalogue:
    """Items, and the location of their images.

    Args:
        images: The images.
        attributes: Name of each attribute.
        items: All items; their `values` are in the order of the attributes.
        min_count: Values with fewer training items count as unknown.
    """

    images: ImageStore
    attributes: tuple[str, ...]
    items: list[Item]
    min_count: int = 0

    def __post_init__(self) -> None:
        known = set(self.images.names)
        if missing := [item.image for item in self.items if item.image not in known]:
            raise DataError(f"{shorten(self.images.path)} has no images {first_names(missing)}.")
        if empty := [name for name, values in self.values.items() if not values]:
            raise DataError(f"No value of {first_names(empty)} has at least {max(self.min_count, 1)} training items.")

    @cached_property
    def parts(self) -> dict[str, list[Item]]:
        """The items of each split."""
        found: dict[str, list[Item]] = {}
        for item in self.items:
            found.setdefault(item.part, []).append(item)
        return found

    @cached_property
    def _counts(self) -> list[Counter[str]]:
        """Number of training items with each value of each attribute."""
        trained = self.parts.get("train", self.items)
        return [
            Counter(item.values[column] for item in trained if item.values[column] is not None)  # type: ignore[misc]
            for column in range(len(self.attributes))
        ]

    @cached_property
    def _numbers(self) -> list[dict[str, int]]:
        """Label of each value of each attribute: training values come first."""
        found = []
        for column, counts in enumerate(self._counts):
            every = {item.values[column] for item in self.items}
            kept = sorted(value for value in every if value is not None and counts[value] >= self.min_count)
            ordered = [value for value in kept if counts[value]] + [value for value in kept if not counts[value]]
            found.append({value: number for number, value in enumerate(ordered)})
        return found

    @cached_property
    def values(self) -> dict[str, list[str]]:
        """Attribute -> the values of training items; label k of an attribute is value k."""
        return {
            name: [value for value in numbers if counts[value]]
            for name, numbers, counts in zip(self.attributes, self._numbers, self._counts)
        }

    def part(self, name: str) -> Part:
        """One split as tensors.

        Raises:
            DataError: The split does not exist, or has queries without a gallery or vice versa.
        """
        items = self.parts.get(name, [])
        if not items:
            raise DataError(f"The split must be one of {', '.join(map(repr, self.parts))}; got {shorten(name)!r}.")
        labels = torch.tensor(
            [
                [numbers.get(value, MISSING) for numbers, value in zip(self._numbers, item.values)]  # type: ignore[arg-type]
                for item in items
            ]
        )
        is_query = torch.tensor([item.role in ("query", "both") for item in items])
        is_gallery = torch.tensor([item.role in ("gallery", "both") for item in items])
        if name != "train" and not (is_query.any() and is_gallery.any()):
            lacking = "gallery" if is_query.any() else "queries"
            raise DataError(
                f"The split {name!r} has no {lacking}: set the role of its items to one of {', '.join(ROLES)}."
            )
        return Part([item.image for item in items], labels, is_query, is_gallery, _sources(items))

    def select(self, attributes: Sequence[str]) -> Catalogue:
        """The catalogue with some of its attributes.

        Raises:
            ConfigError: An attribute does not exist.
        """
        if unknown := [name for name in attributes if name not in self.attributes]:
            raise ConfigError(f"There is no attribute {first_names(unknown)}. There are {', '.join(self.attributes)}.")
        if double := [name for name in attributes if attributes.count(name) > 1]:
            raise ConfigError(f"The attribute {shorten(double[0])} is given twice.")
        columns = [self.attributes.index(name) for name in attributes]
        items = [item._replace(values=tuple(item.values[column] for column in columns)) for item in self.items]
        return Catalogue(self.images, tuple(attributes), items, self.min_count)


def first_names(names: Sequence[str]) -> str:
    """The first few of many names, such as `a.png, b.png, c.png and 3 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shorten(name, 60) for name in names[:3]) + more


def _sources(items: list[Item]) -> Tensor | None:
    if any(item.source is not None for item in items):
        numbers = {source: number for number, source in enumerate(sorted({str(item.source) for item in items}))}
        return torch.tensor([numbers[str(item.source)] for item in items])
    return torch.arange(len(items)) if any(item.role == "both" for item in items) else None
