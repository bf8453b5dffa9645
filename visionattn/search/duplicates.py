"""`visionattn.duplicates`: near-duplicate images of an index, found exactly by the cosine similarity of each pair.

Files of equal content count as one image and are always in one group. All other pairs are compared block by block, so
that memory does not grow with the square of the number of images; pairs above the threshold are merged into groups.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visionattn.devices import find_device
from visionattn.errors import DataError, InputError, shorten
from visionattn.files import atomic_path, check_output
from visionattn.search import sheet
from visionattn.search.files import read_vectors
from visionattn.search.image_index import ImageIndex

__all__ = ["THRESHOLD", "Duplicates", "Pair", "duplicates"]

THRESHOLD = 0.95
BLOCK = 4096  # rows and columns of the block of cosines in memory
SAMPLE = 1000  # images whose pairs give the usual cosine
MOST_PAIRS = 10**6
ROUNDING = 1e-6  # error of a cosine in float32: a threshold of 1 finds equal vectors


@dataclass(frozen=True)
class Pair:
    """Two images and their cosine similarity; `same` is True if their files have equal content."""

    first: str
    second: str
    cosine: float
    same: bool = False


@dataclass(repr=False)
class Duplicates:
    """Near-duplicate images of an index.

    Attributes:
        pairs: All pairs of different images at or above the threshold, and each file with the first file of equal
            content; files of equal content first, then by descending cosine.
        groups: Connected components of the pairs; the largest group first, each in the order of the index.
        threshold: Minimum cosine of a pair.
        attribute: Attribute that is compared.
        images: Number of images in the index.
        usual: Median cosine of two images of a sample, and the cosine that one pair in a thousand exceeds. What counts
            as a high cosine depends on the model.
        folder: Folder of the images.
    """

    pairs: list[Pair]
    groups: list[list[str]]
    threshold: float
    attribute: str
    images: int
    usual: tuple[float, float]
    folder: Path = field(default_factory=Path)

    def __repr__(self) -> str:
        return f"Duplicates({self.describe()})"

    def to_json(self) -> dict[str, Any]:
        """Return groups and pairs as a JSON-compatible dictionary."""
        return {
            "folder": str(self.folder),
            "attribute": self.attribute,
            "threshold": self.threshold,
            "usual": list(self.usual),
            "groups": self.groups,
            "pairs": [[pair.first, pair.second, pair.cosine, pair.same] for pair in self.pairs],
        }

    def describe(self) -> str:
        """Describe the number of groups and copies in words."""
        copies = sum(len(group) - 1 for group in self.groups)
        groups = "1 group" if len(self.groups) == 1 else f"{len(self.groups)} groups"
        return f"{groups}, {copies} of {self.images} images beyond the first of each"

    def describe_usual(self) -> str:
        """Describe the usual cosine in words, and suggest a threshold if most images count as copies."""
        usual = (
            f"Two images of this index usually have a cosine of {self.usual[0]:.3f} (median); one pair in a thousand "
            f"has more than {self.usual[1]:.4f}."
        )
        higher = self.higher_threshold()
        if higher is None:
            return usual
        return f"{usual} Most images count as copies: use --threshold {higher:g}."

    def higher_threshold(self) -> float | None:
        """Lowest threshold, to four decimals, at which no group has more than a tenth of the images.

        Groups of two images and groups of files of equal content may stay larger.

        Returns:
            The threshold; None if at most half of the images are copies, or if there is no such threshold.
        """
        if 2 * sum(len(group) - 1 for group in self.groups) <= self.images:
            return None
        rows = {name: row for row, name in enumerate(name for group in self.groups for name in group)}
        join = _Joined(len(rows))
        most = max(2, self.images // 10)
        for pair in self.pairs:  # equal files first, then by descending cosine
            size = join(rows[pair.first], rows[pair.second])
            if pair.same:
                most = max(most, size)
            elif size > most:
                higher = math.floor((pair.cosine + 2 * ROUNDING) * 1e4 + 1) / 1e4
                return higher if higher <= 1 else None
        return None

    def to_html(self) -> str:
        """Return the groups as a self-contained HTML page without scripts."""
        nearest: dict[str, float] = {}
        same: set[str] = set()
        for pair in self.pairs:
            for name in (pair.first, pair.second):
                nearest[name] = max(pair.cosine, nearest.get(name, -1.0))
                same |= {name} if pair.same else set()
        groups = {}
        for number, names in enumerate(self.groups, 1):
            words = [f"{nearest[name]:.4f}{', equal files' * (name in same)}" for name in names]
            groups[f"Group {number}: {len(names)} images"] = [sheet.Cell(*cell) for cell in zip(names, words)]
        told = [
            f"{shorten(self.folder)}: {self.describe()}. Pairs have a cosine of at least {self.threshold:g} by "
            f"{shorten(self.attribute)}; below each image is its highest cosine within the group.",
            self.describe_usual(),
        ]
        return sheet.page("Duplicates", told, groups, self.folder)


def duplicates(
    index: str | Path | ImageIndex,
    attribute: str | None = None,
    *,
    threshold: float = THRESHOLD,
    images: str | Path | None = None,
    device: str | torch.device = "auto",
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Duplicates:
    """Find near-duplicate images of an index; every pair is compared, so that none is missed.

    Args:
        index: Folder that `visionattn.index` wrote, or the index itself.
        attribute: Attribute to compare; None: the only one of the index.
        threshold: Minimum cosine of two near-duplicates, above 0 and at most 1.
        images: Current folder of the indexed images; None: the folder that was indexed. Only an HTML page needs it.
        device: Device that computes the cosines: "auto" (a GPU if available), or a PyTorch device.
        output: HTML page to write, with a JSON file of the same name, or the JSON file alone; None writes nothing.
        overwrite: Replace existing outputs.

    Returns:
        The pairs and groups.

    Raises:
        DataError: There is no index, or it is damaged.
        InputError: An argument is invalid, an output exists, or there are more than a million pairs.
        MissingPackageError: faiss is not installed.
        StorageError: An output could not be written.
        UnknownNameError: There is no such attribute.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"The threshold must be above 0 and at most 1; got {threshold}.")
    opened = index if isinstance(index, ImageIndex) else ImageIndex(index)
    if attribute is None and len(opened.conditions) > 1:
        listed = ", ".join(map(shorten, opened.conditions))
        raise InputError(f"{shorten(opened.folder)} has the attributes {listed}: choose with --attribute.")
    attribute = opened.conditions[0] if attribute is None else attribute
    opened.check_attributes([attribute])
    if output is not None:
        for path in dict.fromkeys((Path(output), Path(output).with_suffix(".json"))):
            check_output(path, overwrite, (sheet.PAGE, ".json"))
    vectors = read_vectors(opened.folder, opened.manifest, opened.conditions.index(attribute))
    chosen, same = _one_of_each(opened, len(vectors))
    rows, columns, cosines = _near(vectors[chosen], threshold, find_device(device))
    first = np.concatenate([chosen[rows], same[:, 0]])
    second = np.concatenate([chosen[columns], same[:, 1]])
    names = opened.images
    equal = np.einsum("ne,ne->n", vectors[same[:, 0]], vectors[same[:, 1]])
    values = np.minimum(np.concatenate([cosines, equal]), 1).tolist()
    pairs = [
        Pair(names[one], names[other], value, place >= len(rows))
        for place, (one, other, value) in enumerate(zip(first.tolist(), second.tolist(), values))
    ]
    found = Duplicates(
        sorted(pairs, key=lambda pair: (-pair.same, -pair.cosine)),
        [[names[row] for row in group] for group in _groups(len(names), first, second)],
        threshold,
        attribute,
        len(names),
        _usual(vectors[chosen]),
        Path(images or opened.manifest["folder"]),
    )
    if output is not None:
        _write(found, Path(output))
    return found


def _write(found: Duplicates, output: Path) -> None:
    if output.suffix.lower() == sheet.PAGE:
        with atomic_path(output) as temporary:
            temporary.write_text(found.to_html(), encoding="utf-8")
    with atomic_path(output.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(found.to_json(), indent=1))


def _one_of_each(index: ImageIndex, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of images of different content, and pairs (first, other) of rows of equal content."""
    digests = index.manifest.get("digests", [None] * count)
    often = Counter(digest for digest in digests if digest is not None)
    first: dict[str, int] = {}
    chosen, same = [], []
    for row, digest in enumerate(digests):
        if often[digest] > 1 and first.setdefault(digest, row) != row:
            same.append((first[digest], row))
        else:
            chosen.append(row)
    return np.array(chosen), np.array(same, np.int64).reshape(-1, 2)


@torch.inference_mode()
def _near(vectors: np.ndarray, threshold: float, device: torch.device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and cosines of all pairs of (N, E) at or above a threshold, row < column."""
    every = torch.from_numpy(np.ascontiguousarray(vectors)).to(device)
    found, total = [], 0
    for top in range(0, len(every), BLOCK):
        rows = every[top : top + BLOCK]
        for left in range(top, len(every), BLOCK):
            cosines = rows @ every[left : left + BLOCK].T
            if not cosines.isfinite().all():
                raise DataError("The index is damaged: its vectors are not finite. Index the images again.")
            near = cosines >= threshold - ROUNDING
            if left == top:
                near = near.triu(1)
            places = near.nonzero()
            total += len(places)
            if total > MOST_PAIRS:
                raise InputError(f"More than {MOST_PAIRS:,} pairs have a cosine of {threshold:g}: raise the threshold.")
            row, column = places.cpu().numpy().T
            found.append((row + top, column + left, cosines[near].cpu().numpy()))
    first, second, values = (np.concatenate(parts) for parts in zip(*found))
    return first, second, values


def _usual(vectors: np.ndarray) -> tuple[float, float]:
    """Median and 99.9th percentile of the cosines of pairs of (N, E)."""
    rows = np.random.default_rng(0).permutation(len(vectors))[:SAMPLE]
    cosines = (vectors[rows] @ vectors[rows].T)[np.triu_indices(len(rows), 1)]
    if not len(cosines):
        return 1.0, 1.0
    median, high = np.percentile(cosines, [50, 99.9])
    return float(median), float(high)


class _Joined:
    """Connected components of rows; the smallest row of a component represents it."""

    def __init__(self, count: int) -> None:
        self.root = list(range(count))
        self.size = [1] * count

    def find(self, row: int) -> int:
        root = self.root
        while root[row] != row:
            root[row] = row = root[root[row]]
        return row

    def __call__(self, one: int, other: int) -> int:
        """Join two rows, and return the size of their component."""
        low, high = sorted((self.find(one), self.find(other)))
        if low != high:
            self.root[high] = low
            self.size[low] += self.size[high]
        return self.size[low]


def _groups(count: int, first: np.ndarray, second: np.ndarray) -> list[list[int]]:
    """Connected components of the pairs, the largest first."""
    join = _Joined(count)
    for one, other in zip(first.tolist(), second.tolist()):
        join(one, other)
    members: dict[int, list[int]] = {}
    for row in sorted({*first.tolist(), *second.tolist()}):
        members.setdefault(join.find(row), []).append(row)
    return sorted(members.values(), key=lambda group: (-len(group), group[0]))
