"""Building an index of a folder of images, and updating it.

Images whose size and modification time, or whose content, match the index keep their vectors; the others are embedded.
Images are always divided into the same blocks and batches: an interrupted run resumes after its finished blocks and
produces the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from torch import nn

from visionattn.data import images
from visionattn.data.retrieval.embedding import (
    check_embedding,
    check_finite,
    conditions_of,
    embed,
    eval_transform,
    input_config,
)
from visionattn.errors import DataError, InputError, VisionAttnError, require, shorten
from visionattn.files import exclusive
from visionattn.predict.images import picture
from visionattn.progress import counted
from visionattn.search.files import (
    Block,
    clear,
    commit,
    read_blocks,
    read_manifest,
    read_vectors,
    stage,
    write_block,
)
from visionattn.search.nearest import bring_up_to_date, kind_for
from visionattn.weights.hashing import hash_state

__all__ = [
    "Update",
    "as_upright",
    "build_index",
    "digest_of",
    "find_images",
    "read_upright",
    "update_index",
    "write_index",
]

BLOCK, BATCH = 256, 32  # images per saved block, and per forward pass
LARGE = 2**25  # images with more pixels are read one at a time
WHOLE = "image"  # name of the only condition of a model without conditions
# Manifest entries that determine the vectors, and the description of an index whose entry differs.
REASONS = {
    "weights": "of another model",
    "input": "with other preprocessing",
    "conditions": "with other attributes",
}


@dataclass
class Update:
    """Changes that `update_index` made.

    Attributes:
        failures: One line per image that could not be read and is missing from the index.
        added: Names of the images that are new in the index.
        removed: Names of the images that are no longer in it.
        refreshed: Names of the images whose content changed.
    """

    failures: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refreshed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.added)} added, {len(self.refreshed)} refreshed, {len(self.removed)} removed"


@dataclass
class _Known:
    """An image with known vectors.

    Attributes:
        status: Size in bytes and modification time in nanoseconds.
        digest: Digest of its content; None in an index of a version that stored no digests.
        vectors: float32 (C, E).
    """

    status: tuple[int, int] | None
    digest: str | None
    vectors: np.ndarray


def find_images(folder: str | Path) -> list[str]:
    """List the images of a folder and its sub-folders, as sorted names relative to it; hidden ones are left out.

    Raises:
        DataError: The folder does not exist, or contains no image.
    """
    return sorted(path.relative_to(folder).as_posix() for path in images.find_images(folder, recursive=True))


def read_upright(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, rotated upright by its EXIF orientation, with alpha blended onto white.

    Raises:
        DataError: The file does not exist, is not an image, or is damaged.
        InputError: Its pixels have no known range.
    """
    return _rgb(picture.read(Path(path)).pixels)


def as_upright(image: Image.Image | np.ndarray) -> Image.Image:
    """As `read_upright`, for a PIL image or an array (H, W) or (H, W, C) of uint8 or uint16.

    Raises:
        InputError: The image is neither, or its pixels have no known range.
    """
    if isinstance(image, Image.Image):
        return _rgb(picture.Picture.of(ImageOps.exif_transpose(image)).pixels)
    if not isinstance(image, np.ndarray):
        raise InputError(f"An image must be a file, a PIL image or an array; got {shorten(type(image).__name__)}.")
    pixels = image[:, :, None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4) or pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(
            "An array of pixels must be (H, W) or (H, W, C) of uint8 or uint16, with 1 to 4 channels; got "
            f"{image.shape} of {image.dtype}."
        )
    return _rgb(pixels)


def _rgb(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) of uint8 or uint16 -> 8-bit RGB, alpha blended onto white."""
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / np.float32(257)).astype(np.uint8)
    if pixels.shape[2] in (2, 4):
        pixels = picture.on_white(pixels)
    return Image.fromarray(pixels[:, :, [0, 0, 0]] if pixels.shape[2] == 1 else pixels)


def digest_of(path: Path) -> str:
    """Digest of a file's content, as 32 hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def build_index(
    folder: str | Path,
    output: str | Path,
    model: nn.Module,
    model_name: str,
    *,
    image_size: tuple[int, int] | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[str]:
    """Embed the images of a folder under all conditions of a model, and write an index or update an existing one.

    Args:
        folder: Folder of images; sub-folders are included.
        output: Folder of the index. An index of the same folder and model is updated: images are added, removed and
            refreshed. An unfinished index is continued.
        model: Module that returns (B, C, E) for its C `attributes`, or features (B, E), the only condition `"image"`.
        model_name: Name or weight file of the model, for the manifest.
        image_size: Height and width of the images in pixels; None: the model's input size.
        overwrite: Replace an index of another folder or another model, or a damaged one; and compare images by their
            content, not by size and modification time.
        console: Console that shows the progress; None: no progress.

    Returns:
        One line per image that could not be read and is missing from the index.

    Raises:
        CheckpointError: The model's weights are not finite.
        DataError: There are no images, or none can be read, or more than 10 % cannot be read.
        InputError: The model gives no finite embeddings at that size, or the output holds another index.
        MissingPackageError: faiss is not installed.
        StorageError: The index could not be written, or another run is writing to it.
    """
    return update_index(
        folder, output, model, model_name, image_size=image_size, overwrite=overwrite, console=console
    ).failures


def update_index(
    folder: str | Path,
    output: str | Path,
    model: nn.Module,
    model_name: str,
    *,
    checkpoint: str | None = None,
    image_size: tuple[int, int] | None = None,
    nearest: str = "auto",
    overwrite: bool = False,
    console: Console | None = None,
) -> Update:
    """As `build_index`, with the name's weight file `checkpoint` and the kind `nearest`; returns what changed."""
    kind_for(0, nearest)  # raises an error for an unknown kind
    require("faiss", "search")
    folder, output = Path(folder), Path(output)
    names = find_images(folder)
    plan = _plan(folder, model.eval(), model_name, image_size)
    if checkpoint is not None:
        plan["checkpoint"] = checkpoint
    with exclusive(output):
        commit(output)
        before = _before(output, plan, overwrite)
        maker = _Maker(folder, model, plan, _statuses(folder, names))
        if before is not None and not maker.reuse(before, output, trust_times=not overwrite):
            before = None
        maker.resume(output)
        with counted("images", len(names), console) as advance:
            advance(len(maker.found))
            # Images that failed before come first: whether they can be read now does not change the later blocks.
            retried = set(maker.failures)
            fresh = [name for name in maker.statuses if name not in maker.found and name not in retried]
            for chosen in (sorted(retried), fresh):
                maker.embed(chosen, output, advance)
        failures = [maker.failures[name][2] for name in sorted(maker.failures)]
        images.check_unreadable(failures, len(maker.statuses))
        kept = [name for name in names if name in maker.found]
        old = {} if before is None else {name: row for row, name in enumerate(before["images"])}
        update = Update(failures, [n for n in kept if n not in old], [n for n in old if n not in maker.found])
        update.refreshed = [name for name in kept if name in old and name in maker.embedded]
        manifest = {
            **plan,
            "images": kept,
            "digests": [maker.found[name].digest for name in kept],
            "files": [[name, *maker.statuses[name]] for name in names if name in maker.statuses],
            "unreadable": failures,
        }
        if before is None or any(before.get(key) != value for key, value in manifest.items()):
            stage(output, np.stack([maker.found[name].vectors for name in kept]), manifest)
            commit(output)
        clear(output)
        bring_up_to_date(output, read_manifest(output), kind_for(len(kept), nearest))
    return update


def write_index(output: Path, vectors: np.ndarray, manifest: dict[str, Any]) -> None:
    """Write the files of an index, replacing existing ones.

    Args:
        output: Folder of the index.
        vectors: float32 (N, C, E), L2-normalised.
        manifest: Entries model, weights, input, conditions, folder and images.

    Raises:
        StorageError: A file could not be written.
    """
    with exclusive(output):
        stage(output, vectors, manifest)
        commit(output)
        clear(output)


def _plan(folder: Path, model: nn.Module, model_name: str, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Manifest entries that determine the vectors, and the folder of the images."""
    conditions = conditions_of(model)
    if not conditions and getattr(model, "num_classes", 0) != 0:
        raise InputError(
            f"{shorten(model_name)} is a classifier: an embedding model is required, such as va_cca_* or re-id models."
        )
    config = input_config(model, image_size)
    check_embedding(model, model_name, config)
    return {
        "model": model_name,
        "weights": hash_state(model.state_dict()),
        "input": config,
        "conditions": list(conditions) or [WHOLE],
        "folder": str(folder.resolve()),
    }


def _statuses(folder: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    """Size and modification time of each image that still exists."""
    found = {}
    for name in names:
        with contextlib.suppress(OSError):
            status = (folder / name).stat()
            found[name] = (status.st_size, status.st_mtime_ns)
    return found


def _before(output: Path, plan: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Manifest of the existing index to update; None if there is none.

    Raises:
        InputError: It is damaged, of another model or of another folder, and may not be replaced.
    """
    if not os.path.lexists(output / "manifest.json"):
        return None
    try:
        before = read_manifest(output)
    except DataError as error:
        if overwrite:
            return None
        raise InputError(f"{error} Give --overwrite to replace it.") from error
    changed = [words for key, words in REASONS.items() if before[key] != plan[key]]
    if changed and not overwrite:
        raise InputError(f"{shorten(output)} holds an index {' and '.join(changed)}: give --overwrite to replace it.")
    # A folder that no longer exists was moved; its images are recognised by their content.
    if before["folder"] != plan["folder"] and os.path.isdir(before["folder"]) and not overwrite:
        whose = shorten(before["folder"])
        raise InputError(f"{shorten(output)} holds an index of the folder {whose}: give --overwrite to replace it.")
    return None if changed else before


class _Maker:
    """Collects the vectors of images: from an old index, from finished blocks, and from the model."""

    def __init__(
        self, folder: Path, model: nn.Module, plan: dict[str, Any], statuses: dict[str, tuple[int, int]]
    ) -> None:
        self.folder = folder
        self.model = model
        self.model_name = plan["model"]
        self.identity = repr([plan[key] for key in REASONS])
        self.transform = eval_transform(plan["input"])
        self.statuses = statuses
        self.found: dict[str, _Known] = {}
        self.failures: dict[str, list[Any]] = {}  # size, modification time, message
        self.embedded: set[str] = set()
        self.blocks = 0
        self._one_large = threading.Lock()

    def reuse(self, before: dict[str, Any], output: Path, trust_times: bool) -> bool:
        """Take the vectors of unchanged images, recognised by size and modification time or by content.

        Returns:
            False if the vectors are damaged and may be replaced.

        Raises:
            InputError: The vectors are damaged.
        """
        statuses = {name: (size, time) for name, size, time in before.get("files", [])}
        digests = before.get("digests", [None] * len(before["images"]))
        try:
            columns = [read_vectors(output, before, number) for number in range(len(before["conditions"]))]
        except DataError as error:
            if not trust_times:
                return False
            raise InputError(f"{error} Give --overwrite to replace it.") from error
        known = [
            _Known(statuses.get(name), digest, np.stack([column[row] for column in columns]))
            for row, (name, digest) in enumerate(zip(before["images"], digests))
        ]
        by_name = dict(zip(before["images"], known))
        by_digest = {one.digest: one for one in known if one.digest is not None}

        def find(name: str) -> _Known | None:
            own = by_name.get(name)
            as_it_was = trust_times and own is not None and own.status == self.statuses[name]
            if as_it_was and own is not None and own.digest is not None:
                return own
            try:
                digest = digest_of(self.folder / name)
            except OSError:
                return None
            same = own if as_it_was else by_digest.get(digest)
            return None if same is None else _Known(self.statuses[name], digest, same.vectors)

        with ThreadPoolExecutor() as pool:
            for name, one in zip(self.statuses, pool.map(find, self.statuses)):
                if one is not None:
                    self.found[name] = one
        return True

    def resume(self, output: Path) -> None:
        """Take the finished blocks of an interrupted run."""
        for number, block in read_blocks(output, self.identity):
            self.blocks = number + 1
            for (name, size, time, digest), vectors in zip(block.files, block.vectors):
                if self.statuses.get(name) == (size, time) and name not in self.found:
                    self.found[name] = _Known((size, time), digest, vectors)
                    self.embedded.add(name)
            for name, size, time, message in block.failures:
                if self.statuses.get(name) == (size, time) and name not in self.found:
                    self.failures[name] = [size, time, message]

    def embed(self, names: list[str], output: Path, advance: Callable[[int], None]) -> None:
        """Embed images block by block, and write each finished block."""
        with ThreadPoolExecutor() as pool, torch.inference_mode():
            for start in range(0, len(names), BLOCK):
                block = self._block(names[start : start + BLOCK], pool, advance)
                write_block(output, self.blocks, self.identity, block)
                self.blocks += 1
                for (name, size, time, digest), vectors in zip(block.files, block.vectors):
                    self.failures.pop(name, None)
                    self.found[name] = _Known((size, time), digest, vectors)
                    self.embedded.add(name)
                self.failures |= {name: rest for name, *rest in block.failures}

    def _block(self, names: list[str], pool: ThreadPoolExecutor, advance: Callable[[int], None]) -> Block:
        parameter = next(self.model.parameters(), torch.zeros(()))
        files, vectors, failures = [], [], []
        for first in range(0, len(names), BATCH):
            chosen = names[first : first + BATCH]
            tensors: dict[str, torch.Tensor] = {}
            for name, found in zip(chosen, pool.map(self._read, chosen)):
                if isinstance(found, str):
                    failures.append([name, *self.statuses[name], found])
                else:
                    tensors[name] = found[0]
                    files.append([name, *self.statuses[name], found[1]])
            if tensors:
                batch = torch.stack(list(tensors.values())).to(parameter.device, parameter.dtype)
                embeddings = embed(self.model, batch).cpu()
                check_finite(embeddings, list(tensors), self.model_name)
                vectors.append(embeddings.numpy())
            advance(len(chosen))
        return Block(files, np.concatenate(vectors) if vectors else np.zeros((0, 0, 0), np.float32), failures)

    def _read(self, name: str) -> tuple[torch.Tensor, str] | str:
        """The model's input for an image and the digest of its file, or the reason why it cannot be read."""
        path = self.folder / name
        try:
            height, width = picture.size_of(path)
            if height * width > LARGE:
                with self._one_large:
                    return self.transform(read_upright(path)), digest_of(path)
            return self.transform(read_upright(path)), digest_of(path)
        except VisionAttnError as error:
            return str(error)
        except OSError as error:
            return f"Could not read the image {shorten(path)}: {error.strerror or error}."
        except MemoryError:
            return f"Could not read the image {shorten(path)}: there is not enough memory for it."
