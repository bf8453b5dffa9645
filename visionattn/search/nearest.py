"""Search in very many vectors without comparing all: candidates by faiss, which their own vectors then put in order.

| kind | from images on | what |
| --- | ---: | --- |
| exact | | every vector is compared |
| hnsw | 200,000 | a graph of neighbours (Malkov and Yashunin, arXiv 1603.09320); slow to build |
| ivf | 1,000,000 | lists around centroids, of which the nearest are read |

A file `00.near`, one for each attribute, holds vectors of 8 bits a number; scores are those of the float32 vectors, so
that only images can be missed. The file says which vectors it is of: one that is left from others is not used.
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
# Of HNSW: links of a vector, and vectors that are kept while it is built and searched.
LINKS, BUILT, SEARCHED = 32, 80, 128
# Of IVF: vectors of a centroid for training, rounds of k-means, and the part of the lists that is read.
EACH, ROUNDS, PART = 50, 8, 32
MORE = 4  # candidates for each image that is wanted, and at least 100
HEADER = struct.Struct("<4s4sII")  # magic, kind, checksums of the vectors' file and of what follows
MAGIC, SUFFIX = b"VANS", ".near"


class Candidates(NamedTuple):
    """faiss's index of a kind, and the kind."""

    kind: str
    index: Any


def kind_for(count: int, kind: str = "auto") -> str:
    """The kind for a number of images.

    Raises:
        InputError: There is no such kind.
    """
    if kind not in KINDS:
        raise InputError(f"nearest must be one of {', '.join(map(repr, KINDS))}; got {shorten(kind)!r}.")
    if kind != "auto":
        return kind
    return next((name for name, least in FROM.items() if count >= least), "exact")


def build(vectors: np.ndarray, kind: str) -> Candidates:
    """Build the index of candidates.

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
        lists = max(1, min(round(2 * math.sqrt(count)), count // 39))  # faiss wants 39 vectors for each
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
    """Positions of the nearest vectors that were found, best first by their own float32 cosine; equal ones in order.

    Args:
        candidates: Of `build`.
        query: float32 (E,).
        vectors: float32 (N, E) that `candidates` was built of.
        wanted: How many; there may be fewer.
    """
    if candidates.kind == "hnsw":
        candidates.index.hnsw.efSearch = max(SEARCHED, MORE * wanted)
    _, found = candidates.index.search(query[None], min(max(MORE * wanted, 100), len(vectors)))
    places = np.sort(found[0][found[0] >= 0])
    return places[np.argsort(-(vectors[places] @ query), kind="stable")[:wanted]]


def bring_up_to_date(folder: Path, manifest: dict[str, Any], kind: str) -> None:
    """Write the candidates of each attribute of an index, where there are none of its vectors and of that kind.

    Args:
        folder: Of the index.
        manifest: What it says of itself.
        kind: Of `kind_for`; "exact" removes the files.

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
    """Kind of a file's candidates; None where there are none, or none of the vectors with that checksum."""
    try:
        with path.open("rb") as file:
            magic, kind, of, _ = HEADER.unpack(file.read(HEADER.size))
    except (OSError, struct.error):
        return None
    name = kind.decode("ascii", "replace").strip()
    return name if magic == MAGIC and of == checksum and name in FROM else None


def open_candidates(folder: Path, manifest: dict[str, Any], number: int) -> Candidates | None:
    """The candidates of an attribute; None where there are none of its vectors, so that all are compared.

    Raises:
        DataError: The file is damaged.
    """
    name = vector_files(manifest)[number]
    path = (folder / name).with_suffix(SUFFIX)
    kind = _kind_of(path, manifest.get("checksums", {}).get(name, -1))
    if kind is None:
        return None
    content = np.fromfile(path, np.uint8)
    # faiss trusts what it reads: nothing that differs by a bit is given to it.
    if zlib.crc32(content[HEADER.size :].data) != HEADER.unpack(content[: HEADER.size].tobytes())[3]:
        raise DataError(f"{shorten(path)} is damaged: its checksum is wrong. Delete it, or index the images again.")
    faiss: Any = require("faiss", "search")
    index = faiss.deserialize_index(content[HEADER.size :])
    return _set(Candidates(kind, index))
