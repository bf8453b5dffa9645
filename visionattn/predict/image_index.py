"""An index of a folder of images: what each looks like under each attribute, searched exactly by cosine.

A folder of files: `manifest.json`, which says of which model and images it is, and `00.faiss`, `01.faiss` ..., one for
each condition of the model in order: L2-normalised float32 vectors in the order of the manifest's images.

While it is made, finished blocks of images stand in `parts`: a stopped run goes on behind them, and as blocks and their
batches are always cut alike, it ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from visionattn.data.embedding import conditions_of, embed, eval_transform, input_config
from visionattn.errors import CheckpointError, DataError, InputError, UnknownNameError, VisionAttnError, require
from visionattn.files import atomic_path
from visionattn.predict import picture
from visionattn.weights.hashing import hash_state

__all__ = ["Hit", "ImageIndex", "build_index", "find_images", "read_upright", "write_index"]

FORMAT = 1
BLOCK, BATCH = 256, 32  # images of a finished block, and of a pass
WHOLE = "image"  # what the one condition of a model without conditions is called


def find_images(folder: str | Path) -> list[str]:
    """The images of a folder and its sub-folders, as sorted names relative to it.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in picture.READABLE and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if not names:
        raise DataError(f"There are no images in {folder}: none that ends in {', '.join(picture.READABLE)}.")
    return names


def read_upright(path: Path) -> Image.Image:
    """Read an image as RGB of 8 bits: upright by its EXIF, alpha on white.

    Raises:
        DataError: It is not there, no image, or damaged.
        InputError: Its pixels have no known range.
    """
    pixels = picture.read(path).pixels
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / np.float32(257)).astype(np.uint8)
    if pixels.shape[2] in (2, 4):
        pixels = picture.on_white(pixels)
    return Image.fromarray(pixels[:, :, [0, 0, 0]] if pixels.shape[2] == 1 else pixels)


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
    """Embed the images of a folder by all conditions of a model, and write their index.

    Args:
        folder: Images, also in sub-folders.
        output: Folder of the index. One that is unfinished is continued where images and model are the same.
        model: Gives (B, C, E) for its `attributes`, or features (B, E), which make one condition `"image"`.
        model_name: Name or weight file of the model, for the manifest.
        image_size: Height and width of the images; None takes the model's.
        overwrite: Replace an index of other images or of another model.
        console: Shows the progress; None shows none.

    Returns:
        One line for each image that could not be read; the index is without it.

    Raises:
        DataError: There are no images, or none can be read.
        InputError: The model gives no embeddings, or there is another index.
        MissingPackageError: faiss is not installed.
        StorageError: The index could not be written.
    """
    require("faiss", "search")
    folder, output = Path(folder), Path(output)
    names = find_images(folder)
    plan = _plan(folder, names, model, model_name, image_size)
    manifest = output / "manifest.json"
    if manifest.exists():
        before = _read_json(manifest)
        if all(before.get(key) == value for key, value in plan.items()):
            return list(before["unreadable"])
        if not overwrite:
            raise InputError(f"{output} holds an index of other images or of another model: give --overwrite.")
    parts = output / "parts"
    if parts.exists() and _read_json(parts / "plan.json") != plan:
        shutil.rmtree(parts)
    _write_json(parts / "plan.json", plan)
    _embed_blocks(folder, names, model.eval(), plan["input"], parts, console)

    places, failures, vectors = _gather(parts, len(names))
    if not len(places):
        raise DataError(f"None of the {len(names)} images in {folder} can be read. The first: {failures[0]}")
    write_index(output, vectors, {**plan, "images": [names[place] for place in places], "unreadable": failures})
    shutil.rmtree(parts)
    return failures


def write_index(output: Path, vectors: np.ndarray, manifest: dict[str, Any]) -> None:
    """Write the files of an index, in place of those that are there.

    Args:
        output: Its folder.
        vectors: float32 (N, C, E), L2-normalised.
        manifest: model, weights, input, conditions, folder and images.

    Raises:
        MissingPackageError: faiss is not installed.
        StorageError: A file could not be written.
    """
    faiss: Any = require("faiss", "search")
    # Without a manifest it is unfinished, so that old and new files are never taken for one index.
    for old in (output / "manifest.json", *output.glob("*.faiss")):
        old.unlink(missing_ok=True)
    for number in range(vectors.shape[1]):
        index = faiss.IndexFlatIP(vectors.shape[2])
        index.add(np.ascontiguousarray(vectors[:, number]))
        with atomic_path(output / f"{number:02d}.faiss") as temporary:
            faiss.write_index(index, str(temporary))
    form = {"format": FORMAT, "metric": "cosine", "dtype": "float32", "embed_dim": vectors.shape[2]}
    _write_json(output / "manifest.json", {**form, **manifest})


def _plan(
    folder: Path, names: list[str], model: nn.Module, model_name: str, image_size: tuple[int, int] | None
) -> dict[str, Any]:
    """What an index follows from, in plain types."""
    conditions = conditions_of(model)
    if not conditions and getattr(model, "num_classes", 0) != 0:
        raise InputError(
            f"{model_name} names classes and gives no embeddings: models va_cca_* and re-identification do."
        )
    stats = [(folder / name).stat() for name in names]
    return {
        "model": model_name,
        "weights": hash_state(model.state_dict()),
        "input": input_config(model, image_size),
        "conditions": list(conditions) or [WHOLE],
        "folder": str(folder.resolve()),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats)],
    }


def _embed_blocks(
    folder: Path, names: list[str], model: nn.Module, config: dict[str, Any], parts: Path, console: Console | None
) -> None:
    transform = eval_transform(config)
    parameter = next(model.parameters())

    def read(name: str) -> torch.Tensor | str:
        try:
            return transform(read_upright(folder / name))
        except VisionAttnError as error:
            return str(error)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, disable=console is None) as progress,
        ThreadPoolExecutor() as pool,
        torch.inference_mode(),
    ):
        task = progress.add_task("images", total=len(names))
        for start in range(0, len(names), BLOCK):
            path, block = _block(parts, start), names[start : start + BLOCK]
            if not path.exists():
                places, failures, vectors = [], [], []
                for first in range(0, len(block), BATCH):
                    read_ones = list(pool.map(read, block[first : first + BATCH]))
                    failures += [one for one in read_ones if isinstance(one, str)]
                    images = [one for one in read_ones if not isinstance(one, str)]
                    places += [start + first + n for n, one in enumerate(read_ones) if not isinstance(one, str)]
                    if images:
                        batch = torch.stack(images).to(parameter.device, parameter.dtype)
                        vectors.append(embed(model, batch).cpu().numpy())
                    progress.advance(task, len(read_ones))
                found = np.concatenate(vectors) if vectors else np.zeros((0, 0, 0), np.float32)
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, places=np.array(places, np.int64), failures=np.array(failures, str), vectors=found)
            else:
                progress.advance(task, len(block))


def _block(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.npz"


def _gather(parts: Path, count: int) -> tuple[list[int], list[str], np.ndarray]:
    """Places of the images that were read, what was said of the others, and vectors (N, C, E)."""
    places: list[int] = []
    failures: list[str] = []
    vectors = []
    for start in range(0, count, BLOCK):
        with np.load(_block(parts, start)) as block:
            places += block["places"].tolist()
            failures += block["failures"].tolist()
            if len(block["places"]):
                vectors.append(block["vectors"])
    return places, failures, np.concatenate(vectors) if vectors else np.zeros((0, 0, 0), np.float32)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content))


@dataclass(frozen=True)
class Hit:
    """A found image: its name, its score, and its cosine under each attribute that was asked for."""

    image: str
    score: float
    cosines: dict[str, float]


class ImageIndex:
    """An index that `build_index` wrote.

    Args:
        folder: Its folder.

    Attributes:
        manifest: What it says of itself: model, weights, input, conditions, folder, images.

    Raises:
        DataError: There is none, it is unfinished, or of another format.
        MissingPackageError: faiss is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self._faiss: Any = require("faiss", "search")
        self.folder = Path(folder)
        self.manifest = _read_json(self.folder / "manifest.json")
        if self.manifest.get("format") != FORMAT:
            unfinished = (self.folder / "parts").exists() and not self.manifest
            what = "is unfinished: run visionattn index again" if unfinished else "holds no index of visionattn"
            raise DataError(f"The folder {folder} {what}.")
        self._opened: dict[str, Any] = {}

    @cached_property
    def images(self) -> list[str]:
        """Name of each image, relative to the folder that was indexed."""
        return list(self.manifest["images"])

    @property
    def conditions(self) -> tuple[str, ...]:
        """The attributes to search by."""
        return tuple(self.manifest["conditions"])

    def check(self, model: nn.Module, model_name: str) -> None:
        """Refuse a model that did not make this index.

        Raises:
            CheckpointError: Its weights are others.
        """
        found = hash_state(model.state_dict())
        if found != self.manifest["weights"]:
            raise CheckpointError(
                f"{self.folder} was made by {self.manifest['model']} with the weights {self.manifest['weights'][:12]}; "
                f"{model_name} has {found[:12]}. Give the model that made it, or index the images again."
            )

    @torch.inference_mode()
    def embed(self, model: nn.Module, image: Image.Image) -> np.ndarray:
        """An RGB image -> its vectors float32 (C, E), prepared as the index's images were."""
        parameter = next(model.parameters())
        tensor = eval_transform(self.manifest["input"])(image)[None].to(parameter.device, parameter.dtype)
        return embed(model.eval(), tensor)[0].cpu().numpy()

    def search(self, vectors: np.ndarray, attributes: dict[str, float], top: int) -> list[Hit]:
        """The nearest images.

        Args:
            vectors: float32 (C, E) of the query, L2-normalised.
            attributes: Weight of each attribute; the score is the weighted mean of their cosines.
            top: Most hits.

        Returns:
            Best first; equal scores in the order of the images.

        Raises:
            UnknownNameError: There is no such attribute.
            InputError: A weight is not above 0, or there is none.
        """
        self.check_attributes(attributes)
        total = sum(attributes.values())
        if len(attributes) == 1:
            ((name, _),) = attributes.items()
            query = vectors[self.conditions.index(name)][None]
            scores, places = self._index(name).search(query, min(top, len(self.images)))
            return [
                Hit(self.images[place], score, {name: score})
                for score, place in zip(scores[0].tolist(), places[0].tolist())
            ]
        cosines = {}
        for name in attributes:
            index = self._index(name)
            # Without a given array it would be torch's where somebody imported faiss.contrib.torch_utils.
            every = index.reconstruct_n(0, index.ntotal, np.empty((index.ntotal, index.d), np.float32))
            cosines[name] = every @ vectors[self.conditions.index(name)]
        mixed = sum(weight / total * cosines[name] for name, weight in attributes.items())
        best = np.argsort(-np.asarray(mixed), kind="stable")[:top].tolist()
        return [
            Hit(self.images[place], float(mixed[place]), {name: float(own[place]) for name, own in cosines.items()})
            for place in best
        ]

    def check_attributes(self, attributes: dict[str, float] | Sequence[str]) -> None:
        """Refuse attributes that the index does not have, and weights that are none.

        Raises:
            UnknownNameError: There is no such attribute.
            InputError: A weight is not above 0, or there is none.
        """
        if unknown := [name for name in attributes if name not in self.conditions]:
            raise UnknownNameError(
                f"The index has no attribute {', '.join(unknown)}. It has {', '.join(self.conditions)}."
            )
        if not attributes or (isinstance(attributes, dict) and not all(w > 0 for w in attributes.values())):
            raise InputError("Say by which attributes to search; their weights are above 0.")

    def _index(self, name: str) -> Any:
        if name not in self._opened:
            path = self.folder / f"{self.conditions.index(name):02d}.faiss"
            try:
                index = self._faiss.read_index(str(path))
            except RuntimeError as error:
                raise DataError(f"Could not read {path}: the index is damaged.") from error
            if index.ntotal != len(self.images):
                raise DataError(f"{path} has {index.ntotal} images, the manifest {len(self.images)}: index them again.")
            self._opened[name] = index
        return self._opened[name]
