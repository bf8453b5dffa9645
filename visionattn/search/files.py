"""The files of an image index, checked when read and replaced as a whole.

`manifest.json` describes the index and holds a checksum of itself and of each vector file. `00.faiss`, `01.faiss`, ...,
one per condition of the model in order, are of faiss's `IndexFlatIP`.

A new index is staged in `parts/new`, its manifest last, and then moved into place; if the run is killed, the next run
does so. Until then finished blocks of images are in `parts`, each with the identity of what made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from visionattn.errors import DataError, shorten
from visionattn.files import TEMPORARY, atomic_path, read_json

__all__ = [
    "Block",
    "clear",
    "commit",
    "read_blocks",
    "read_manifest",
    "read_vectors",
    "stage",
    "vector_files",
    "write_block",
]

FORMAT = 1
# Entries that older indexes have too, which store no checksums, digests, or sizes and times of images.
SCHEMA = {
    "format": int,
    "embed_dim": int,
    "model": str,
    "weights": str,
    "input": dict,
    "conditions": [str],
    "folder": str,
    "images": list,
}
LARGEST_MANIFEST = 2**31
# faiss's IndexFlatIP: name, dimensions, count, two unused numbers, trained, metric (inner product), count of floats.
HEADER = struct.Struct("<4siqqq?iQ")
UNUSED = 1 << 20
UNIT = 1 + 1e-3  # largest length of a vector, allowing for float32 rounding
ROWS = 2**16  # vectors whose lengths are computed at a time
OURS = re.compile(
    r"(\d+\.(npz|safetensors|faiss|near)|plan\.json|manifest\.json|" + re.escape(TEMPORARY) + ".*)", re.DOTALL
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an index.

    Raises:
        DataError: There is no index, or it is unfinished, damaged, or of another format.
    """
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        unfinished = os.path.isdir(folder / "parts")
        what = "is unfinished: run visionattn index again" if unfinished else "holds no index of visionattn"
        raise DataError(f"The folder {shorten(folder)} {what}.")
    manifest = read_json(path, SCHEMA, LARGEST_MANIFEST)
    if manifest["format"] != FORMAT:
        raise DataError(f"{shorten(path)} has format {manifest['format']}; this version reads format {FORMAT}.")
    checksum = manifest.pop("checksum", None)
    if wrong := "its checksum is wrong" if checksum not in (None, _digest(manifest)) else _contradiction(manifest):
        raise DataError(f"{shorten(path)} is damaged: {wrong}. Index the images again.")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _contradiction(manifest: dict[str, Any]) -> str | None:
    """Describe the first invalid entry of a manifest whose types are right; None if there is none."""
    images, conditions = manifest["images"], manifest["conditions"]
    if not images or not all(isinstance(name, str) for name in images) or len(set(images)) != len(images):
        return "images must be a list of different names"
    checkpoint = manifest.get("checkpoint", "")
    if not isinstance(checkpoint, str):
        return "checkpoint must be a file name"
    if any("\0" in name for name in (*images, manifest["folder"], manifest["model"], checkpoint)):
        return "file names must not contain NUL bytes"
    if not conditions or len(set(conditions)) != len(conditions) or manifest["embed_dim"] < 1:
        return "conditions must be different names, and embed_dim at least 1"
    files = manifest.get("files", [])
    if not isinstance(files, list) or not all(_is_file(entry) for entry in files):
        return "files must be a list of names, sizes and times"
    digests = manifest.get("digests", [None] * len(images))
    kept = isinstance(digests, list) and len(digests) == len(images)
    if not kept or not all(isinstance(digest, (str, type(None))) for digest in digests):
        return "there must be one digest per image"
    checksums = manifest.get("checksums", {})
    if not isinstance(checksums, dict) or (checksums and sorted(checksums) != sorted(vector_files(manifest))):
        return "there must be one checksum per condition"
    unreadable = manifest.get("unreadable", [])
    if not isinstance(unreadable, list) or not all(isinstance(line, str) for line in unreadable):
        return "unreadable must be a list of messages"
    return None


def _is_file(entry: Any) -> bool:
    return isinstance(entry, list) and [type(part) for part in entry] == [str, int, int]


def vector_files(manifest: dict[str, Any]) -> list[str]:
    """File name of the vectors of each condition."""
    return [f"{number:02d}.faiss" for number in range(len(manifest["conditions"]))]


def read_vectors(folder: Path, manifest: dict[str, Any], number: int) -> np.ndarray:
    """Read the vectors of a condition, float32 (N, E); they are checked and memory-mapped.

    Raises:
        DataError: The file is missing, damaged, not an `IndexFlatIP` of that size, or its vectors are not unit vectors.
    """
    name = vector_files(manifest)[number]
    path = folder / name
    count, size = len(manifest["images"]), manifest["embed_dim"]
    try:
        if not path.is_file():
            raise DataError(f"Could not read {shorten(path)}: it is missing. Index the images again.")
        with path.open("rb") as file:
            found = file.read(HEADER.size)
        images = HEADER.unpack(found)[2] if len(found) == HEADER.size else 0
        if not images or found != _header(images, size):
            raise DataError(f"{shorten(path)} is damaged, or not a flat index of {size} dimensions.")
        if images != count:
            raise DataError(f"{shorten(path)} has {images} images, the manifest {count}: index the images again.")
        if path.stat().st_size != HEADER.size + 4 * count * size:
            raise DataError(f"{shorten(path)} is damaged: its size is wrong. Index the images again.")
        vectors = np.memmap(path, "<f4", "r", HEADER.size, (count, size))
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"Could not read {shorten(path)}: {getattr(error, 'strerror', None) or error}.") from error
    checksum = manifest.get("checksums", {}).get(name)
    if checksum is not None and zlib.crc32(vectors.data) != checksum:
        raise DataError(f"{shorten(path)} is damaged: its checksum is wrong. Index the images again.")
    for start in range(0, count, ROWS):
        rows = vectors[start : start + ROWS]
        if not (np.einsum("ne,ne->n", rows, rows) <= UNIT**2).all():  # false for NaN, too
            raise DataError(f"{shorten(path)} is damaged: its vectors are not of length 1. Index the images again.")
    return np.asarray(vectors)  # faiss.contrib.torch_utils rejects sub-classes of ndarray


def _header(count: int, size: int) -> bytes:
    if not (0 <= count < 2**40 and size < 2**20):  # a damaged file
        return b""
    return HEADER.pack(b"IxFI", size, count, UNUSED, UNUSED, True, 0, count * size)


def stage(output: Path, vectors: np.ndarray, manifest: dict[str, Any]) -> None:
    """Write the files of a new index next to the existing ones; `commit` then replaces those.

    Args:
        output: Folder of the index.
        vectors: float32 (N, C, E), L2-normalised.
        manifest: Entries model, weights, input, conditions, folder and images.

    Raises:
        StorageError: A file could not be written.
    """
    new = output / "parts" / "new"
    _discard(new)
    manifest = {"format": FORMAT, "metric": "cosine", "dtype": "float32", "embed_dim": vectors.shape[2], **manifest}
    manifest["checksums"] = {}
    for number, name in enumerate(vector_files(manifest)):
        own = np.ascontiguousarray(vectors[:, number], "<f4")
        manifest["checksums"][name] = zlib.crc32(own.data)
        with atomic_path(new / name) as temporary, temporary.open("wb") as file:
            file.write(_header(*own.shape))
            file.write(own.data)
    with atomic_path(new / "manifest.json") as temporary:
        temporary.write_text(json.dumps({**manifest, "checksum": _digest(manifest)}))


def commit(output: Path) -> None:
    """Move a staged index into place as a whole, including one that a killed run left.

    Raises:
        OSError: A file could not be renamed; the next call continues.
    """
    new = output / "parts" / "new"
    if not (new / "manifest.json").exists():
        return
    try:
        wanted = vector_files(read_manifest(new))
    except DataError:  # a manifest that did not reach the disk whole
        _discard(new)
        return
    # Without a manifest the index counts as unfinished, so that old and new files are never mixed.
    (output / "manifest.json").unlink(missing_ok=True)
    for path in output.glob("*.faiss"):
        if OURS.fullmatch(path.name) and path.name not in wanted:
            path.unlink()
    for name in wanted:
        if (new / name).exists():
            os.replace(new / name, output / name)
    os.replace(new / "manifest.json", output / "manifest.json")


def clear(output: Path) -> None:
    """Remove the intermediate files of a finished index."""
    _discard(output / "parts" / "new")
    _discard(output / "parts")


def _discard(folder: Path) -> None:
    """Remove our files from a folder, and the folder if it is then empty."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if OURS.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


class Block(NamedTuple):
    """A finished block of images.

    Attributes:
        files: Name, size, modification time and digest of each image that was read.
        vectors: float32 (M, C, E).
        failures: Name, size, modification time and error message of each image that could not be read.
    """

    files: list[list[Any]]
    vectors: np.ndarray
    failures: list[list[Any]]


def write_block(output: Path, number: int, identity: str, block: Block) -> None:
    """Write a block with the identity of what made it: model, weights, preprocessing and conditions.

    Raises:
        StorageError: The block could not be written.
    """
    described = json.dumps([block.files, block.failures])
    vectors = np.ascontiguousarray(block.vectors, np.float32)
    metadata = {"identity": identity, "images": described, "checksum": _block_checksum(described, vectors)}
    with atomic_path(output / "parts" / f"{number:09d}.safetensors") as temporary:
        temporary.write_bytes(safetensors.numpy.save({"vectors": vectors}, metadata))


def _block_checksum(described: str, vectors: np.ndarray) -> str:
    return f"{zlib.crc32(vectors.data, zlib.crc32(described.encode())):08x}"


def read_blocks(output: Path, identity: str) -> Iterator[tuple[int, Block]]:
    """Yield number and content of the finished blocks of an identity; damaged and foreign blocks are removed."""
    for path in sorted((output / "parts").glob("*.*")):
        if not OURS.fullmatch(path.name):
            continue
        try:
            with safe_open(path, "numpy") as file:
                metadata, vectors = file.metadata() or {}, file.get_tensor("vectors")
            described = metadata["images"]
            good = metadata["identity"] == identity and metadata["checksum"] == _block_checksum(described, vectors)
            block = Block(json.loads(described)[0], vectors, json.loads(described)[1]) if good else None
        except Exception:
            # A damaged file of ours: embedding its images again costs less than an error.
            block = None
        if block is None:
            path.unlink(missing_ok=True)
        else:
            yield int(path.stem), block
