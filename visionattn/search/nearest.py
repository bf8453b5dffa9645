"""Approximate search in large indexes: faiss proposes candidates, which are ranked by their exact float32 vectors.

| kind | default from (images) | method |
| --- | ---: | --- |
| exact | 0 | compares every vector |
| hnsw | 200,000 | graph of neighbours (Malkov and Yashunin, arXiv 1603.09320); slow to build |
| ivf | 1,000,000 | lists around centroids; the nearest lists are read |

A file `00.near`, one per attribute, holds vectors with 8 bits per element. Scores come from the float32 vectors, so the
only possible error is a missed image. The file records which vectors it was built from; a stale file is not used.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visionattn.errors import DataError, InputError, require, shorten
from visionattn.files import atomic_path
from visionattn.search.files import read_vectors, vector_files

__all__ = ["KINDS", "Candidates", "bring_up_to_date", "build", "find_candidates", "kind_for", "open_candidates"]

KINDS = ("auto", "exact", "hnsw", "ivf")
FROM = {"ivf": 1_000_000, "hnsw": 200_000}  # images
# HNSW: links per vector (M), efConstruction and efSearch.
LINKS, BUILT, SEARCHED = 32, 80, 128
# IVF: training vectors per centroid, iterations of k-means, and one list in so many is read.
EACH, ROUNDS, PART = 50, 8, 32
MORE = 4  # candidates per requested image, and at least 100
HEADER = struct.Struct("<4s4sII")  # magic, kind, checksums of the vector file and of the content after this header
MAGIC, SUFFIX = b"VANS", ".near"


class Candidates(NamedTuple):
    """A faiss index and its kind."""

    kind: str
    index: Any


def kind_for(count: int, kind: str = "auto") -> str:
    """Resolve the kind "auto" by the number of images; other kinds are returned as they are.

    Raises:
        InputError: `kind` is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise InputError(f"nearest must be one of {', '.join(map(repr, KINDS))}; got {shorten(kind)!r}.")
    if kind != "auto":
        return kind
    return next((name for name, least in FROM.items() if count >= least), "exact")


def build(vectors: np.ndarray, kind: str) -> Candidates:
    """Build an approximate index.

    Args:
        vectors: float32 (N, E), L2-normalised.
        kind: "hnsw" or "ivf".
    """
    faiss: Any = require("faiss", "search")
    count, size = vectors.shape
    bits = faiss.ScalarQuantizer.QT_8bit
    if kind == "hnsw":
        index = faiss.IndexHNSWSQ(size, bits, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILT
    else:
        lists = max(1, min(round(2 * math.sqrt(count)), count // 39))  # faiss requires 39 vectors per list
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(size), size, lists, bits, faiss.METRIC_INNER_PRODUCT, False
        )
        index.cp.niter, index.cp.max_points_per_centroid, index.cp.spherical = ROUNDS, EACH, True
    sample = np.random.default_rng(0).permutation(count)[: max(EACH * getattr(index, "nlist", 1), 10_000)]
    index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
    for start in range(0, count, 2**16):
        index.add(np.ascontiguousarray(vectors[start : start + 2**16]))
    return _set(Candidates(kind, index))


def _set(candidates: Candidates) -> Candidates:
    if candidates.kind == "hnsw":
        candidates.index.hnsw.efSearch = SEARCHED
    else:
        candidates.index.nprobe = max(1, math.ceil(candidates.index.nlist / PART))
    return candidates


def find_candidates(candidates: Candidates, query: np.ndarray, vectors: np.ndarray, wanted: int) -> np.ndarray:
    """Positions of the nearest vectors found, best first by float32 cosine; equal ones in the order of the index.

    Args:
        candidates: Result of `build`.
        query: float32 (E,).
        vectors: float32 (N, E) that `candidates` was built from.
        wanted: Number of positions; fewer may be found.
    """
    if candidates.kind == "hnsw":
        candidates.index.hnsw.efSearch = max(SEARCHED, MORE * wanted)
    _, found = candidates.index.search(query[None], min(max(MORE * wanted, 100), len(vectors)))
    places = np.sort(found[0][found[0] >= 0])
    return places[np.argsort(-(vectors[places] @ query), kind="stable")[:wanted]]


def bring_up_to_date(folder: Path, manifest: dict[str, Any], kind: str) -> None:
    """Write the approximate index of each attribute, unless a current one of that kind exists.

    Args:
        folder: Folder of the index.
        manifest: Its manifest.
        kind: Result of `kind_for`; "exact" removes the files.

    Raises:
        DataError: The index is damaged.
        StorageError: A file could not be written.
    """
    for number, name in enumerate(vector_files(manifest)):
        path = (folder / name).with_suffix(SUFFIX)
        if kind == "exact":
            path.unlink(missing_ok=True)
        elif _kind_of(path, manifest["checksums"][name]) != kind:
            candidates = build(read_vectors(folder, manifest, number), kind)
            content = require("faiss", "search").serialize_index(candidates.index)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                own = zlib.crc32(content.data)
                file.write(HEADER.pack(MAGIC, kind.encode().ljust(4), manifest["checksums"][name], own))
                file.write(content.data)


def _kind_of(path: Path, checksum: int) -> str | None:
    """Kind of the approximate index in a file; None if there is none, or if its vectors have another checksum."""
    try:
        with path.open("rb") as file:
            magic, kind, of, _ = HEADER.unpack(file.read(HEADER.size))
    except (OSError, struct.error):
        return None
    name = kind.decode("ascii", "replace").strip()
    return name if magic == MAGIC and of == checksum and name in FROM else None


def open_candidates(folder: Path, manifest: dict[str, Any], number: int) -> Candidates | None:
    """Open the approximate index of an attribute; None if there is no current one, so that search is exact.

    Raises:
        DataError: The file is damaged.
    """
    name = vector_files(manifest)[number]
    path = (folder / name).with_suffix(SUFFIX)
    kind = _kind_of(path, manifest.get("checksums", {}).get(name, -1))
    if kind is None:
        return None
    content = np.fromfile(path, np.uint8)
    # faiss does not validate what it reads, so the checksum is verified first.
    if zlib.crc32(content[HEADER.size :].data) != HEADER.unpack(content[: HEADER.size].tobytes())[3]:
        raise DataError(f"{shorten(path)} is damaged: its checksum is wrong. Delete it, or index the images again.")
    faiss: Any = require("faiss", "search")
    index = faiss.deserialize_index(content[HEADER.size :])
    return _set(Candidates(kind, index))
